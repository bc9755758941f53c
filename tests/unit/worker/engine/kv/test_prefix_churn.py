"""Prefixes under churn: rows that come, go, fail and are cut off; blocks that are evicted."""

import random
from array import array
from typing import Any, cast

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from mlx_serving.worker.engine.engine import Engine
from mlx_serving.worker.engine.interface import (
    Request,
    RequestChoice,
    RequestRefusedError,
    SamplingParams,
)
from mlx_serving.worker.engine.kv.paged.cache import BLOCK_TOKENS
from mlx_serving.worker.engine.kv.paged.step import plain_step
from mlx_serving.worker.engine.kv.prefix.index import PrefixKey
from tests.support.engine_support import (
    GREEDY,
    POISON,
    Collected,
    PoisonedModel,
    drive,
    prefixes_of,
    tiny_engine,
)

BYTES_PER_TOKEN = 512  # of the tiny model
TENANTS = ("", "a", "b")


def random_jobs(count: int, seed: int, most_tokens: int = 24) -> list[Request]:
    """Jobs over a few stems of several blocks, some sampled, of three tenants."""
    chance = random.Random(seed)
    stems = [[chance.randrange(250) for _ in range(chance.randrange(30, 140))] for _ in range(6)]
    jobs = []
    for number in range(count):
        stem = chance.choice(stems)[: chance.choice((33, 64, 140))]
        tail = [chance.randrange(250) for _ in range(chance.randrange(1, 24))]
        sampling = SamplingParams(chance.choice((0.0, 1.0)), seed=number)
        salt = chance.choice(TENANTS)
        jobs.append(
            Request(
                str(number), (*stem, *tail), sampling, chance.randrange(1, most_tokens), salt=salt
            )
        )
    return jobs


def check_budget(engine: Engine) -> None:
    prefixes = prefixes_of(engine)
    cache = cast("Any", engine._runner)._cache
    assert prefixes.used <= prefixes.limit
    assert cache.blocks <= prefixes.limit
    assert engine.kv_tokens_used <= engine.kv_tokens_capacity


def assert_whole(engine: Engine) -> None:
    """Nobody holds anything, the index and the allocator agree, nothing is lost."""
    prefixes = prefixes_of(engine)
    prefixes.check()
    assert (prefixes.held, engine.kv_tokens_used) == (0, 0)
    assert prefixes.used == prefixes.idle
    prefixes.clear()
    assert prefixes.used == 0


def compare(jobs: list[Request], budget_tokens: int) -> dict[str, Collected]:
    engine = tiny_engine(
        kv_budget_bytes=BYTES_PER_TOKEN * budget_tokens,
        eos=(), rows=12, paged=True, prefix_cache_bytes=None,
    )  # fmt: skip
    with_cache = drive(engine, jobs, every=1, on_step=lambda _: check_budget(engine))
    assert_whole(engine)
    without = drive(tiny_engine(eos=(), rows=12, paged=True), jobs, every=1)
    assert with_cache == without
    return with_cache


def test_cache_on_and_off_give_the_same_tokens_under_churn_and_eviction() -> None:
    jobs = random_jobs(120, seed=3)
    collected = compare(jobs, budget_tokens=1400)
    hits = sum(row.cached_tokens for row in collected.values())
    prompts = sum(len(job.prompt) for job in jobs)
    assert prompts / 4 < hits < prompts, "some were found, some evicted"


@pytest.mark.slow
def test_cache_on_and_off_give_the_same_tokens_over_500_jobs() -> None:
    compare(random_jobs(500, seed=4, most_tokens=12), budget_tokens=1400)


