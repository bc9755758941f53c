"""One vectorised sampler for the whole batch: every parameter is an element of an array."""

from collections.abc import Callable, Iterable
from typing import Final

import mlx.core as mx
import numpy as np

from mlx_serving.worker.engine.sampling.parameters import (
    Draw,
    Draws,
    Parameters,
    RowSampling,
    StepInputs,
    pack,
)
from mlx_serving.worker.engine.sampling.reference import ReferenceDraw

RECENT_TOKENS: Final = 64  # steps after which a batch with penalties is packed again
_FEWEST_COLUMNS: Final = 8

MakeDraw = Callable[[Parameters, mx.array], Draw]


class BatchSampler:
    """The sampling state of one batch; rebuilt (on the host, without sync) when its rows change.

    Each sampling advances every row by one position. Noise and history are the row's own, so its
    tokens depend neither on other rows nor on their order.
    """

    def __init__(
        self, rows: Iterable[RowSampling], words: mx.array, make: MakeDraw = ReferenceDraw
    ) -> None:
        """Take the batch's rows in order and `token_words` of the model's vocabulary."""
        self._parameters = pack(rows, words.size)
        self._draw = make(self._parameters, words)
        self._step = 0
        columns = 1 + RECENT_TOKENS if self._parameters.penalised else _FEWEST_COLUMNS
        self._state = _nothing_counted(self._parameters.size, columns)

    def __call__(self, logits: mx.array) -> mx.array:
        """Sample int32 [B] tokens from logits [B, V] of rows without penalties or masks."""
        return self.sample(logits).tokens

    def sample(
        self, logits: mx.array, tokens: mx.array | None = None, mask: mx.array | None = None
    ) -> Draws:
        """Sample one token for each row from logits [B, V] of any float dtype.

        A row whose logits hold NaN or +inf, or nothing but -inf, samples `INVALID_TOKEN`; the
        other rows are untouched by it.

        Args:
            logits: the model's output.
            tokens: int32 [B], the model's input; needed by rows with penalties.
            mask: int32 [B, ceil(V / 32)], the allowed tokens; needed by masked rows, not read
                for others.

        Raises:
            ValueError: an argument that a row needs is missing, or `needs_rebuild` is true.
        """
        if self._parameters.penalised and tokens is None:
            raise ValueError("tokens: a row has penalties")
        if self._parameters.masked and mask is None:
            raise ValueError("mask: a row is masked")
        if self.needs_rebuild:
            raise ValueError("the sampler has counted as many tokens as it can")
        if tokens is None:
            tokens = mx.zeros(self._parameters.size, dtype=mx.int32)
        draws = self._draw(logits, StepInputs(self._step, tokens, self._state, mask))
        self._step += 1
        self._state = draws.state
        return draws

    @property
    def needs_rebuild(self) -> bool:
        """Whether the state has no room for another token: the rows have to be packed again."""
        return self._parameters.penalised and self._step >= RECENT_TOKENS


def _nothing_counted(rows: int, columns: int) -> mx.array:
    """Return zeros int32 [rows, columns], from the host.

    Zeros made on the device would be one more operation in the first step after a change of rows.
    MLX caches what it launches by its operations (a CUDA graph), and would build it anew.
    """
    return mx.array(np.zeros((rows, columns), dtype=np.int32))
