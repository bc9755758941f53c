"""A row that gives way goes on exactly where it was: tokens, text, logprobs, grammar, blocks."""

import random
from collections.abc import Iterable
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models import gemma3_text, lfm2
from msgspec.structs import replace

from benchmarks.lib.synthetic import build_model
from mlx_serving.common.queues import Lane
from mlx_serving.worker.engine.engine import Engine
from mlx_serving.worker.engine.interface import (
    Output,
    Request,
    RequestChoice,
    RequestRefusedError,
    SamplingParams,
)
from tests.support.engine_support import HYBRID, SLIDING, other_model, prefixes_of, tiny_engine

SAMPLED = SamplingParams(1.0, top_p=0.95, seed=5, repetition_penalty=1.2, logprobs=2)
BYTES_PER_TOKEN = 512  # of the tiny model
CACHES = pytest.mark.parametrize("paged", [False, True], ids=["padded", "paged"])


def bulk(name: str, prompt: int = 40, tokens: int = 30, lane: Lane = "bulk") -> Request:
    number = sum(map(ord, name))
    ids = tuple((number * 31 + n * 7) % 250 for n in range(prompt))
    return Request(name, ids, replace(SAMPLED, seed=number), tokens, lane=lane)


def urgent(name: str, prompt: int = 5, tokens: int = 4) -> Request:
    return bulk(name, prompt, tokens, "interactive")


class Rows:
    """Each row's outputs, joined; nothing may follow its last one."""

    def __init__(self) -> None:
        self.said: dict[tuple[str, int], list[Any]] = {}
        self.ended: dict[tuple[str, int], str] = {}

    def add(self, outputs: Iterable[Output]) -> None:
        for output in outputs:
            key = output.request_id, output.choice
            assert key not in self.ended
            row = self.said.setdefault(key, [[], "", []])
            row[0] += output.token_ids
            row[1] += output.text
            row[2] += [p.token_id for p in output.logprobs]
            if output.finish_reason:
                self.ended[key] = output.finish_reason

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rows) and (self.said, self.ended) == (other.said, other.ended)

    __hash__ = None  # type: ignore[assignment]


def run(engine: Engine, rows: Rows | None = None, steps: int = 10_000) -> Rows:
    rows = rows or Rows()
    for _ in range(steps):
        if not engine.has_work:
            break
        rows.add(engine.step())
    return rows


def alone(requests: Iterable[Request], model: Any = None) -> Rows:
    """What each request gives in an engine of its own."""
    rows = Rows()
    for request in requests:
        engine = tiny_engine(model, eos=())
        engine.add(request)
        run(engine, rows)
    return rows


@CACHES
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 9])
def test_a_row_that_gave_way_goes_on_where_it_was(paged: bool, steps: int) -> None:  # noqa: FBT001
    engine = tiny_engine(eos=(), rows=3, paged=paged)
    jobs = [bulk("a"), bulk("b", 70), bulk("c", 1)]
    for job in jobs:
        engine.add(job)
    rows = run(engine, steps=steps)
    first = urgent("now")
    assert engine.can_add(first)
    engine.add(first)
    assert engine.parked == 1
    run(engine, rows)
    assert rows == alone([*jobs, first])


@CACHES
def test_a_prompt_that_rides_along_with_another_lanes_gets_what_it_gets_alone(
    paged: bool,  # noqa: FBT001
) -> None:
    engine = tiny_engine(eos=(), rows=6, chunk=512, paged=paged)
    seen: list[list[str]] = []
    engine.on_prefill = lambda names: seen.append(list(names))
    jobs = [bulk("a", 20), bulk("b", 32), bulk("long", 60), urgent("now", 25)]
    for job in jobs:
        engine.add(job)
    rows = run(engine)
    # A decode step pads none; in a chunk the long one would make all others as long.
    assert seen[0] == ["now", "a", "b", "long"][: 4 if paged else 3]
    assert rows == alone(jobs)


