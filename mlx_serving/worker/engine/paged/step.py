"""One decode step of an mlx-lm model on paged layers, where possible as one compiled function.

The step is bound by the host: Python builds some twenty operations a layer, then MLX launches
them. `mx.compile` keeps what was built. It starts afresh for every new shape, so a batch is padded
to one of a few sizes, tables grow by doubling, and a pool is handed in as a view of its first
block, which stands for the whole buffer: the kernels take its address.
"""

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, Final

import mlx.core as mx

from mlx_serving.worker.engine.cache.kv_cache import LanguageModel
from mlx_serving.worker.engine.paged.layers import PagedLayer, PagedOps, StepPlan

STEP_ROWS: Final = 8  # batch sizes are multiples of it, or a smaller power of two

Step = Callable[[mx.array, StepPlan, Sequence[PagedLayer]], tuple[mx.array, mx.array]]
"""From tokens int32 [B], a plan and layers to logits [B, V] and the next step's lengths [B]."""


def round_up_rows(rows: int) -> int:
    """Return the batch size that so many rows are computed in."""
    if rows <= STEP_ROWS:
        return round_up_to_power(rows)
    return round_up(rows, STEP_ROWS)


def round_up(count: int, multiple: int) -> int:
    """Return the least multiple that is not below `count`."""
    return -(-count // multiple) * multiple


def round_up_to_power(count: int) -> int:
    """Return the least power of two that is not below `count` (at least 1)."""
    return 1 << (count - 1).bit_length()


def plain_step(model: LanguageModel) -> Step:
    """Return the step as Python builds it each time."""

    def step(
        tokens: mx.array, plan: StepPlan, layers: Sequence[PagedLayer]
    ) -> tuple[mx.array, mx.array]:
        for layer in layers:
            layer.plan = plan
        return model(tokens[:, None], cache=list(layers))[:, -1], plan.lengths + plan.advance

    return step


def compiled_step(model: LanguageModel, ops: PagedOps) -> Step:
    """Return the step compiled; `ops` work in place, so that nothing but results comes out."""
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
