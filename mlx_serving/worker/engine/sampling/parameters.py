"""The sampler's parameters, as arrays on the device (no value is compiled in), and its draws."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from functools import cache
from itertools import accumulate
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import mlx.core as mx
import numpy as np

from mlx_serving.worker.engine.sampling.noise import stream_key

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from mlx_serving.worker.engine.interface import SamplingParams


class StepInputs(NamedTuple):
    """The inputs of one call.

    `step`: the number of calls since the parameters were packed. `tokens` int32 [B]: the model's
    input tokens of this call. `state` int32 [B, C]: in each row, `step` and the input tokens of the
    calls before; with `tokens`, they complete the packed history. `mask` int32 [B, ceil(V / 32)]:
    bit t % 32 of word t / 32 is set if token t is allowed (llguidance's layout).
    """

    step: int
    tokens: mx.array
    state: mx.array
    mask: mx.array | None


class Logprobs(NamedTuple):
    """Natural log probabilities under the model's own distribution.

    `chosen` float32 [B]; `top_tokens` int32 [B, K] and `top` float32 [B, K], likeliest first, of
    equals the lowest id first. A row's values beyond those that it asked for are undefined.
    """

    chosen: mx.array
    top_tokens: mx.array
    top: mx.array


class Draws(NamedTuple):
    """`tokens` int32 [B]; `logprobs` if any row asked for them; `state` of the next call."""

    tokens: mx.array
    logprobs: Logprobs | None
    state: mx.array

    @property
    def arrays(self) -> list[mx.array]:
        """All arrays to evaluate."""
        return [self.tokens, self.state, *(self.logprobs or ())]


class Draw(Protocol):
    """One implementation, made for one batch's parameters."""

    def __call__(self, logits: mx.array, inputs: StepInputs) -> Draws:
        """Draw one token for each row from logits [B, V] of any float dtype."""


GREEDY_BELOW: Final = 1e-5  # a lower temperature counts as 0


# Metal passes arrays of fewer elements to a kernel in another address space.
_SHORTEST: Final = 8
_NO_LOGPROBS: Final = (1 << 32) - 1  # -1 as a word


class Column(IntEnum):
    """Columns of `Parameters.table`: the bits of floats, then integers."""

    TEMPERATURE = 0
    TOP_P = 1
    LOG_MIN_P = 2
    REPETITION = 3
    PRESENCE = 4
    FREQUENCY = 5
    FLAGS = 6
    TOP_K = 7
    LOGPROBS = 8  # -1: not asked for
    TOP_LOGPROBS = 9  # the most that any row of the batch asks for
    STREAM_FIRST = 10
    STREAM_SECOND = 11
    POSITION = 12  # of the token that the first call samples
    SCRATCH_ROW = 13  # -1: the model's logits are used as they are
    HISTORY_BEGIN = 14  # places in `Parameters.lists`, from here on
    PROMPT_END = 15
    HISTORY_END = 16
    BIAS_BEGIN = 17
    BIAS_VALUES = 18
    BIAS_COUNT = 19


class Flag(IntFlag):
    """Bits of `Column.FLAGS`."""

    GREEDY = 1
    PENALISED = 2
    MASKED = 4


_GREEDY, _PENALISED, _MASKED = map(int, Flag)


@dataclass(frozen=True, slots=True)
class RowSampling:
    """One row's sampling: its position in the random stream, and its past for penalties.

    `position`: of the next sampled token in the completion, from 0. `history`: the row's prompt, of
    `prompt_length` tokens, and its completion as far as the host has read it; the next step's input
    token may be missing: the sampler gets it with the call. `masked`: the row's tokens are
    restricted by the mask of each call.
    """

    params: SamplingParams
    choice: int
    position: int
    history: Sequence[int] = ()
    prompt_length: int = 0
    masked: bool = False

    @property
    def past(self) -> Sequence[int]:
        """The tokens before the next step's input token."""
        return self.history[: self.prompt_length + self.position - 1]


def is_greedy(params: SamplingParams) -> bool:
    """Say whether the row takes the likeliest token."""
    return params.temperature < GREEDY_BELOW


@dataclass(frozen=True, slots=True)
class Parameters:
    """Packed rows [B].

    `table` int32 [B, 20], columns as in `Column`. `lists` int32 [N]: the history, the biased tokens
    and the biases (bits of float32) of every row, one after the other.
    """

    rows: tuple[RowSampling, ...]
    vocab_size: int
    table: mx.array
    lists: mx.array
    adjusted: tuple[int, ...]  # rows with penalties, bias or a mask, in scratch order
    top_logprobs: int | None  # the most that any row asks for
    penalised: bool  # any row has penalties: every call needs input tokens
    masked: bool  # any row is masked: every call needs a mask

    @property
    def size(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def floats(self, column: Column) -> mx.array:
        """Return one parameter of every row: float32 [B, 1]."""
        return self.table[:, column : column + 1].view(mx.float32)

    def ints(self, column: Column) -> mx.array:
        """Return one parameter of every row: int32 [B, 1]."""
        return self.table[:, column : column + 1]


def pack(rows: Iterable[RowSampling], vocab_size: int) -> Parameters:
    """Pack a batch's rows, in order. Runs on the host and does not wait for the device."""
    batch = tuple(rows)
    params = [row.params for row in batch]
    adjusted = [
        index
        for index, row in enumerate(batch)
        if row.params.penalised or row.params.logit_bias or row.masked
    ]
    asked = [min(p.logprobs, vocab_size) for p in params if p.logprobs is not None]
    most = max([1, *asked])
    table = np.empty((len(batch), len(Column)), dtype=np.int32)
    table[:, : Column.FLAGS] = np.array([_floats(p) for p in params], np.float32).view(np.int32)
    whole = np.array([_ints(row, vocab_size, most) for row in batch], dtype=np.uint32)
    table[:, Column.FLAGS : Column.SCRATCH_ROW] = whole.view(np.int32)
    table[:, Column.SCRATCH_ROW] = -1
    table[adjusted, Column.SCRATCH_ROW] = range(len(adjusted))
    table[:, Column.HISTORY_BEGIN :] = 0
    return Parameters(
        batch,
        vocab_size,
        lists=_fill_lists([batch[index] for index in adjusted], adjusted, table),
        table=mx.array(table),
        adjusted=tuple(adjusted),
        top_logprobs=max(asked) if asked else None,
        penalised=any(p.penalised for p in params),
        masked=any(row.masked for row in batch),
    )


def _floats(params: SamplingParams) -> tuple[float, ...]:
    """Return the columns before FLAGS."""
    return (
        1.0 if is_greedy(params) else params.temperature,
        params.top_p,
        math.log(params.min_p) if params.min_p > 0.0 else -math.inf,
        params.repetition_penalty,
        params.presence_penalty,
        params.frequency_penalty,
    )


def _ints(row: RowSampling, vocab_size: int, most_logprobs: int) -> tuple[int, ...]:
    """Return the columns from FLAGS to POSITION as 32-bit words."""
    params = row.params
    logprobs = _NO_LOGPROBS if params.logprobs is None else min(params.logprobs, vocab_size)
    top_k = min(params.top_k or vocab_size, vocab_size)
    stream = stream_key(params.seed, row.choice)
    # Plain integers: each operation on an IntFlag takes a microsecond, and this runs for every row.
    flags = _GREEDY if is_greedy(params) else 0
    flags += (_PENALISED if params.penalised else 0) + (_MASKED if row.masked else 0)
    return (flags, top_k, logprobs, most_logprobs, *stream, row.position)


def _fill_lists(rows: list[RowSampling], places: list[int], table: NDArray[np.int32]) -> mx.array:
    """Join the rows' lists; write where each begins and ends into `table`, at `places`."""
    if not rows:
        return _no_lists()
    parts: list[NDArray[np.int32]] = []
    for row in rows:
        bias = row.params.logit_bias
        past = row.past if row.params.penalised else ()
        parts.append(np.asarray(past, dtype=np.int32))
        parts.append(np.array([token for token, _ in bias], dtype=np.int32))
        parts.append(np.array([value for _, value in bias], dtype=np.float32).view(np.int32))
    ends = list(accumulate(len(part) for part in parts))
    for index, (place, row) in enumerate(zip(places, rows, strict=True)):
        history_end, tokens_end, values_end = ends[3 * index : 3 * index + 3]
        history_begin = history_end - len(parts[3 * index])
        prompt_end = min(history_begin + row.prompt_length, history_end)
        bounds = (history_begin, prompt_end, history_end, history_end, tokens_end)
        table[place, Column.HISTORY_BEGIN :] = (*bounds, values_end - tokens_end)
    return mx.array(np.concatenate([*parts, np.zeros(_SHORTEST, dtype=np.int32)]))


@cache
def _no_lists() -> mx.array:
    return mx.zeros(_SHORTEST, dtype=mx.int32)
