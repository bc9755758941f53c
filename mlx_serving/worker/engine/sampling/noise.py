"""Counter-based Gumbel noise: a hash of (seed, choice, position, token id) and nothing else.

So a row's tokens depend neither on other rows, nor on its place in the batch, its worker or a
restart.
The mixer is lowbias32 (Chris Wellons, hash-prospector, 2018; public domain), keyed by 64 bits.
The constants never change: a resumed job draws what it would have drawn.
"""

from functools import lru_cache
from typing import Final

import mlx.core as mx

_WORD: Final = 0xFFFFFFFF
_MULTIPLIER_1: Final = 0x7FEB352D  # lowbias32
_MULTIPLIER_2: Final = 0x846CA68B  # lowbias32
_WEYL_1: Final = 0x9E3779B9  # 2**32 / golden ratio, odd
_WEYL_2: Final = 0x85EBCA6B  # odd, unrelated to _WEYL_1
_LARGEST_UNIFORM: Final = 1.0 - 2.0**-24  # the float32 before 1
_REMEMBERED_STREAMS: Final = 4096


def mix(word: int) -> int:
    """Mix a 32-bit word (lowbias32); a bijection."""
    word ^= word >> 16
    word = (word * _MULTIPLIER_1) & _WORD
    word ^= word >> 15
    word = (word * _MULTIPLIER_2) & _WORD
    return word ^ (word >> 16)


@lru_cache(maxsize=_REMEMBERED_STREAMS)
def stream_key(seed: int, choice: int) -> tuple[int, int]:
    """Return the two 32-bit words of the random stream of (seed, choice)."""
    low, high = seed & _WORD, (seed >> 32) & _WORD
    first = mix(mix(mix(low ^ _WEYL_1) ^ high) ^ choice)
    second = mix(mix(mix(high ^ _WEYL_2) + low & _WORD) + choice & _WORD)
    return first, second


def _mix_array(words: mx.array) -> mx.array:
    words = words ^ (words >> 16)
    words = words * _MULTIPLIER_1
    words = words ^ (words >> 15)
    words = words * _MULTIPLIER_2
    return words ^ (words >> 16)


def token_words(vocab_size: int) -> mx.array:
    """Return one mixed word for each token id: uint32 [V]. Constant; made once for each model."""
    ids = mx.arange(vocab_size, dtype=mx.uint32)
    return _mix_array(ids * _WEYL_1 + _WEYL_2)


def position_keys(streams: mx.array, positions: mx.array) -> mx.array:
    """Mix streams uint32 [B, 2] with positions uint32 [B] into row keys uint32 [B, 2]."""
    weyl = mx.array([_WEYL_1, _WEYL_2], dtype=mx.uint32)
    return _mix_array(streams + positions[:, None] * weyl)


def hash_tokens(keys: mx.array, words: mx.array) -> mx.array:
    """Hash keys uint32 [B, 2] with token words uint32 [V]: uint32 [B, V].

    lowbias32 with the second key word added between its rounds.
    """
    mixed = words ^ keys[:, :1]
    mixed = (mixed ^ (mixed >> 16)) * _MULTIPLIER_1 + keys[:, 1:]
    mixed = (mixed ^ (mixed >> 15)) * _MULTIPLIER_2
    return mixed ^ (mixed >> 16)


def negative_gumbel(bits: mx.array) -> mx.array:
    """Turn uint32 hashes into float32 negated standard Gumbel noise, log(-log(1 - u)).

    u = (bits + 1/2) / 2**32. Small u, which wins the argmax, has full precision; u is clamped
    below 1, so noise is always finite (-22.9 to 2.9).
    """
    uniform = mx.minimum(bits.astype(mx.float32) * 2.0**-32 + 2.0**-33, _LARGEST_UNIFORM)
    return mx.log(-mx.log1p(-uniform))
