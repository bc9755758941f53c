"""Log probabilities of the model's own distribution, in pure MLX operations."""

from typing import Final

import mlx.core as mx

from mlx_serving.worker.engine.sampling.draws import Logprobs
from mlx_serving.worker.engine.sampling.parameters import Parameters

_MAGNITUDE: Final = 0x7FFFFFFF
_LEAST: Final = -(2**31)


class LogprobReport:
    """The chosen token's and the likeliest ones', of the rows that ask."""

    def __init__(self, parameters: Parameters) -> None:
        """Remember which rows ask."""
        asking = [i for i, row in enumerate(parameters.rows) if row.params.logprobs is not None]
        self._rows = mx.array(asking, dtype=mx.uint32)
        self._size = parameters.size
        self._top = parameters.top_logprobs or 0

    def __call__(self, logits: mx.array, tokens: mx.array) -> Logprobs:
        """Report on tokens int32 [B] drawn from logits [B, V], before any adjustment."""
        raw = logits[self._rows].astype(mx.float32)
        values = raw - mx.logsumexp(raw, axis=-1, keepdims=True)
        # A broken row has no token; whatever is reported of it is not read.
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
    what is taken must come after -inf.
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
