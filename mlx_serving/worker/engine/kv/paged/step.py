"""One decode step on paged layers: its plan, and the compiled function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, Final

import mlx.core as mx
import numpy as np

from mlx_serving.worker.engine.kv.paged.layers import PagedLayer, PagedOps, StepPlan

if TYPE_CHECKING:
    from mlx_serving.worker.engine.kv.padded import LanguageModel

# Each row is one item of work, until a row is longer than this; then all are cut into chunks.
# (Measured: for shorter rows, the second launch that joins the parts costs more than it saves.)
SPLIT_ABOVE_TOKENS: Final = 2048
CHUNK_TOKENS: Final = 1024
MIXED_ROWS: Final = 64  # a step that computes prompts is padded to a multiple of so many rows
_LEAST_TABLE_WIDTH: Final = 16  # blocks
_ITEMS: Final = 32  # items of work are padded to multiples of so many
_END: Final = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Context:
    """The part of a row's context that the next step computes, from position `first` on."""

    row: int
    first: int
    tokens: list[int]


@dataclass(frozen=True, slots=True)
class BatchRows:
    """Each row's blocks, its length int32 [R] before the step, and the padding block."""

    blocks: Sequence[Sequence[int]]
    lengths: np.ndarray
    padding_block: int


def make_plan(batch: BatchRows, contexts: Sequence[Context], after: mx.array) -> StepPlan:
    """Plan a step of these rows, then of their contexts' tokens in order, then of padding.

    `after`: int32 [1], 0; the step runs after the work that it depends on.
    """
    rows = len(batch.blocks)
    owners = np.concatenate([np.arange(rows), *_owners(contexts)]).astype(np.int32)
    size = round_up(owners.size, MIXED_ROWS) if contexts else round_up_rows(rows)
    width = max(_LEAST_TABLE_WIDTH, round_up_to_power(max(map(len, batch.blocks))))
    table = np.full((size, width), batch.padding_block, dtype=np.int32)
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
        # So the step runs after every store, and begins with a sum as every other step.
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
    """Return the items of work for rows of these lengths, and each row's first; see `StepPlan`."""
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


STEP_ROWS: Final = 8  # batch sizes are multiples of it, or a smaller power of two


StepFunction = Callable[[mx.array, StepPlan, Sequence[PagedLayer]], tuple[mx.array, mx.array]]


"""From tokens int32 [B], a plan and layers to logits [B, V] and the next step's lengths [B]."""


def round_up_rows(rows: int) -> int:
    """Return the batch size, padding included, for so many rows."""
    if rows <= STEP_ROWS:
        return round_up_to_power(rows)
    return round_up(rows, STEP_ROWS)


def round_up(count: int, multiple: int) -> int:
    """Return the least multiple that is not below `count`."""
    return -(-count // multiple) * multiple


def round_up_to_power(count: int) -> int:
    """Return the least power of two that is not below `count` (at least 1)."""
    return 1 << (count - 1).bit_length()


def plain_step(model: LanguageModel) -> StepFunction:
    """Return a step that Python builds anew each time."""

    def step(
        tokens: mx.array, plan: StepPlan, layers: Sequence[PagedLayer]
    ) -> tuple[mx.array, mx.array]:
        for layer in layers:
            layer.plan = plan
        return model(tokens[:, None], cache=list(layers))[:, -1], plan.lengths + plan.advance

    return step


def compiled_step(model: LanguageModel, ops: PagedOps) -> StepFunction:
    """Return the compiled step; `ops` work in place, so the only outputs are the results."""
    plain = plain_step(model)

    def traced(split: bool, mixed: bool) -> Callable[..., Any]:  # noqa: FBT001 - one a value
        def run(tokens: mx.array, arrays: list[mx.array], pools: list[mx.array]) -> Any:  # noqa: ANN401
            pairs = zip(pools[::2], pools[1::2], strict=True)
            layers = [PagedLayer(ops, keys, values) for keys, values in pairs]
            table, lengths, advance, work, firsts = arrays
            plan = StepPlan(table, lengths, advance, work, firsts, split=split, mixed=mixed)
            return plain(tokens, plan, layers)

        compiled: Callable[..., Any] = mx.compile(run)
        return compiled

    kinds = product((False, True), repeat=2)
    runs = {(split, mixed): traced(split, mixed) for split, mixed in kinds}

    def step(
        tokens: mx.array, plan: StepPlan, layers: Sequence[PagedLayer]
    ) -> tuple[mx.array, mx.array]:
        arrays = [plan.table, plan.lengths, plan.advance, plan.work, plan.firsts]
        pools = [view for layer in layers for view in layer.views]
        logits, lengths = runs[plan.split, plan.mixed](tokens, arrays, pools)
        return logits, lengths

    return step