@CACHES
def test_rows_whose_kv_is_dropped_are_computed_again(paged: bool) -> None:  # noqa: FBT001
    """One row has its lane's share, and stays; beside it and the new one there is no room."""
    budget = BYTES_PER_TOKEN * (1000 if paged else 1750)
    engine = tiny_engine(eos=(), rows=8, paged=paged, kv_budget_bytes=budget)
    jobs = [bulk("a", 80, 40), bulk("b", 90, 40)]
    for job in jobs:
        engine.add(job)
    rows = run(engine, steps=6)
    first = urgent("now", 700 if paged else 500, 100)
    assert engine.can_add(first)
    engine.add(first)
    assert (engine.parked, engine.lane_rows.parked) == (1, (0, 0, 1))
    assert not engine._runner._parked  # type: ignore[attr-defined]
    assert engine.kv_tokens_used <= engine.kv_tokens_capacity
    run(engine, rows)
    assert rows == alone([*jobs, first])


@CACHES
def test_what_the_device_had_decoded_of_a_parked_row_comes_with_the_next_step(
    paged: bool,  # noqa: FBT001
) -> None:
    engine = tiny_engine(eos=(), rows=3, paged=paged)
    for name in "abc":
        engine.add(bulk(name))
    rows = run(engine, steps=4)
    before = len(rows.said["c", 0][0])
    engine.add(urgent("now"))
    outputs = engine.step()
    assert [o.request_id for o in outputs].count("c") == 1
    rows.add(outputs)
    assert len(rows.said["c", 0][0]) == before + 1


@CACHES
def test_a_row_that_ends_with_the_token_on_its_way_is_not_parked(paged: bool) -> None:  # noqa: FBT001
    job = bulk("c", tokens=3)
    engine = tiny_engine(eos=(), rows=3, paged=paged)
    for request in (bulk("a"), bulk("b"), job):
        engine.add(request)
    rows = Rows()
    while len(rows.said.get(("c", 0), [[]])[0]) < 2:
        rows.add(engine.step())
    engine.add(urgent("now"))
    assert engine.parked == 0
    run(engine, rows)
    assert rows.ended["c", 0] == "length"
    assert rows == alone([bulk("a"), bulk("b"), job, urgent("now")])


@CACHES
def test_parked_rows_can_be_aborted(paged: bool) -> None:  # noqa: FBT001
    engine = tiny_engine(eos=(), rows=3, paged=paged)
    for name in "abc":
        engine.add(bulk(name))
    rows = run(engine, steps=4)
    engine.add(urgent("now"))
    engine.abort("c")
    assert engine.parked == 0
    run(engine, rows)
    assert ("c", 0) not in rows.ended
    assert engine.kv_tokens_used == 0
    assert rows.said["a", 0] == alone([bulk("a")]).said["a", 0]


@pytest.mark.parametrize(
    ("module", "config"), [(gemma3_text, SLIDING), (lfm2, HYBRID)], ids=["sliding", "hybrid"]
)
def test_rows_of_other_caches_are_parked_too(module: Any, config: dict[str, Any]) -> None:
    model = other_model(module, config)
    jobs = [bulk("a", 60), bulk("b", 9), bulk("c", 33)]
    engine = tiny_engine(model, eos=(), rows=3)
    for job in jobs:
        engine.add(job)
    rows = run(engine, steps=7)
    engine.add(urgent("now"))
    run(engine, rows, steps=3)
    engine.add(urgent("again", 30))
    run(engine, rows)
    assert rows == alone([*jobs, urgent("now"), urgent("again", 30)], model)


def test_pools_that_are_compacted_keep_what_parked_rows_hold() -> None:
    engine = tiny_engine(eos=(), rows=4, paged=True)
    jobs = [bulk("long", 5000, 8), bulk("a"), bulk("b"), bulk("c", tokens=60)]
    for job in jobs:
        engine.add(job)
    rows = Rows()
    while engine.waiting:
        rows.add(engine.step())
    engine.add(urgent("now", tokens=40))
    cache = cast("Any", engine._runner)._cache
    assert engine.parked == 1
    seen = set()
    while engine.parked:
        seen.add(cache.blocks)
        rows.add(engine.step())
    run(engine, rows)
    assert max(seen) > 150
    assert rows == alone([*jobs, urgent("now", tokens=40)])
    assert cache.allocator.used == 0


