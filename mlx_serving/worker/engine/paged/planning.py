"""What a step of the paged cache is given: which row reads which blocks, and in what pieces.

A prompt's tokens may be computed in the step of the decoding rows (piggybacked prefill: Agrawal et
al., Sarathi, 2023). Each of them is a row of the step, with its prompt's blocks and its own
position: so it attends to what stands before it, and no kernel knows of prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import mlx.core as mx
import numpy as np

from mlx_serving.worker.engine.paged.layers import StepPlan
from mlx_serving.worker.engine.paged.step import round_up, round_up_rows, round_up_to_power

# Rows are one item of work each, until one is longer than this; then all are cut into chunks.
# (Measured: a second launch to join the parts costs more than it saves before that.)
SPLIT_ABOVE_TOKENS: Final = 2048
CHUNK_TOKENS: Final = 1024
MIXED_ROWS: Final = 64  # a step that computes prompts has a multiple of so many rows
_LEAST_TABLE_WIDTH: Final = 16  # blocks
_ITEMS: Final = 32  # items of work are padded to multiples of so many
_END: Final = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Context:
    """What the next step computes of a row's context: `tokens`, from position `first` on."""

    row: int
    first: int
    tokens: list[int]


@dataclass(frozen=True, slots=True)
class BatchRows:
    """Each row's blocks, and its tokens, int32 [R], before the step; `spare`: nobody's block."""

    blocks: Sequence[Sequence[int]]
    lengths: np.ndarray
    spare: int


def make_plan(batch: BatchRows, contexts: Sequence[Context], after: mx.array) -> StepPlan:
    """Plan a step of these rows, then of their contexts' tokens in order, then of nobody's.

    `after`: int32 [1], 0; what it depends on comes before the step.
    """
    rows = len(batch.blocks)
    owners = np.concatenate([np.arange(rows), *_owners(contexts)]).astype(np.int32)
    size = round_up(owners.size, MIXED_ROWS) if contexts else round_up_rows(rows)
    width = max(_LEAST_TABLE_WIDTH, round_up_to_power(max(map(len, batch.blocks))))
    table = np.full((size, width), batch.spare, dtype=np.int32)
    for index, blocks in enumerate(batch.blocks):
        table[index, : len(blocks)] = blocks
    table[rows : owners.size] = table[owners[rows:]]
    lengths, advance = np.zeros((2, size), dtype=np.int32)
    lengths[: owners.size] = np.concatenate([batch.lengths, *_positions(contexts)])
    advance[:rows] = 1
    work, firsts = plan_work(lengths.tolist())
    mx.async_eval(after)  # by itself: see `ModelRunner._forward`
    return StepPlan(
        mx.array(table),
        # So that a step comes after every store, and begins with a sum as every other does.
        mx.array(lengths) + after,
        mx.array(advance),
        mx.array(work, dtype=mx.int32),
        mx.array(firsts, dtype=mx.int32),
        split=len(work) > size,
        mixed=bool(contexts),
    )


def _owners(contexts: Sequence[Context]) -> list[np.ndarray]:
    return [np.full(len(context.tokens), context.row) for context in contexts]


def _positions(contexts: Sequence[Context]) -> list[np.ndarray]:
    return [context.first + np.arange(len(context.tokens)) for context in contexts]


def plan_work(lengths: Sequence[int]) -> tuple[list[tuple[int, int, int]], list[int]]:
    """Return the items of work of rows of such lengths, and each row's first; see `StepPlan`."""
    if max(lengths) <= SPLIT_ABOVE_TOKENS:
        return [(row, 0, _END) for row in range(len(lengths))], list(range(len(lengths) + 1))
    work: list[tuple[int, int, int]] = []
    firsts = [0]
    for row, length in enumerate(lengths):
        starts = range(0, max(1, length), CHUNK_TOKENS)
        work += [(row, start, start + CHUNK_TOKENS) for start in starts[:-1]]
        work.append((row, starts[-1], _END))
        firsts.append(len(work))
    return work + [(-1, 0, 0)] * (-len(work) % _ITEMS), firsts
