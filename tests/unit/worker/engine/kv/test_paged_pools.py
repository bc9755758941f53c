"""The pools of the paged cache grow before rows need it, and no step waits for all of them."""

import dataclasses
from array import array
from typing import Any, cast

import mlx.core as mx
import pytest

from benchmarks.lib.synthetic import build_model
from mlx_serving.worker.engine.kv.interface import Prompt
from mlx_serving.worker.engine.kv.paged import pools as pools_module
from mlx_serving.worker.engine.kv.paged.block_allocator import BlockAllocator
from mlx_serving.worker.engine.kv.paged.cache import BLOCK_TOKENS, PagedCache
from mlx_serving.worker.engine.kv.paged.layers import PagedLayer
from mlx_serving.worker.engine.kv.paged.pools import LEFT_BYTES, LayerShape, Pools
from mlx_serving.worker.engine.kv.paged.reference import ReferenceOps
from mlx_serving.worker.engine.kv.prefix.cache import PrefixCache
from mlx_serving.worker.engine.kv.prefix.index import PrefixIndex, PrefixKey

SHAPES = [LayerShape(2, 16, mx.float32)] * 2
ROWS = 30


@pytest.fixture
def cache() -> PagedCache:
    """As many rows, each one token before the end of its first block."""
    made = PagedCache(build_model(), SHAPES, ReferenceOps())
    made.enter([Prompt([1] * (BLOCK_TOKENS - 1), PrefixKey(b"", b"")) for _ in range(ROWS)])
    return made