def test_a_row_that_is_parked_while_pools_are_compacted_goes_on_with_its_own_blocks() -> None:
    engine = tiny_engine(eos=(), rows=2, paged=True)
    jobs = [urgent("first", 600, 12), bulk("parked", tokens=60), urgent("now", tokens=40)]
    rows = Rows()
    for job in jobs[:2]:
        engine.add(job)
        while engine.waiting:
            rows.add(engine.step())
    engine.add(jobs[2])
    cache = cast("Any", engine._runner)._cache
    while ("first", 0) not in rows.ended:
        rows.add(engine.step())
    (parked,) = cache._parked
    before = [*parked.state]
    cache.shrink()
    assert max(parked.state) < min(before), "the blocks below were free"
    run(engine, rows)
    assert rows == alone(jobs)
    assert cache.allocator.used == 0


def try_add(engine: Engine, request: Request) -> bool:
    """Add as the engine thread does: if parking freed less than expected, the request waits on."""
    try:
        engine.add(request)
    except RequestRefusedError as error:
        assert error.code == "no_room"  # noqa: PT017 - no other is allowed
        return False
    return True


def under_traffic(engine: Engine, jobs: list[tuple[int, Request]], chance: random.Random) -> Rows:
    """Each job comes in its step, the highest lane first; two of them are cut off."""
    cut = {f"j{chance.randrange(12)}" for _ in range(2)}
    pending, rows, step = list(jobs), Rows(), 0
    while pending or engine.has_work:
        due = sorted((j for j in pending if j[0] <= step), key=lambda job: job[1].rank)
        for job in due:
            if engine.can_add(job[1]) and try_add(engine, job[1]):
                pending.remove(job)
        if chance.random() < 0.1 and cut:
            engine.abort(cut.pop())
        rows.add(engine.step())
        assert engine.kv_tokens_used <= engine.kv_tokens_capacity
        assert engine.running + engine.waiting <= 5
        assert engine.parked <= 5
        step += 1
        assert step < 3000, "everybody gets his turn"
    return rows


JOBS = st.lists(
    st.tuples(
        st.sampled_from(["interactive", "default", "bulk", "bulk"]),
        st.sampled_from([1, 5, 31, 40, 130]),
        st.integers(1, 20),
        st.integers(1, 2),
        st.integers(0, 6),
    ),
    min_size=4,
    max_size=12,
)
MODEL = build_model()


@pytest.mark.parametrize("kind", ["padded", "paged", "prefixes"])
@settings(max_examples=3, deadline=None)
@given(JOBS, st.randoms(use_true_random=False))
def test_any_traffic_gives_what_each_job_gives_alone(
    kind: str, jobs: list[tuple[Lane, int, int, int, int]], chance: random.Random
) -> None:
    """Rows and KV tokens are scarce, jobs are cut off, blocks are given back."""
    engine = tiny_engine(
        MODEL, eos=(), rows=5, chunk=48, paged=kind != "padded",
        kv_budget_bytes=BYTES_PER_TOKEN * (2400 if kind == "padded" else 420),
        prefix_cache_bytes=None if kind == "prefixes" else 0,
    )  # fmt: skip
    pending = []
    for number, (lane, prompt, tokens, count, wait) in enumerate(jobs):
        first = bulk(f"j{number}", prompt, tokens, lane)
        request = replace(first, choices=tuple(map(RequestChoice, range(count))))
        if engine.fits(request):
            pending.append((wait, request))
    each = [
        replace(request, choices=(choice,)) for _, request in pending for choice in request.choices
    ]
    whole = alone(each)
    rows = under_traffic(engine, pending, chance)
    for key, said in rows.said.items():
        if key in rows.ended:
            assert (said, rows.ended[key]) == (whole.said[key], whole.ended[key])
        else:
            assert whole.said[key][0][: len(said[0])] == said[0]
    if kind != "padded":
        cache = cast("Any", engine._runner)._cache
        assert (len(cache._parked), len(cache._rows)) == (0, 0)
    if kind == "prefixes":
        prefixes = prefixes_of(engine)
        prefixes.check()
        assert prefixes.held == 0
    assert engine.kv_tokens_used == 0
