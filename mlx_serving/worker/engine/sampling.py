"""One vectorised sampler for the whole batch: pure MLX operations, every parameter an array.

Filters, in this order (Hugging Face transformers' and vLLM V0's): temperature, top-k, top-p over
the mass that top-k left, min-p against the most likely token. All three end in one threshold a
row, so tokens tied with the last one kept are kept too. A token is then picked by the Gumbel-max
trick, argmax(logit / temperature + noise), which draws exactly from softmax over what is kept.

The noise is counter-based: a hash of (seed, choice, position, token id) and of nothing else, so a
row's tokens don't depend on its batch-mates, its place in the batch, its worker or a restart.
The mixer is lowbias32 (Chris Wellons, hash-prospector, 2018; public domain), keyed by 64 bits.
"""

import math
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Final

import mlx.core as mx

from mlx_serving.worker.engine.sequence import INVALID_TOKEN, SamplingParams

GREEDY_BELOW: Final = 1e-5  # a lower temperature than this is 0

_WORD: Final = 0xFFFFFFFF
_MULTIPLIER_1: Final = 0x7FEB352D  # lowbias32
_MULTIPLIER_2: Final = 0x846CA68B  # lowbias32
_WEYL_1: Final = 0x9E3779B9  # 2**32 / golden ratio, odd
_WEYL_2: Final = 0x85EBCA6B  # odd, unrelated to _WEYL_1
_LARGEST_UNIFORM: Final = 1.0 - 2.0**-24  # the float32 before 1


@dataclass(frozen=True, slots=True)
class RowSampling:
    """One row's place in the random stream: `position` is that of its next sampled token."""

    params: SamplingParams
    choice: int
    position: int


def mix(word: int) -> int:
    """Mix a 32-bit word (lowbias32); a bijection."""
    word ^= word >> 16
    word = (word * _MULTIPLIER_1) & _WORD
    word ^= word >> 15
    word = (word * _MULTIPLIER_2) & _WORD
    return word ^ (word >> 16)


