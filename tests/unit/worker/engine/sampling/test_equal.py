"""Every kernel draws what the reference draws, on rows that mix everything."""

import math
import random

import mlx.core as mx
import numpy as np
import pytest

from mlx_serving.worker.engine.interface import SamplingParams
from mlx_serving.worker.engine.sampling.noise import token_words
from mlx_serving.worker.engine.sampling.parameters import RowSampling
from mlx_serving.worker.engine.sampling.sampler import BatchSampler, MakeDraw
from mlx_serving.worker.engine.sampling.self_check import first_difference
from tests.support.sampling_support import IMPLEMENTATIONS, KERNELS, ints

ROWS = 16
STEPS = 3


def some_row(chance: random.Random, vocab_size: int) -> RowSampling:
    prompt, position = chance.randrange(1, 20), chance.randrange(10)
    history = [chance.randrange(vocab_size) for _ in range(prompt + position)]
    biased = chance.sample(range(vocab_size), 4) if chance.random() < 0.3 else []
    params = SamplingParams(
        temperature=chance.choice([0.0, 0.3, 1.0, 2.0, 50.0]),
        top_p=chance.choice([1.0, 0.95, 0.5, 1e-6, 0.999]),
        top_k=chance.choice([0, 0, 1, 3, 100, vocab_size, vocab_size + 5]),
        min_p=chance.choice([0.0, 0.0, 0.05, 0.5]),
        seed=chance.randrange(2**64),
        repetition_penalty=chance.choice([1.0, 1.0, 1.3, 0.8]),
        presence_penalty=chance.choice([0.0, 0.0, 0.7]),
        frequency_penalty=chance.choice([0.0, 0.0, -0.3, 0.4]),
        logit_bias=tuple((token, chance.uniform(-5, 5)) for token in biased),
        logprobs=chance.choice([None, None, 0, 5]),
    )
    masked = chance.random() < 0.2
    return RowSampling(params, chance.randrange(4), position, history, prompt, masked)


def some_logits(rows: int, vocab_size: int, seed: int) -> mx.array:
    logits = mx.random.normal((rows, vocab_size), key=mx.random.key(seed)) * 3.0
    return mx.round(logits) if seed % 3 == 0 else logits


@pytest.mark.parametrize("make", KERNELS)
@pytest.mark.parametrize("vocab_size", [33, 997, 4099])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_mixed_rows_draw_what_the_reference_draws(
    make: MakeDraw, vocab_size: int, dtype: mx.Dtype
) -> None:
    chance = random.Random(vocab_size)
    words = token_words(vocab_size)
    asked = 0
    for seed in range(4):
        rows = [some_row(chance, vocab_size) for _ in range(ROWS)]
        reference, other = BatchSampler(rows, words), BatchSampler(rows, words, make)
        for step in range(STEPS):
            logits = some_logits(ROWS, vocab_size, seed * STEPS + step).astype(dtype)
            tokens = mx.array([chance.randrange(vocab_size) for _ in rows], dtype=mx.int32)
            drawn = chance.randbytes(ROWS * -(-vocab_size // 32) * 4)
            mask = mx.array(np.frombuffer(drawn, np.int32).reshape(ROWS, -1))
            expected = reference.sample(logits, tokens, mask)
            got = other.sample(logits, tokens, mask)
            assert ints(got.tokens) == ints(expected.tokens)
            assert mx.array_equal(got.state, expected.state)
            assert (expected.logprobs is None) == (got.logprobs is None)
            for index, row in enumerate(rows):
                count = row.params.logprobs
                if count is not None and got.logprobs and expected.logprobs:
                    asked += 1
                    ours, theirs = expected.logprobs, got.logprobs
                    assert mx.allclose(ours.chosen[index], theirs.chosen[index], atol=1e-4)
                    top = slice(0, count)
                    assert ints(ours.top_tokens[index, top]) == ints(theirs.top_tokens[index, top])
                    assert mx.allclose(ours.top[index, top], theirs.top[index, top], atol=1e-4)
    assert asked > 20


@pytest.mark.parametrize("make", IMPLEMENTATIONS)
def test_the_self_check_passes(make: MakeDraw) -> None:
    assert first_difference(make) is None


@pytest.mark.parametrize("make", IMPLEMENTATIONS)
@pytest.mark.parametrize("masked", [1, 700])
def test_top_p_keeps_nothing_beyond_a_mass_that_is_met_exactly(make: MakeDraw, masked: int) -> None:
    """Masses 1/2, 1/4, 1/4: the first one is all that top-p 0.5 asks for."""
    params = SamplingParams(temperature=1.0, top_p=0.5, seed=1)
    rows = [RowSampling(params, 0, position) for position in range(40)]
    logits = [-math.inf] * masked + [0.0, -math.log(2), -math.log(2)]
    sampler = BatchSampler(rows, token_words(len(logits)), make)
    assert set(ints(sampler.sample(mx.array([logits] * len(rows))).tokens)) == {masked}
