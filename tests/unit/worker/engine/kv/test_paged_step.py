"""The step's shapes, its work, and that compiling changes nothing."""

from itertools import pairwise, product
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.lib.synthetic import build_model
from mlx_serving.worker.engine.kv.interface import Prefilled
from mlx_serving.worker.engine.kv.paged import dispatch
from mlx_serving.worker.engine.kv.paged.cache import PagedCache
from mlx_serving.worker.engine.kv.paged.layers import PagedLayer, StepPlan, materialize, resize
from mlx_serving.worker.engine.kv.paged.pools import LayerShape
from mlx_serving.worker.engine.kv.paged.reference import ReferenceOps
from mlx_serving.worker.engine.kv.paged.step import (
    CHUNK_TOKENS,
    SPLIT_ABOVE_TOKENS,
    BatchRows,
    Context,
    compiled_step,
    make_plan,
    plain_step,
    plan_work,
    round_up_rows,
)


@pytest.mark.parametrize(
    ("rows", "batch"), [(1, 1), (2, 2), (3, 4), (5, 8), (8, 8), (9, 16), (57, 64), (64, 64)]
)
def test_batches_come_in_few_sizes(rows: int, batch: int) -> None:
    assert round_up_rows(rows) == batch


@given(st.lists(st.integers(0, 5 * SPLIT_ABOVE_TOKENS), min_size=1, max_size=20))
def test_work_covers_every_row_once(lengths: list[int]) -> None:
    work, firsts = plan_work(lengths)
    assert len(firsts) == len(lengths) + 1
    for row, (first, last) in enumerate(pairwise(firsts)):
        items = work[first:last]
        assert items, "a row without work would have no result"
        assert [item[0] for item in items] == [row] * len(items)
        assert items[0][1] == 0
        assert all(end == start for (_, _, end), (_, start, _) in pairwise(items))
        assert items[-1][2] > 2**30, "the last item has no end, so that the row may grow"
        assert len(items) == 1 or items[-1][1] <= lengths[row]
        assert all(end - start == CHUNK_TOKENS for _, start, end in items[:-1])
    assert all(item == (-1, 0, 0) for item in work[firsts[-1] :])
    if max(lengths) <= SPLIT_ABOVE_TOKENS:
        assert len(work) == len(lengths)


class Forgetful(ReferenceOps):
    """Works in place in that it stores nothing: attention to the step's own token and position."""

    in_place = True

    def store(self, *_: Any) -> mx.array:
        return mx.zeros((1,), mx.int32)

    def attend(
        self,
        layer: PagedLayer,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scale: float,
        plan: StepPlan,
    ) -> mx.array:
        del keys, scale
        assert layer.keys.shape[0] == 1, "one block stands for the pool"
        rows = plan.firsts[1:] - plan.firsts[:-1] + plan.table[:, 0]
        weights = mx.sin(rows + plan.lengths + plan.mixed)[:, None, None, None]
        repeats = queries.shape[1] // values.shape[1]
        return mx.repeat(values, repeats, axis=1) * weights.astype(values.dtype)


@pytest.mark.parametrize("at_once", [0, 1 << 30], ids=["layer by layer", "at once"])
@pytest.mark.parametrize("kept", [None, [2, 0]])
def test_resized_pools_hold_what_they_held(at_once: int, kept: list[int] | None) -> None:
    pools = [mx.random.normal((3, 2, 32, 16), key=mx.random.key(n)) for n in range(6)]
    layers = [
        PagedLayer(Forgetful(), keys, values)
        for keys, values in zip(pools[::2], pools[1::2], strict=True)
    ]
    resize(layers, 5, kept, at_once=at_once)
    for layer, keys, values in zip(layers, pools[::2], pools[1::2], strict=True):
        for new, old in ((layer.keys, keys), (layer.values, values)):
            held = old if kept is None else old[mx.array(kept)]
            assert new.shape == (5, 2, 32, 16)
            assert mx.array_equal(new[: len(held)], held)
            assert not new[len(held) :].any()
        assert mx.array_equal(layer.views[0], layer.keys[:1])


def test_a_compiled_step_is_the_plain_one() -> None:
    model = build_model()
    dispatch.install(model)
    ops = Forgetful()
    pool = mx.zeros((7, 2, 32, 16))
    layers = [PagedLayer(ops, pool, pool) for _ in range(2)]
    materialize(layers)
    views = [PagedLayer(ops, *layer.views) for layer in layers]
    compiled, plain = compiled_step(model, ops), plain_step(model)
    cases = ((4, 3, False), (4, 9, False), (4, 3, True), (2, 5, False))
    for (rows, base, split), mixed in product(cases, (False, True)):
        plan = StepPlan(
            table=mx.arange(rows * 4, dtype=mx.int32).reshape(rows, 4),
            lengths=mx.arange(rows, dtype=mx.int32) + base,
            advance=mx.array([1] * (rows - 1) + [0], dtype=mx.int32),
            work=mx.array([(row, 0, 99) for row in range(rows)], dtype=mx.int32),
            firsts=mx.arange(rows + 1, dtype=mx.int32),
            split=split,
            mixed=mixed,
        )
        tokens = mx.arange(rows, dtype=mx.int32)
        logits, lengths = compiled(tokens, plan, layers)
        expected, expected_lengths = plain(tokens, plan, views)
        assert mx.allclose(logits, expected, rtol=1e-5, atol=1e-5).item()
        assert lengths.tolist() == expected_lengths.tolist()
        assert lengths[-1].item() == rows - 1 + base, "the last row only fills up"


def test_rows_that_pad_a_batch_touch_no_other() -> None:
    """Their tokens go to a block that no row owns."""
    shapes = [LayerShape(2, 16, mx.float32)] * 2
    cache = PagedCache(build_model(), shapes, ReferenceOps())
    for length in (5, 40, 3):
        layers = [_filled(length) for _ in range(2)]
        cache.join(Prefilled(layers, [length], [0]))
    padding_block = cache._padding_block
    assert padding_block is not None
    batch = BatchRows(cache._rows, cache._lengths, padding_block)
    plan = make_plan(batch, [], cache._stored)
    owned = {block for row in cache._rows for block in row}
    assert plan.table.shape[0] == 4
    assert (plan.table[3] == padding_block).all().item()
    assert padding_block not in owned
    assert plan.advance.tolist() == [1, 1, 1, 0]


def test_tokens_of_prompts_are_rows_of_their_own_place() -> None:
    """Each with its prompt's blocks; the step is filled up with nobody's rows."""
    batch = BatchRows([[5], [3, 8], [2]], np.array([9, 40, 2], dtype=np.int32), 7)
    contexts = [Context(1, 37, [11, 12, 13]), Context(2, 0, [21, 22])]
    plan = make_plan(batch, contexts, mx.zeros((1,), mx.int32))
    assert plan.mixed
    assert plan.table.shape[0] == 64
    assert plan.lengths[:9].tolist() == [9, 40, 2, 37, 38, 39, 0, 1, 0]
    assert plan.advance[:9].tolist() == [1, 1, 1, 0, 0, 0, 0, 0, 0]
    assert plan.table[:9, 0].tolist() == [5, 3, 2, 3, 3, 3, 2, 2, 7]
    assert plan.table[3:6, 1].tolist() == [8, 8, 8]
    assert (plan.table[8:] == 7).all().item()


def _filled(tokens: int) -> Any:
    from mlx_lm.models.cache import KVCache

    layer = KVCache()
    block = mx.zeros((1, 2, tokens, 16))
    layer.update_and_fetch(block, block)
    return layer
