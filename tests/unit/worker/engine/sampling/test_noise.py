"""The counter-based noise: fixed for ever, uniform, and independent across its four counters."""

import math

import mlx.core as mx
import pytest

from mlx_serving.worker.engine.sampling.noise import (
    hash_tokens,
    negative_gumbel,
    position_keys,
    stream_key,
    token_words,
)

WORD = 0xFFFFFFFF
VOCAB = 4096
GOLDEN_SEED_7 = [3641285535, 3182546885, 2001245678]


def reference_hash(seed: int, choice: int, position: int, token: int) -> int:
    """The hash in Python's own integers, spelled out once more."""

    def mix(word: int) -> int:
        word ^= word >> 16
        word = word * 0x7FEB352D & WORD
        word ^= word >> 15
        word = word * 0x846CA68B & WORD
        return word ^ word >> 16

    low, high = seed & WORD, seed >> 32
    first = mix(mix(mix(low ^ 0x9E3779B9) ^ high) ^ choice)
    second = mix((mix((mix(high ^ 0x85EBCA6B) + low) & WORD) + choice) & WORD)
    first = mix((first + position * 0x9E3779B9) & WORD)
    second = mix((second + position * 0x85EBCA6B) & WORD)
    word = mix((token * 0x9E3779B9 + 0x85EBCA6B) & WORD) ^ first
    word ^= word >> 16
    word = (word * 0x7FEB352D + second) & WORD
    word ^= word >> 15
    word = word * 0x846CA68B & WORD
    return word ^ word >> 16


def bits(seed: int, choice: int = 0, position: int = 0, vocab_size: int = VOCAB) -> mx.array:
    streams = mx.array([stream_key(seed, choice)], dtype=mx.uint32)
    keys = position_keys(streams, mx.array([position], dtype=mx.uint32))
    return hash_tokens(keys, token_words(vocab_size))[0]


@pytest.mark.parametrize(
    ("seed", "choice", "position"),
    [(0, 0, 0), (1, 0, 0), (2**64 - 1, 3, 4095), (0xDEADBEEF12345678, 127, 1 << 20)],
)
def test_hash_equals_the_reference(seed: int, choice: int, position: int) -> None:
    tokens = (0, 1, 2, 77, 151_935)
    got = bits(seed, choice, position, vocab_size=151_936)
    expected = [reference_hash(seed, choice, position, token) for token in tokens]
    assert [got[token].item() for token in tokens] == expected


def test_hash_never_changes() -> None:
    """A resumed job draws on another worker, of another release, what it would have drawn."""
    assert [reference_hash(7, 0, 0, token) for token in (0, 1, 2)] == GOLDEN_SEED_7
    assert bits(7)[:3].tolist() == GOLDEN_SEED_7


def uniform(words: mx.array) -> mx.array:
    return words.astype(mx.float32) * 2.0**-32


def assert_uncorrelated(a: mx.array, b: mx.array) -> None:
    """The correlation of N independent pairs is normal with deviation 1 / sqrt(N)."""
    a, b = uniform(a) - 0.5, uniform(b) - 0.5
    correlation = ((a * b).mean() * 12.0).item()
    assert abs(correlation) < 5.0 / math.sqrt(a.size)  # 5 sigma


@pytest.mark.parametrize("shift", [1, 2, 3, 64, 1000])
def test_positions_are_independent(shift: int) -> None:
    assert_uncorrelated(bits(5, 0, 10, 1 << 16), bits(5, 0, 10 + shift, 1 << 16))


@pytest.mark.parametrize("other", [6, 5 + (1 << 32), 5 ^ (1 << 63), 5 << 1])
def test_seeds_are_independent(other: int) -> None:
    assert_uncorrelated(bits(5, 0, 0, 1 << 16), bits(other, 0, 0, 1 << 16))


def test_choices_are_independent() -> None:
    assert_uncorrelated(bits(5, 0, 0, 1 << 16), bits(5, 1, 0, 1 << 16))


@pytest.mark.parametrize("shift", [1, 2, 256, 32_768])
def test_token_ids_are_independent(shift: int) -> None:
    words = bits(5, 0, 0, 1 << 16)
    assert_uncorrelated(words, mx.roll(words, shift))


def test_one_token_is_independent_over_positions() -> None:
    """What `dice` sees: few tokens, many positions."""
    count = 1 << 15
    streams = mx.array([stream_key(9, 0)] * count, dtype=mx.uint32)
    keys = position_keys(streams, mx.arange(count, dtype=mx.uint32))
    table = hash_tokens(keys, token_words(4))
    for token in range(4):
        assert_uncorrelated(table[:, token], mx.roll(table[:, token], 1))
        assert_uncorrelated(table[:, token], table[:, (token + 1) % 4])


@pytest.mark.parametrize("bit", range(32))
def test_every_bit_is_fair(bit: int) -> None:
    count = 1 << 18
    ones = ((bits(3, 0, 0, count) >> bit) & 1).sum().item()
    assert abs(float(str(ones)) - count / 2) < 5.0 * math.sqrt(count) / 2  # 5 sigma


def test_buckets_pass_chi_square() -> None:
    count, buckets = 1 << 20, 256
    words = bits(11, 2, 5, count) >> 24
    observed = mx.zeros(buckets).at[words].add(mx.ones(count))
    expected = count / buckets
    statistic = ((observed - expected) ** 2 / expected).sum().item()
    assert 179.0 < float(str(statistic)) < 347.0  # 255 degrees of freedom, alpha 1e-4 each side


def test_noise_is_standard_gumbel() -> None:
    noise = -negative_gumbel(bits(1, 0, 0, 1 << 20))
    mean, variance = noise.mean().item(), noise.var().item()
    assert mean == pytest.approx(0.577216, abs=0.01)
    assert variance == pytest.approx(math.pi**2 / 6, rel=0.02)


def test_noise_is_finite_at_both_ends() -> None:
    ends = -negative_gumbel(mx.array([0, 1, WORD - 1, WORD], dtype=mx.uint32))
    assert mx.isfinite(ends).all().item()
    assert (ends[1:] <= ends[:-1]).all().item()
    assert ends[0].item() == pytest.approx(33 * math.log(2), abs=1e-3)
