"""A batch's sampling parameters as arrays: data on the device, so that no value compiles anything.

The columns are those of `native/kernels/sampler.h`, which reads the same arrays.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Any, Final

import mlx.core as mx
import numpy as np

from mlx_serving.worker.engine.sampling.noise import stream_key
from mlx_serving.worker.engine.sequence import SamplingParams

GREEDY_BELOW: Final = 1e-5  # a lower temperature than this is 0
_FLOAT_COLUMNS: Final = 8
# Metal hands a kernel arrays of fewer elements in another address space.
_SHORTEST: Final = 8
_WORD: Final = 1 << 32


class Column(IntEnum):
    """Columns of `Parameters.ints`."""

    FLAGS = 0
    TOP_K = 1
    LOGPROBS = 2  # -1: none asked for
    STREAM_FIRST = 3
    STREAM_SECOND = 4
    POSITION = 5  # of the token that the first call samples
    SCRATCH_ROW = 6  # -1: the model's logits are used as they are
    HISTORY_BEGIN = 7
    PROMPT_END = 8
    HISTORY_END = 9
    BIAS_BEGIN = 10
    BIAS_END = 11


class Flag(IntFlag):
    """Bits of `Column.FLAGS`."""

    GREEDY = 1
    PENALISED = 2
    MASKED = 4


@dataclass(frozen=True, slots=True)
class RowSampling:
    """One row's place in the random stream, and its past where penalties need it.

    `position` is that of its next sampled token in the completion, from 0. `history` holds the
    row's prompt, of `prompt_length` tokens, and what the host knows of its completion; it may
    lack the token that the next step takes in, which the sampler is given then. `masked` rows
    sample under the mask of allowed tokens that each call brings.
    """

    params: SamplingParams
    choice: int
    position: int
    history: Sequence[int] = ()
    prompt_length: int = 0
    masked: bool = False

    @property
    def past(self) -> Sequence[int]:
        """The tokens before the one that the next step takes in."""
        return self.history[: self.prompt_length + self.position - 1]


def is_greedy(params: SamplingParams) -> bool:
    """Say whether the likeliest token is taken."""
    return params.temperature < GREEDY_BELOW


@dataclass(frozen=True, slots=True)
class Parameters:
    """Rows [B] packed. `floats` float32 [B, 8]; `ints` int32 [B, 12], columns as in `Column`.

    `history` int32 [N], `bias_tokens` int32 [M] and `bias_values` float32 [M] hold the parts of
    all rows one after another, with unused elements at the end.
    """

    rows: tuple[RowSampling, ...]
    vocab_size: int
    floats: mx.array
    ints: mx.array
    history: mx.array
    bias_tokens: mx.array
    bias_values: mx.array
    adjusted: tuple[int, ...]  # rows with penalties, bias or a mask, in scratch order
    top_logprobs: int | None  # the most that any row asks for

    @property
    def size(self) -> int:
        """Rows."""
        return len(self.rows)

    @property
    def penalised(self) -> bool:
        """Whether any row has penalties, so that every call needs its input tokens."""
        return any(row.params.penalised for row in self.rows)

    @property
    def masked(self) -> bool:
        """Whether any row samples under a mask, so that every call needs one."""
        return any(row.masked for row in self.rows)


def pack(rows: Iterable[RowSampling], vocab_size: int) -> Parameters:
    """Pack a batch's rows, in order. Runs on the host; waits for nothing on the device."""
    batch = tuple(rows)
    histories: list[Any] = [row.past if row.params.penalised else () for row in batch]
    biases = [row.params.logit_bias for row in batch]
    adjusted = tuple(
        index
        for index, row in enumerate(batch)
        if row.params.penalised or row.params.logit_bias or row.masked
    )
    asked = [row.params.logprobs for row in batch if row.params.logprobs is not None]
    return Parameters(
        batch,
        vocab_size,
        mx.array(np.array([_floats(row.params) for row in batch], dtype=np.float32)),
        mx.array(_ints(batch, vocab_size, histories, adjusted)),
        _join(histories, np.int32),
        _join([[token for token, _ in bias] for bias in biases], np.int32),
        _join([[value for _, value in bias] for bias in biases], np.float32),
        adjusted,
        min(max(asked), vocab_size) if asked else None,
    )


def _floats(params: SamplingParams) -> list[float]:
    used = [
        1.0 if is_greedy(params) else params.temperature,
        params.top_p,
        math.log(params.min_p) if params.min_p > 0.0 else -math.inf,
        params.repetition_penalty,
        params.presence_penalty,
        params.frequency_penalty,
    ]
    return used + [0.0] * (_FLOAT_COLUMNS - len(used))


def _ints(
    rows: tuple[RowSampling, ...],
    vocab_size: int,
    histories: list[Any],
    adjusted: tuple[int, ...],
) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Fill the columns; words of more than 31 bits keep their bits."""
    table = np.zeros((len(rows), len(Column)), dtype=np.int64)
    for values, row in zip(table, rows, strict=True):
        params = row.params
        values[Column.FLAGS] = _flags(row)
        values[Column.TOP_K] = min(params.top_k or vocab_size, vocab_size)
        values[Column.LOGPROBS] = (
            -1 if params.logprobs is None else min(params.logprobs, vocab_size)
        )
        values[Column.STREAM_FIRST : Column.POSITION] = stream_key(params.seed, row.choice)
        values[Column.POSITION] = row.position
    table[:, Column.SCRATCH_ROW] = -1
    table[list(adjusted), Column.SCRATCH_ROW] = range(len(adjusted))
    ends = np.cumsum([len(history) for history in histories])
    begins = ends - [len(history) for history in histories]
    prompts = [min(row.prompt_length, len(h)) for row, h in zip(rows, histories, strict=True)]
    table[:, Column.HISTORY_BEGIN], table[:, Column.HISTORY_END] = begins, ends
    table[:, Column.PROMPT_END] = begins + prompts
    biases = np.array([len(row.params.logit_bias) for row in rows])
    table[:, Column.BIAS_END] = np.cumsum(biases)
    table[:, Column.BIAS_BEGIN] = table[:, Column.BIAS_END] - biases
    return table.astype(np.uint32).view(np.int32)


def _flags(row: RowSampling) -> Flag:
    flags = Flag(0)
    if is_greedy(row.params):
        flags |= Flag.GREEDY
    if row.params.penalised:
        flags |= Flag.PENALISED
    if row.masked:
        flags |= Flag.MASKED
    return flags


def _join(parts: list[Any], dtype: Any) -> mx.array:  # noqa: ANN401 - a NumPy scalar type
    arrays = [np.asarray(part, dtype=dtype) for part in parts if len(part)]
    arrays.append(np.zeros(_SHORTEST, dtype=dtype))
    return mx.array(np.concatenate(arrays))
