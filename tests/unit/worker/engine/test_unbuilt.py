"""A step that can't be built, beside prompts that fail: each row has one end, or goes on."""

from array import array
from typing import Any, cast

import pytest

from mlx_serving.worker.engine.batch_runner import StepNotBuiltError
from mlx_serving.worker.engine.engine import Engine
from mlx_serving.worker.engine.failures import LaunchedWorkError
from mlx_serving.worker.engine.interface import Output, Request, SamplingParams
from mlx_serving.worker.engine.kv.paged.cache import PagedCache
from mlx_serving.worker.engine.model_runner import ModelRunner
from tests.support.engine_support import Collected, drive, tiny_engine

SAMPLED = SamplingParams(1.0, top_p=0.95, seed=5)
EARLY = [Request(f"early{n}", tuple(range(n, n + 40)), SAMPLED, 24) for n in range(2)]
BAD = Request("bad", (7,) * 45, SAMPLED, 24)
LATE = Request("late", tuple(range(100, 145)), SAMPLED, 24)
NO_MEMORY = RuntimeError("[metal::malloc] Resource limit (499000) exceeded.")


class Faults:
    """From now on: what raises, and how often."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._patch = patch

    def add(self, owner: Any, name: str, error: Exception, times: int = 1 << 30) -> list[int]:
        """Return a list that has an entry for each time that it raised."""
        real, raised = getattr(owner, name), list[int]()

        def call(*arguments: Any) -> Any:
            if len(raised) < times:
                raised.append(1)
                raise error
            return real(*arguments)

        self._patch.setattr(owner, name, call)
        return raised


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Faults:
    return Faults(monkeypatch)


def decoding() -> tuple[Engine, dict[str, Collected]]:
    """An engine whose steps compute prompts, in which rows decode."""
    engine = tiny_engine(eos=(), chunk=512, paged=True)
    for request in EARLY:
        engine.add(request)
    collected: dict[str, Collected] = {}
    for _ in range(4):
        collect(engine.step(), collected)
    return engine, collected


def collect(outputs: list[Output], collected: dict[str, Collected]) -> None:
    for output in outputs:
        collected.setdefault(output.request_id, Collected()).add(output)


def finish(engine: Engine, collected: dict[str, Collected]) -> dict[str, list[int]]:
    while engine.has_work:
        collect(engine.step(), collected)
    return {name: row.token_ids for name, row in collected.items()}


def expected(*late: Request) -> dict[str, list[int]]:
    collected = drive(tiny_engine(eos=(), chunk=512, paged=True), [*EARLY, *late])
    return {name: row.token_ids for name, row in collected.items()}


@pytest.mark.parametrize("error", [ValueError(), NO_MEMORY], ids=["ended", "begins again"])
def test_a_prompt_that_failed_is_not_revived_by_the_step(error: Exception, faults: Faults) -> None:
    engine, collected = decoding()
    engine.add(BAD)
    faults.add(PagedCache, "enter", error, times=1)
    faults.add(PagedCache, "step", TypeError(), times=1)
    with pytest.raises(StepNotBuiltError):
        engine.step()
    begins_again = error is NO_MEMORY
    assert (engine.running, engine.waiting) == (2, int(begins_again))
    assert len(cast("Any", engine._runner)._rows) == 2
    tokens = finish(engine, collected)  # the one step was lost, and no row moved
    assert tokens == expected(*[BAD] * begins_again)


def test_of_two_prompts_the_one_that_failed_is_not_revived(
    faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, collected = decoding()
    for request in (BAD, LATE):
        engine.add(request)
    faults.add(PagedCache, "enter", ValueError())
    unbuilt = faults.add(PagedCache, "step", TypeError(), times=1)
    join = PagedCache.join

    def join_others(cache: PagedCache, prefilled: Any) -> None:
        if prefilled.keys[0].tokens.startswith(array("i", BAD.prompt[:9]).tobytes()):
            raise ValueError
        join(cache, prefilled)

    monkeypatch.setattr(PagedCache, "join", join_others)
    tokens = finish(engine, collected)
    assert unbuilt
    assert collected["bad"].error_code == "join_failed"
    assert tokens == {**expected(LATE), "bad": []}
    assert cast("Any", engine._runner)._cache.allocator.used == 0


def test_tokens_are_not_lost_where_a_prompt_hears_that_the_next_step_failed(
    faults: Faults,
) -> None:
    engine, collected = decoding()
    engine.add(LATE)
    faults.add(PagedCache, "step", TypeError(), times=1)
    faults.add(ModelRunner, "prefill", LaunchedWorkError(NO_MEMORY), times=1)
    outputs = engine.step()
    assert [(o.request_id, len(o.token_ids)) for o in outputs] == [("early0", 1), ("early1", 1)]
    assert (engine.running, engine.waiting) == (0, 3)
    collect(outputs, collected)
    assert finish(engine, collected) == expected(LATE)


@pytest.mark.parametrize("what", ["enter", "step"])
def test_what_is_computed_after_all_does_not_count_as_found(what: str, faults: Faults) -> None:
    engine = tiny_engine(eos=(), chunk=512, paged=True, prefix_cache_bytes=1 << 26)
    shared = tuple(range(64))
    drive(engine, [Request("known", (*shared, 1), SAMPLED, 2)])
    raised = faults.add(PagedCache, what, ValueError(), times=1)
    late = [Request(f"late{n}", (*shared, 9, n, n), SAMPLED, 3) for n in range(2)]
    collected = drive(engine, late)
    assert raised
    assert [row.cached_tokens for row in collected.values()] == [0, 0]
    again = drive(engine, [Request("again", (*shared, 9, 0, 0), SAMPLED, 3)])
    assert again["again"].cached_tokens == 64
