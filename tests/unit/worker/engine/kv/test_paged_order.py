"""Where only data orders kernels, as on Metal, readers of blocks wait for who wrote them."""

from array import array
from collections.abc import Callable
from typing import Any, cast

import mlx.core as mx
import pytest

from benchmarks.lib.synthetic import build_model
from mlx_serving.worker.engine.interface import Request, SamplingParams
from mlx_serving.worker.engine.kv.choice import MIXED_READS, paged_choice
from mlx_serving.worker.engine.kv.interface import Prompt
from mlx_serving.worker.engine.kv.paged import cache as cache_module
from mlx_serving.worker.engine.kv.paged import pools as pools_module
from mlx_serving.worker.engine.kv.paged.cache import BLOCK_TOKENS, PagedCache
from mlx_serving.worker.engine.kv.paged.kernel_ops import KernelOps
from mlx_serving.worker.engine.kv.paged.layers import PagedLayer
from mlx_serving.worker.engine.kv.paged.reference import ReferenceOps
from mlx_serving.worker.engine.kv.prefix.cache import PrefixCache
from mlx_serving.worker.engine.kv.prefix.index import PrefixIndex, PrefixKey
from tests.support.engine_support import drive
from tests.support.unordered import Unordered, engine_on
from tests.unit.worker.engine.kv.test_paged_pools import SHAPES

SAMPLED = SamplingParams(1.0, top_p=0.95, seed=9)


class Watch:
    """Notes for each reader of blocks whether what was launched before had been waited for."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.running = False
        self.seen: list[tuple[str, bool]] = []
        self.steps = self.waits = 0
        self._patch = patch
        patch.setattr(mx, "synchronize", self._waited)
        self._wrap(PagedCache, "step", after=self._began)
        self._wrap(PagedCache, "_append", after=self._began)
        for owner, name in (
            (cache_module, "gather_blocks"), (PagedLayer, "store"), (pools_module, "resize")
        ):  # fmt: skip
            self._wrap(owner, name, before=self._note(name))
        for name in ("park", "resume"):
            self._wrap(PagedCache, name, after=self._note(name))

    def _wrap(
        self,
        owner: Any,
        name: str,
        *,
        before: Callable[[], None] = lambda: None,
        after: Callable[[], None] = lambda: None,
    ) -> None:
        real = getattr(owner, name)

        def call(*arguments: Any, **named: Any) -> Any:
            before()
            result = real(*arguments, **named)
            after()
            return result

        self._patch.setattr(owner, name, call)

    def _note(self, name: str) -> Callable[[], None]:
        return lambda: self.seen.append((name, not self.running))

    def _began(self) -> None:
        self.running = True
        self.steps += 1

    def _waited(self) -> None:
        self.running = False
        self.waits += 1

    @property
    def readers(self) -> set[str]:
        return {name for name, _ in self.seen}

    @property
    def too_early(self) -> set[str]:
        return {name for name, waited in self.seen if not waited}


def requests() -> list[Request]:
    """Prompts that know each other's beginnings, one that is long, one that others give way to."""
    shared = tuple(range(90))
    return [
        Request("a", (*shared, 1), SAMPLED, 60),
        Request("b", (*shared, 2, 3), SAMPLED, 60, lane="bulk"),
        Request("c", (6, 7), SAMPLED, 60, lane="bulk"),
        Request("d", (*shared[:75], 4, 5), SAMPLED, 8, lane="interactive"),
        Request("e", (*shared, 1, 7), SAMPLED, 8, lane="interactive"),
        Request("long", tuple(n % 251 for n in range(2500)), SAMPLED, 12),
    ]


def test_every_reader_of_blocks_waits_for_the_steps_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = engine_on(Unordered)
    assert not engine.mixes_prompts
    expected = drive(engine_on(ReferenceOps), requests(), every=3)
    watch = Watch(monkeypatch)
    collected = drive(engine, requests(), every=3)
    assert watch.readers == {"gather_blocks", "store", "resize", "park", "resume"}
    assert watch.too_early == set()
    for name, row in expected.items():
        assert collected[name].token_ids == row.token_ids


def test_the_copy_of_a_block_that_is_known_in_part_waits_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watch = Watch(monkeypatch)
    cache = PagedCache(build_model(), SHAPES, Unordered())
    prefixes = PrefixCache(PrefixIndex(BLOCK_TOKENS), BLOCK_TOKENS, limit=100, idle_limit=50)
    cache.use_prefixes(prefixes)
    for number in range(2):
        context = [7] * 80 + [number] * 40
        key = PrefixKey(b"", array("i", context).tobytes())
        blocks, found = prefixes.pin(key)
        cache.enter([Prompt(context, key, found, blocks)])
        prefixes.unpin(blocks)
        mx.async_eval(cache.step(mx.ones((number + 1,), dtype=mx.int32)))
    assert found == 80
    assert ("store", True) in watch.seen
    assert watch.too_early == set()


def test_decode_steps_wait_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_on(Unordered)
    for number in range(3):
        engine.add(Request(str(number), (number, 1), SAMPLED, 40))
    for _ in range(4):
        engine.step()
    watch = Watch(monkeypatch)
    for _ in range(20):
        engine.step()
    assert (watch.steps, watch.waits) == (20, 0)


def test_where_the_stream_orders_kernels_nothing_waits_for_known_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = engine_on(ReferenceOps)
    object.__setattr__(cast("Any", engine._scheduler._prompts)._limits, "mixed_reads", 0)
    watch = Watch(monkeypatch)
    drive(engine, requests(), every=3)
    assert {"gather_blocks", "store"} <= watch.too_early


def test_what_orders_kernels_decides_whether_steps_compute_prompts() -> None:
    model = build_model()
    assert paged_choice(model, ReferenceOps()).mixed_reads == MIXED_READS
    assert paged_choice(model, Unordered()).mixed_reads == 0


@pytest.mark.parametrize(("language", "ordered"), [("cuda", True), ("metal", False)])
def test_metal_alone_orders_kernels_by_data(
    language: Any,
    ordered: bool,  # noqa: FBT001 - parametrized
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = "mlx_serving.worker.engine.kv.paged.kernel_ops._make"
    monkeypatch.setattr(module, lambda *_: None)
    assert KernelOps(language).ordered_by_stream is ordered