def test_rows_that_all_want_a_block_at_once_find_it(
    cache: PagedCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed: list[int] = []
    monkeypatch.setattr(Pools, "need", lambda _, blocks: needed.append(blocks))
    sizes = set()
    for _ in range(5 * BLOCK_TOKENS):
        mx.eval(cache.step(mx.ones((ROWS,), dtype=mx.int32)))
        sizes.add(tuple(layer.keys.shape[0] for layer in cache.layers))
        assert cache.blocks - cache.allocator.used <= 2 * ROWS + 8
    assert needed == []
    assert any(len(set(layers)) > 1 for layers in sizes), "layers grow in different steps"
    assert len(sizes) > 4


def test_what_is_in_use_stays_where_it_is_while_layers_grow() -> None:
    pools = Pools(SHAPES, BLOCK_TOKENS, ReferenceOps())
    pools.need(3)
    held = [mx.random.normal(layer.keys.shape, key=mx.random.key(n)) for n, layer in
            enumerate(pools.layers)]  # fmt: skip
    for layer, keys in zip(pools.layers, held, strict=True):
        layer.keys = keys
    pools.grow_ahead(5)
    assert [layer.keys.shape[0] for layer in pools.layers] == [5, 3]
    assert pools.blocks == 3
    pools.grow_ahead(5)
    assert pools.blocks == 5
    for layer, keys in zip(pools.layers, held, strict=True):
        assert mx.array_equal(layer.keys[:3], keys).item()
        assert not layer.keys[3:].any().item()


def test_a_burst_takes_idle_blocks_before_the_pools_grow() -> None:
    """What was used least recently is given up; the step waits for no copy of the pools."""
    cache = PagedCache(build_model(), SHAPES, ReferenceOps())
    prefixes = PrefixCache(PrefixIndex(BLOCK_TOKENS), BLOCK_TOKENS, limit=1000, idle_limit=500)
    cache.use_prefixes(prefixes)
    for number in range(30):  # two blocks each
        prompt = prompt_of(number)
        cache.enter([prompt])
        mx.eval(cache.step(mx.ones((1,), dtype=mx.int32)))
        cache.remember(0, prompt.key)
        cache.keep([])
    blocks, idle = cache.blocks, prefixes.idle
    free = blocks - prefixes.used
    assert idle >= 60
    burst = [prompt_of(100 + number) for number in range(free // 2 + 3)]
    cache.enter(burst)
    assert cache.blocks == blocks
    assert idle - 7 <= prefixes.idle < idle
    assert not prefixes.find(prompt_of(0).key)
    assert len(prefixes.find(prompt_of(29).key)) == 2
    prefixes.check()


def test_what_is_known_is_not_given_up_for_a_large_prompt_nor_for_one_that_is_known() -> None:
    """Two conversations in turn, in pools that are small beside what they may become.

    The model attends to nothing: each of a step's 3,200 tokens would read its prompt's blocks.
    """
    cache = PagedCache(lambda tokens, cache: mx.zeros((*tokens.shape, 1)), SHAPES, ReferenceOps())  # noqa: ARG005 - the model's own names
    prefixes = PrefixCache(PrefixIndex(BLOCK_TOKENS), BLOCK_TOKENS, limit=1000, idle_limit=500)
    cache.use_prefixes(prefixes)
    for turn in range(4):
        prompt = prompt_of(turn % 2, blocks=100)
        pins, found = prefixes.pin(prompt.key)
        assert found == (100 * BLOCK_TOKENS if turn > 1 else 0)
        cache.enter([dataclasses.replace(prompt, cached_tokens=found, cached_blocks=pins)])
        prefixes.unpin(pins)
        mx.eval(cache.step(mx.ones((1,), dtype=mx.int32)))
        cache.remember(0, prompt.key)
        cache.keep([])
    prefixes.check()


class LateOps(ReferenceOps):
    """Stores as a kernel does: in place, once the launch comes."""

    def __init__(self) -> None:
        self.waiting: list[tuple[PagedLayer, mx.array]] = []

    def store(self, layer: PagedLayer, *rest: Any) -> mx.array:
        self.waiting.append((layer, layer.keys))
        return super().store(layer, *rest)


def test_pools_are_copied_with_all_that_was_to_be_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    ops = LateOps()
    paged = PagedCache(build_model(), SHAPES, ops)
    launched = mx.async_eval
    late: list[PagedLayer] = []

    def launch(*arrays: Any) -> None:
        if any(array is paged._stored for array in arrays):
            ops.waiting.clear()
        launched(*arrays)

    monkeypatch.setattr(mx, "async_eval", launch)
    real = cast("Any", pools_module).resize

    def resize(layers: Any, *rest: Any, **options: Any) -> None:
        late.extend(layer for layer, _ in ops.waiting if layer in layers)
        real(layers, *rest, **options)

    monkeypatch.setattr(pools_module, "resize", resize)
    prefixes = PrefixCache(PrefixIndex(BLOCK_TOKENS), BLOCK_TOKENS, limit=1000, idle_limit=500)
    paged.use_prefixes(prefixes)
    copies = 0
    for number in range(40):  # a block and a half of each is known
        context = [7] * 48 + [number] * 48
        key = PrefixKey(b"", array("i", context).tobytes())
        pins, found = prefixes.pin(key)
        paged.enter([Prompt(context, key, found, pins)])
        copies += bool(ops.waiting)
        prefixes.unpin(pins)
        mx.eval(paged.step(mx.ones((number + 1,), dtype=mx.int32)))
    assert copies > 30
    assert late == []


@pytest.mark.parametrize("number", [28, 3])
def test_all_layers_grow_ahead_while_need_moves_on(number: int) -> None:
    pools = Pools(SHAPES[:1] * number, BLOCK_TOKENS, ReferenceOps())
    pools.need(100)
    for step in range(60):
        pools.grow_ahead(110 + 2 * step)
    assert pools.blocks >= 110 + 2 * 30
    assert max(layer.keys.shape[0] for layer in pools.layers) == 110 + 2 * 59


def prompt_of(number: int, blocks: int = 2) -> Prompt:
    context = [number] * (blocks * BLOCK_TOKENS)
    return Prompt(context, PrefixKey(b"", array("i", context).tobytes()))


def test_a_plain_allocator_has_nothing_to_give_up() -> None:
    allocator = BlockAllocator(10)
    blocks = allocator.allocate(4)
    allocator.reclaim(3)
    assert allocator.used == len(blocks)


def test_reclaimed_blocks_are_the_ones_used_least_recently() -> None:
    prefixes = PrefixCache(PrefixIndex(4), 4, limit=100, idle_limit=50)
    keys = []
    for number in range(3):
        (block,) = prefixes.allocate(1)
        keys.append(PrefixKey(b"", array("i", [number] * 4).tobytes()))
        prefixes.insert(keys[-1], [block])
        prefixes.free([block])
    prefixes.reclaim(2)
    assert [len(prefixes.find(key)) for key in keys] == [0, 0, 1]
    prefixes.reclaim(5)
    assert prefixes.used == 0


def test_what_another_row_uses_stays_known_when_a_row_is_forgotten() -> None:
    prefixes = PrefixCache(PrefixIndex(4), 4, limit=100, idle_limit=50)
    keys = [PrefixKey(b"", array("i", range(count)).tobytes()) for count in (8, 12)]
    first = prefixes.allocate(2)
    prefixes.insert(keys[0], first)
    longer = [*prefixes.acquire(keys[1]), *prefixes.allocate(1)]
    prefixes.insert(keys[1], longer)
    assert longer[:2] == first
    prefixes.forget(longer)  # it failed
    prefixes.free(longer)
    assert [prefixes.find(key) for key in keys] == [first, first]
    prefixes.check()


def test_old_pools_may_stay_among_the_cached_buffers_up_to_a_part_of_all() -> None:
    pools = Pools([LayerShape(8, 128, mx.bfloat16)] * 28, BLOCK_TOKENS, ReferenceOps())
    assert pools._may_leave == LEFT_BYTES
    pools.limit(1000)  # 3.4 GiB
    assert pools._may_leave == LEFT_BYTES
    pools.limit(28_000)
    assert pools._may_leave == 28_000 * 32 * 28 * 2 * 8 * 128 * 2 // 16
