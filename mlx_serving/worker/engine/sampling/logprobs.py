"""Log probabilities of the model's own distribution: computed on the device, read by the host."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import mlx.core as mx
import numpy as np

from mlx_serving.worker.engine.interface import TokenLogprobs
from mlx_serving.worker.engine.sampling.parameters import Logprobs, Parameters

if TYPE_CHECKING:
    from collections.abc import Iterable


def read_logprobs(logprobs: Logprobs, asked: Iterable[tuple[int, int, int]]) -> list[TokenLogprobs]:
    """Read the log probabilities that rows asked for; waits for the device.

    `asked`: (row, token that it sampled, number of likeliest tokens). Tokens of probability 0 are
    left out: JSON has no number for their log probability.
    """
    chosen, ids, top = (np.array(values) for values in logprobs)
    return [
        TokenLogprobs(
            token,
            float(chosen[row]),
            tuple(
                (int(i), float(p))
                for i, p in zip(ids[row, :count], top[row, :count], strict=True)
                if p > -math.inf
            ),
        )
        for row, token, count in asked
    ]


_MAGNITUDE: Final = 0x7FFFFFFF
_LEAST: Final = -(2**31)


class LogprobReport:
    """Log probabilities of the chosen and the likeliest tokens, for rows that ask for them."""

    def __init__(self, parameters: Parameters) -> None:
        """Note which rows ask."""
        asking = [i for i, row in enumerate(parameters.rows) if row.params.logprobs is not None]
        self._rows = mx.array(asking, dtype=mx.uint32)
        self._size = parameters.size
        self._top = parameters.top_logprobs or 0

    def __call__(self, logits: mx.array, tokens: mx.array) -> Logprobs:
        """Report on tokens int32 [B] drawn from logits [B, V], before any adjustment."""
        raw = logits[self._rows].astype(mx.float32)
        values = raw - mx.logsumexp(raw, axis=-1, keepdims=True)
        # A broken row has no token; its report is not read.
        chosen_ids = mx.maximum(tokens[self._rows], 0)[:, None]
        chosen = mx.zeros(self._size)
        chosen[self._rows] = mx.take_along_axis(values, chosen_ids, axis=-1)[:, 0]
        top_tokens = mx.zeros((self._size, self._top), dtype=mx.int32)
        top = mx.zeros((self._size, self._top))
        if self._top:
            likeliest = _likeliest(raw, self._top)
            top_tokens[self._rows] = likeliest
            top[self._rows] = mx.take_along_axis(values, likeliest, axis=-1)
        return Logprobs(chosen, top_tokens, top)


def _likeliest(logits: mx.array, count: int) -> mx.array:
    """Return the ids of each row's `count` largest, of equals the lowest id: int32 [R, count].

    One argmax each, over integers in the order of the floats: MLX promises no stable sort, and
    tokens that were taken must come after -inf.
    """
    bits = (logits + 0.0).view(mx.int32)  # -0 ties with 0
    keys = mx.where(bits < 0, bits ^ _MAGNITUDE, bits)
    ids = mx.arange(logits.shape[-1])
    found = []
    for _ in range(count):
        best = mx.argmax(keys, axis=-1, keepdims=True)
        keys = mx.where(ids == best, _LEAST, keys)
        found.append(best)
    return mx.concatenate(found, axis=-1).astype(mx.int32)