def stream_key(seed: int, choice: int) -> tuple[int, int]:
    """Return the two 32-bit words that stand for (seed, choice)."""
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
    """Return one mixed word a token id: uint32 [V]. Constant, so made once a model."""
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

    u = (bits + 1/2) / 2**32. Small u, where the winners are, keeps its full precision; u is
    clamped below 1, where float32 ends, so noise is always finite (-22.9 to 2.9).
    """
    uniform = mx.minimum(bits.astype(mx.float32) * 2.0**-32 + 2.0**-33, _LARGEST_UNIFORM)
    return mx.log(-mx.log1p(-uniform))


def kept_threshold(
    ascending: mx.array, top_k: mx.array, top_p: mx.array, vocab_size: int
) -> mx.array:
    """Return the least value that top-k and top-p keep in each row: float32 [R, 1].

    `ascending` float32 [R, V]: each row sorted, shifted so that its largest is 0, divided by the
    temperature. `top_k` int32 [R, 1] in [1, V]; `top_p` float32 [R, 1], 1 keeps all.
    """
    kth = mx.take_along_axis(ascending, vocab_size - top_k, axis=-1)
    mass = mx.where(ascending >= kth, mx.exp(ascending), 0.0)
    above = mx.cumsum(mass, axis=-1, reverse=True, inclusive=False)
    total = above[:, :1] + mass[:, :1]
    dropped = (above >= top_p * total).sum(axis=-1, keepdims=True)
    nucleus = mx.take_along_axis(ascending, mx.minimum(dropped, vocab_size - 1), axis=-1)
    return mx.maximum(kth, mx.where(top_p < 1.0, nucleus, -mx.inf))


def _column(values: SequenceOf[float], dtype: mx.Dtype) -> mx.array:
    return mx.array(list(values), dtype=dtype)[:, None]


class BatchSampler:
    """The sampling state of one batch, rebuilt (on the host, no sync) when its rows change.

    Calling it samples one token a row and moves every row one position on. A batch of greedy
    rows only takes an argmax; nothing is sorted unless a row has top-k or top-p, and then only
    those rows are.
    """

    def __init__(self, rows: SequenceOf[RowSampling], words: mx.array) -> None:
        """Take the batch's rows in order and `token_words` of the model's vocabulary."""
        self._words = words
        greedy = [row.params.temperature < GREEDY_BELOW for row in rows]
        self._all_greedy = all(greedy)
        if self._all_greedy:
            return
        self._greedy = mx.array(greedy) if any(greedy) else None
        self._build_rows(rows)
        self._build_filters(rows)

    def _build_rows(self, rows: SequenceOf[RowSampling]) -> None:
        params = [row.params for row in rows]
        temperatures = [p.temperature if p.temperature >= GREEDY_BELOW else 1.0 for p in params]
        self._temperature = _column(temperatures, mx.float32)
        streams = [stream_key(row.params.seed, row.choice) for row in rows]
        self._streams = mx.array(streams, dtype=mx.uint32)
        self._positions = mx.array([row.position for row in rows], dtype=mx.uint32)
        minimum = [math.log(p.min_p) if p.min_p > 0.0 else -math.inf for p in params]
        self._log_min_p = _column(minimum, mx.float32) if any(p.min_p for p in params) else None

    def _build_filters(self, rows: SequenceOf[RowSampling]) -> None:
        vocab_size = self._words.size
        filtered = [
            index
            for index, row in enumerate(rows)
            if row.params.temperature >= GREEDY_BELOW
            and (row.params.top_p < 1.0 or 0 < row.params.top_k < vocab_size)
        ]
        self._filtered = mx.array(filtered, dtype=mx.uint32) if filtered else None
        self._filters_all = len(filtered) == len(rows)
        params = [rows[index].params for index in filtered]
        if params:
            top_k = [min(p.top_k or vocab_size, vocab_size) for p in params]
            self._top_k = _column(top_k, mx.int32)
            self._top_p = _column([p.top_p for p in params], mx.float32)

    def __call__(self, logits: mx.array) -> mx.array:
        """Sample int32 [B] tokens from logits [B, V] of any float dtype.

        A row whose logits hold NaN or +inf, or nothing but -inf, samples `INVALID_TOKEN`; the
        other rows are untouched by it. Rows own their noise, so order does not matter.
        """
        top = logits.max(axis=-1, keepdims=True)
        if self._all_greedy:
            tokens = mx.argmax(logits, axis=-1)
        else:
            tokens = self._pick(logits, top.astype(mx.float32))
        # NaN and both infinities are the values that differ from themselves subtracted from 0.
        invalid = (top - top)[:, 0] != 0
        return mx.where(invalid, INVALID_TOKEN, tokens.astype(mx.int32))

    def _pick(self, logits: mx.array, top: mx.array) -> mx.array:
        scaled = (logits.astype(mx.float32) - top) / self._temperature
        threshold = self._threshold(logits, top)
        keys = position_keys(self._streams, self._positions)
        scores = scaled - negative_gumbel(hash_tokens(keys, self._words))
        if threshold is not None:
            scores = mx.where(scaled >= threshold, scores, -mx.inf)
        self._positions = self._positions + 1
        tokens = mx.argmax(scores, axis=-1)
        if self._greedy is None:
            return tokens
        return mx.where(self._greedy, mx.argmax(logits, axis=-1), tokens)

    def _threshold(self, logits: mx.array, top: mx.array) -> mx.array | None:
        if self._filtered is None:
            return self._log_min_p
        temperature = self._temperature
        if not self._filters_all:
            logits, top = logits[self._filtered], top[self._filtered]
            temperature = temperature[self._filtered]
        # Temperature keeps the order, so the model's own, narrower dtype is what is sorted.
        ascending = (mx.sort(logits, axis=-1).astype(mx.float32) - top) / temperature
        kept = kept_threshold(ascending, self._top_k, self._top_p, self._words.size)
        if not self._filters_all:
            everything = mx.full(self._temperature.shape, -mx.inf)
            everything[self._filtered] = kept
            kept = everything
        return kept if self._log_min_p is None else mx.maximum(kept, self._log_min_p)
