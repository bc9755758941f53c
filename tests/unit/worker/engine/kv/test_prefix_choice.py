"""Which index is chosen, whether there is a prefix cache at all, and what is said about it."""

from types import SimpleNamespace
from typing import Any

import pytest

from mlx_serving.worker.engine.kv.prefix import choice
from mlx_serving.worker.engine.kv.prefix.cache import PrefixCache
from mlx_serving.worker.engine.kv.prefix.index import PrefixIndex
from mlx_serving.worker.engine.memory.guard import MemoryRoom
from mlx_serving.worker.engine.memory.kv_caches import KvMemory
from mlx_serving.worker.engine.native import load_native
from mlx_serving.worker.models.loading import LoadedModel


class _Hasty(PrefixIndex):
    """Says that one token more is known than is."""

    def match(self, salt: bytes, tokens: bytes) -> tuple[list[int], int]:
        blocks, known = super().match(salt, tokens)
        return blocks, known + (known % 3 == 1)


class _Broken(PrefixIndex):
    def evict(self, count: int) -> list[int]:
        msg = f"can't evict {count}"
        raise RuntimeError(msg)


def _pretend(monkeypatch: pytest.MonkeyPatch, native: Any) -> None:
    monkeypatch.setattr(choice, "load_native", lambda: (native, "built"))


def test_an_index_that_agrees_with_its_twin_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, SimpleNamespace(PrefixIndex=PrefixIndex))
    _, report = choice.choose_prefix_index(prefer_native=True)
    assert str(report) == "prefix index: native (self-check passed)"


@pytest.mark.parametrize(
    ("native", "reason"),
    [
        (SimpleNamespace(PrefixIndex=_Hasty), "its blocks differ from the twin's"),
        (SimpleNamespace(PrefixIndex=_Broken), "RuntimeError: can't evict"),
        (SimpleNamespace(), "AttributeError"),
    ],
)
def test_one_that_differs_is_replaced_by_its_twin(
    monkeypatch: pytest.MonkeyPatch, native: Any, reason: str
) -> None:
    _pretend(monkeypatch, native)
    make, report = choice.choose_prefix_index(prefer_native=True)
    assert make is PrefixIndex
    assert report.implementation == "twin"
    assert report.reason.startswith("the native piece failed its self-check: ")
    assert reason in report.reason


def test_the_setting_switches_native_off() -> None:
    make, report = choice.choose_prefix_index(prefer_native=False)
    assert make is PrefixIndex
    assert str(report) == "prefix index: twin (switched off by the settings)"


@pytest.mark.skipif(load_native()[0] is None, reason="mlx_serving._native is not built")
def test_the_module_that_was_built_passes() -> None:
    _, report = choice.choose_prefix_index(prefer_native=True)
    assert report.implementation == "native"


@pytest.mark.parametrize(
    ("block_tokens", "idle_tokens", "reason"),
    [
        (0, None, "the KV cache keeps no blocks that could be shared; every prompt is computed"),
        (32, 0, "switched off by the settings"),
    ],
)
def test_an_engine_that_goes_without_says_why(
    block_tokens: int, idle_tokens: int | None, reason: str
) -> None:
    prefixes, report = choice.make_prefix_cache(
        block_tokens, 1000, idle_tokens, prefer_native=False
    )
    assert prefixes is None
    assert str(report) == f"prefix cache: off ({reason})"


@pytest.mark.parametrize("prefixes", [None, PrefixCache(PrefixIndex(4), 4, 8, 4)])
def test_a_claim_is_told_whether_the_model_keeps_prefixes(prefixes: PrefixCache | None) -> None:
    anything: Any = None
    engine: Any = SimpleNamespace(kv_memories=(KvMemory(anything, MemoryRoom(), 1, prefixes),))
    loaded = LoadedModel(engine, anything, anything, anything)
    assert loaded.keeps_prefixes is (prefixes is not None)