def test_a_job_finds_what_its_own_tenant_had_before_it_and_no_more() -> None:
    jobs = random_jobs(60, seed=5)
    engine = tiny_engine(eos=(), paged=True, prefix_cache_bytes=None)
    before: dict[str, list[tuple[int, ...]]] = {salt: [] for salt in TENANTS}
    for job in jobs:
        row = drive(engine, [job])[job.id]
        most = max((_common(job.prompt, known) for known in before[job.salt]), default=0)
        whole = min(most, len(job.prompt) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
        assert whole <= row.cached_tokens <= most
        before[job.salt].append((*job.prompt, *row.token_ids))
    assert_whole(engine)


def _common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    pairs = zip(one, other, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


JOBS = st.lists(
    st.tuples(
        st.integers(0, 2), st.integers(1, 150), st.integers(1, 40), st.integers(1, 3),
        st.sampled_from(TENANTS),
    ),
    max_size=12,
)  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(JOBS, st.integers(0, 3), st.randoms(use_true_random=False))
def test_no_block_is_lost_and_none_is_over_budget(
    jobs: list[tuple[int, int, int, int, str]], every: int, chance: random.Random
) -> None:
    engine = tiny_engine(
        kv_budget_bytes=BYTES_PER_TOKEN * 640, eos=(), paged=True, prefix_cache_bytes=None
    )
    pending = [
        Request(
            f"r{n}", (stem,) * length, GREEDY, most,
            choices=tuple(map(RequestChoice, range(choices))), salt=salt,
        )
        for n, (stem, length, most, choices, salt) in enumerate(jobs)
    ]  # fmt: skip
    pending = [request for request in pending if engine.fits(request)]
    step = 0
    while pending or engine.has_work:
        while pending and engine.can_add(pending[0]) and (not every or step % every == 0):
            engine.add(pending.pop(0))
        if chance.random() < 0.08:
            engine.abort(f"r{chance.randrange(12)}")
        engine.step()
        check_budget(engine)
        prefixes_of(engine).check()
        step += 1
        assert step < 2000, "a job that fits alone is admitted in the end"
    assert_whole(engine)


def test_idle_blocks_stay_within_their_bytes_and_the_least_recent_go_first() -> None:
    engine = tiny_engine(eos=(), paged=True, prefix_cache_bytes=BYTES_PER_TOKEN * 32 * 4)
    prefixes = prefixes_of(engine)
    jobs = [Request(str(n), (n,) * 65, GREEDY, 2) for n in range(6)]  # two blocks each
    for job in jobs:
        drive(engine, [job])
        assert prefixes.idle <= 4
    found = {job.id: drive(engine, [job])[job.id].cached_tokens for job in (jobs[5], jobs[4])}
    assert found == {"5": 64, "4": 64}
    assert drive(engine, [jobs[0]])["0"].cached_tokens == 0
    assert_whole(engine)


def test_idle_blocks_count_as_room_and_give_way_to_rows() -> None:
    engine = tiny_engine(
        kv_budget_bytes=BYTES_PER_TOKEN * 640, eos=(), paged=True, prefix_cache_bytes=None
    )
    drive(engine, [Request("old", (1,) * 300, GREEDY, 8)])
    assert prefixes_of(engine).idle == 9
    wide = Request("wide", (2,) * 500, GREEDY, 100)
    assert engine.fits(wide)
    assert engine.can_add(wide)
    drive(engine, [wide], on_step=lambda _: check_budget(engine))
    assert_whole(engine)


def test_rows_that_share_a_prefix_are_admitted_where_their_sum_would_not_fit() -> None:
    engine = tiny_engine(
        kv_budget_bytes=BYTES_PER_TOKEN * 640, eos=(), paged=True, prefix_cache_bytes=None
    )
    jobs = [Request(str(n), (*(1,) * 320, n, 5), GREEDY, 10) for n in range(5)]
    engine.add(jobs[0])
    assert not engine.can_add(jobs[1]), "nothing is known yet: 2 x 352 tokens"
    for _ in range(8):
        engine.step()
    for job in jobs[1:]:
        assert engine.can_add(job), "320 tokens are there, 32 are its own"
        engine.add(job)
    assert engine.kv_tokens_used == 320 + 5 * 32
    different = Request("different", (2,) * 200, GREEDY, 10)
    assert not engine.can_add(different)
    with pytest.raises(RequestRefusedError, match="no room"):
        engine.add(different)
    while engine.has_work:
        engine.step()
        check_budget(engine)
    assert_whole(engine)


@pytest.mark.parametrize("raises", [False, True])
def test_what_a_failed_row_leaves_is_not_found_again(raises: bool) -> None:  # noqa: FBT001 - parametrized
    model = PoisonedModel()
    engine = tiny_engine(cast("Any", model.model), eos=(), paged=True, prefix_cache_bytes=None)
    model.raises = raises
    runner = cast("Any", engine._runner)
    runner._model = runner._cache._model = model
    runner._cache._step = plain_step(cast("Any", model))
    good = [Request(f"good{n}", (*(1,) * 70, n), GREEDY, 12) for n in range(4)]
    # A prompt's last token is computed with the batch, the others before.
    tail = (POISON, *range(40)) if raises else (*range(40), POISON)
    bad = Request("bad", (*(1,) * 70, *tail), GREEDY, 12)
    collected = drive(engine, [*good[:2], bad, *good[2:]])
    assert collected["bad"].error_code == ("prefill_failed" if raises else "nan_logits")
    key = PrefixKey(b"", array("i", bad.prompt[:-1]).tobytes())
    assert len(prefixes_of(engine).find(key)) == 2, "what good rows share, no more"
    again = drive(engine, [replace(bad, id="again", max_tokens=2)])["again"]
    assert again.cached_tokens == (0 if raises else 64), "computed apart, it begins anew"
    expected = drive(tiny_engine(cast("Any", model.model), eos=()), good)
    assert all(collected[row.id].token_ids == expected[row.id].token_ids for row in good)
    assert_whole(engine)


def test_pools_that_are_compacted_keep_what_is_known_and_what_rows_that_wait_hold() -> None:
    engine = tiny_engine(eos=(), paged=True, prefix_cache_bytes=None)
    cache, prefixes = cast("Any", engine._runner)._cache, prefixes_of(engine)
    drive(engine, [Request(f"w{n}", (n,) * 700, GREEDY, 2, salt="w") for n in range(10)])
    drive(engine, [Request("first", (9,) * 100, GREEDY, 2)])
    stays, waits = Request("stays", (8,) * 40, GREEDY, 80), Request("waits", (9,) * 150, GREEDY, 8)
    engine.add(stays)
    engine.step()
    engine.add(waits)
    (row,) = engine._scheduler.find("waits")
    held, before = list(row.prefill.pinned_blocks), cache.blocks
    assert len(held) == 3
    prefixes.clear()
    cache._shrink()
    prefixes.check()
    assert cache.blocks < before
    assert max(row.prefill.pinned_blocks) < min(held)
    rows = drive_to_end(engine)
    expected = drive(tiny_engine(eos=()), [stays, waits])
    assert rows["waits"] == expected["waits"].token_ids
    again = drive(engine, [waits, stays])
    assert again == expected
    assert again["waits"].cached_tokens == 128
    assert_whole(engine)


def drive_to_end(engine: Engine) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {}
    while engine.has_work:
        for output in engine.step():
            rows.setdefault(output.request_id, []).extend(output.token_ids)
    return rows


def test_a_shared_block_is_never_written_to() -> None:
    engine = tiny_engine(eos=(), paged=True, prefix_cache_bytes=None)
    prompt = (3,) * 97
    drive(engine, [Request("first", prompt, GREEDY, 4)])
    key = _key(engine, prompt)
    blocks = mx.array(prefixes_of(engine).find(key))
    layer = cast("Any", engine._runner)._cache.layers[0]
    before = mx.array(layer.keys[blocks])
    jobs = [Request(f"x{n}", (*prompt, n), SamplingParams(1.0, seed=n), 40) for n in range(6)]
    drive(engine, jobs, every=2)
    assert prefixes_of(engine).find(key) == blocks.tolist()
    layer = cast("Any", engine._runner)._cache.layers[0]
    assert mx.array_equal(layer.keys[blocks], before).item()


def _key(engine: Engine, prompt: tuple[int, ...]) -> Any:
    from mlx_serving.worker.engine.row import Row

    del engine
    return Row(Request("key", prompt, GREEDY, 1), RequestChoice()).context_key
