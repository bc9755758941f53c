"""A claim leaves a young job to the worker that has its prefix, for a moment and no longer."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest

from mlx_serving.common.protocol.calls import Blame, HeldRows, crash
from mlx_serving.common.protocol.fields import JobField
from tests.support.helpers import wait_until
from tests.support.protocol_driver import LANES, QUEUE, Attempt, Driver

if TYPE_CHECKING:
    import redis

    from mlx_serving.common.protocol.calls import ClaimReply

pytestmark = pytest.mark.may_leak(reason="jobs stay queued or running")

TALK, OTHER_TALK, SYSTEM = "00000000000000c1", "00000000000000c2", "00000000000000b0"
FIRST, SECOND = f"{TALK},{SYSTEM}", f"{OTHER_TALK},{SYSTEM}"
BULK = "tally:bulk"
ROWS = 8
SHORT, LONG = 60, 10_000  # ms
SERVING: dict[str, Any] = {"state": "serving", "resident": "other,tally", "batch_rows": ROWS}


@pytest.fixture
def driver(redis_client: redis.Redis) -> Driver:
    driver = Driver(redis_client)
    for worker in ("a", "b", "c"):
        say(driver, worker)
    return driver


def say(driver: Driver, worker: str, **facts: Any) -> None:
    """A worker's presence."""
    driver.redis.hset(driver.keys.worker(worker), mapping=SERVING | facts)


def claim(driver: Driver, worker: str, rows: int = 0, **given: Any) -> ClaimReply:
    options: dict[str, Any] = {"affinity_ms": LONG, "keeps_prefixes": True}
    return driver.claim(worker, **options | {"held": HeldRows(rows)} | given)


def ids(reply: ClaimReply) -> list[str]:
    return [job.job_id for job in reply.jobs]


def begin(driver: Driver, job_id: str = "first", marks: str = FIRST, worker: str = "a") -> None:
    """Have a worker take a job with these marks, whoever else has them."""
    driver.enqueue(job_id, marks=marks)
    driver.redis.hincrby(driver.keys.job(job_id), JobField.ENQUEUED_MS, -LONG)
    assert ids(claim(driver, worker)) == [job_id]


def test_the_next_turn_is_left_to_the_worker_that_has_the_conversation(driver: Driver) -> None:
    begin(driver)
    driver.enqueue("second", marks=FIRST)
    driver.enqueue("unmarked")
    reply = claim(driver, "b")
    assert ids(reply) == ["unmarked"]
    assert 0 < reply.again_ms <= LONG
    assert driver.listed() == ["second"]
    assert ids(claim(driver, "a")) == ["second"]


def test_nobody_waits_longer_than_the_bound(driver: Driver) -> None:
    begin(driver)
    driver.enqueue("second", marks=FIRST)
    reply = claim(driver, "b", affinity_ms=SHORT)
    assert (reply.jobs, driver.listed()) == ([], ["second"])
    assert 0 < reply.again_ms <= SHORT
    taken = wait_until(lambda: ids(claim(driver, "b", affinity_ms=SHORT)))
    assert taken == ["second"]
    record = driver.record("second")
    assert SHORT <= record.started_ms - record.enqueued_ms < SHORT + 50
    assert driver.redis.get(driver.keys.warm(TALK)) == b"\nb\n", "it moved"
    assert driver.redis.get(driver.keys.warm(SYSTEM)) == b"\nb\na\n", "it is in two places"


def test_what_is_old_is_left_to_nobody(driver: Driver) -> None:
    begin(driver)
    driver.enqueue("second", marks=FIRST)
    driver.redis.hincrby(driver.keys.job("second"), JobField.ENQUEUED_MS, -LONG)
    reply = claim(driver, "b")
    assert (ids(reply), reply.again_ms) == (["second"], 0)


def test_a_clock_that_was_set_back_delays_nobody(driver: Driver) -> None:
    begin(driver)
    driver.enqueue("second", marks=FIRST)
    driver.redis.hincrby(driver.keys.job("second"), JobField.ENQUEUED_MS, 3_600_000)
    assert ids(claim(driver, "b")) == ["second"]


@pytest.mark.parametrize(
    "facts",
    [
        {"state": "draining"},
        {"state": "suspended"},
        {"resident": "other"},
        {"resident": "tally2,not-tally"},
        {"batch_rows": 1},  # it holds the first turn
        {"batch_rows": ""},
    ],
    ids=str,
)
def test_a_holder_that_cannot_take_it_delays_nobody(driver: Driver, facts: Any) -> None:
    begin(driver)
    say(driver, "a", **facts)
    driver.enqueue("second", marks=FIRST)
    reply = claim(driver, "b")
    assert (ids(reply), reply.again_ms) == (["second"], 0)


def test_a_holder_that_is_gone_delays_nobody(driver: Driver) -> None:
    begin(driver)
    driver.redis.delete(driver.keys.worker("a"))
    driver.enqueue("second", marks=FIRST)
    assert ids(claim(driver, "b")) == ["second"]


def test_a_holder_gets_no_more_than_it_has_room_for(driver: Driver) -> None:
    begin(driver)
    for n in range(ROWS):
        driver.enqueue(f"job{n}", marks=FIRST)
    assert ids(claim(driver, "b")) == [f"job{ROWS - 1}"]
    assert driver.listed() == [f"job{n}" for n in range(ROWS - 1)]


def test_a_claim_leaves_a_bounded_number_of_jobs(driver: Driver) -> None:
    begin(driver)
    say(driver, "a", batch_rows=1000)
    for n in range(70):
        driver.enqueue(f"job{n}", marks=FIRST)
    assert ids(claim(driver, "b", most=2)) == ["job64", "job65"]


def test_others_with_the_beginning_take_a_new_conversation_at_once(driver: Driver) -> None:
    begin(driver)
    begin(driver, "other", SECOND, worker="b")
    for worker in ("a", "b"):
        driver.enqueue(f"for-{worker}", marks=f"0000000000000{worker}c3,{SYSTEM}")
        reply = claim(driver, "c")
        assert (reply.jobs, reply.again_ms > 0) == ([], True)
        assert ids(claim(driver, worker)) == [f"for-{worker}"]


def test_a_beginning_spreads_before_its_worker_is_full(driver: Driver) -> None:
    """A conversation goes where it is while there is room; a beginning is worth less than that."""
    for n in range(3):
        begin(driver, f"job{n}", f"00000000000000d{n},{SYSTEM}")
    driver.enqueue("new", marks=f"00000000000000d9,{SYSTEM}")
    driver.enqueue("next", marks=f"00000000000000d1,{SYSTEM}")
    assert ids(claim(driver, "c", rows=1)) == []  # a holds 3 of 8 rows, two more than c
    assert ids(claim(driver, "c", rows=0)) == ["new"]
    assert ids(claim(driver, "a")) == ["next"]


def test_where_the_conversations_worker_is_full_its_beginning_decides(driver: Driver) -> None:
    begin(driver)
    begin(driver, "other", SECOND, worker="b")
    say(driver, "a", batch_rows=1)
    driver.enqueue("second", marks=FIRST)
    assert ids(claim(driver, "c")) == []
    assert ids(claim(driver, "b")) == ["second"]


def test_a_worker_without_a_prefix_cache_leaves_jobs_and_has_none(driver: Driver) -> None:
    driver.enqueue("first", marks=FIRST)
    assert ids(claim(driver, "a", keeps_prefixes=False)) == ["first"]
    driver.enqueue("second", marks=FIRST)
    assert ids(claim(driver, "b")) == ["second"]
    driver.enqueue("third", marks=FIRST)
    assert ids(claim(driver, "a", keeps_prefixes=False)) == []


def test_switched_off_it_leaves_nothing_and_notes_nothing(driver: Driver) -> None:
    begin(driver)
    driver.enqueue("second", marks=FIRST)
    assert ids(driver.claim("b", keeps_prefixes=True)) == ["second"]
    assert driver.redis.get(driver.keys.warm(TALK)) == b"\na\n"


def test_a_mark_is_forgotten_after_minutes(driver: Driver) -> None:
    begin(driver)
    for mark in (TALK, SYSTEM):
        assert 60 <= driver.redis.ttl(driver.keys.warm(mark)) <= 600


def test_a_beginning_knows_a_few_workers_the_last_first(driver: Driver) -> None:
    for n in range(12):
        begin(driver, f"job{n}", worker=f"w{n}")
    names = driver.redis.get(driver.keys.warm(SYSTEM)).decode().split()  # type: ignore[union-attr]
    assert names == [f"w{n}" for n in range(11, 3, -1)]


@pytest.mark.parametrize(
    "marks", ["x", ",", "zz,zz", "," * 9, "a" * 5000, f"{TALK}", "\n,\n", f"{'a' * 40},{'b' * 40}"]
)
def test_odd_marks_are_none(driver: Driver, marks: str) -> None:
    begin(driver, "first", marks)
    driver.enqueue("second", marks=marks)
    assert ids(claim(driver, "b")) == ["second"]
    assert list(driver.redis.scan_iter("mlxs:warm:*")) == []


def test_keys_of_another_type_delay_nobody(driver: Driver) -> None:
    for mark in (TALK, SYSTEM):
        driver.redis.rpush(driver.keys.warm(mark), "x")
    begin(driver)
    driver.redis.delete(driver.keys.worker("a"))
    driver.redis.set(driver.keys.worker("a"), "x")
    driver.enqueue("second", marks=FIRST)
    assert ids(claim(driver, "b")) == ["second"]
    say(driver, "c", resident="tally", batch_rows="many")
    begin(driver, "third", worker="c")
    driver.enqueue("fourth", marks=FIRST)
    driver.redis.delete(driver.keys.worker("b"))
    assert ids(claim(driver, "d")) == ["fourth"]


def test_a_tenants_job_that_is_left_costs_it_no_turn(driver: Driver) -> None:
    begin(driver)
    driver.enqueue("x1", tenant="x", marks=FIRST)
    driver.enqueue("y1", tenant="y")
    driver.enqueue("y2", tenant="y")
    assert ids(claim(driver, "b", most=1)) == ["y1"]
    assert driver.redis.lrange(driver.keys.turns(QUEUE), 0, -1) == [b"x", b"y"]
    assert ids(claim(driver, "a")) == ["x1", "y2"]


def test_a_tenant_whose_job_is_left_keeps_its_place_among_those_that_pass(driver: Driver) -> None:
    """With three tenants its place can be told from the end of the turns."""
    begin(driver)
    driver.enqueue("x1", tenant="x", marks=FIRST)
    driver.enqueue("y1", tenant="y")
    driver.enqueue("z1", tenant="z")
    driver.enqueue("y2", tenant="y")
    assert ids(claim(driver, "b", most=1)) == ["y1"]
    assert driver.redis.lrange(driver.keys.turns(QUEUE), 0, -1) == [b"x", b"z", b"y"]
    assert ids(claim(driver, "a", most=1)) == ["x1"]


def test_a_tenant_keeps_its_turn_if_more_is_left_behind_its_first_job(driver: Driver) -> None:
    begin(driver)
    driver.enqueue("y1", tenant="y")
    driver.enqueue("x1", tenant="x", marks=FIRST)
    driver.enqueue("x2", tenant="x", marks=FIRST)
    driver.enqueue("z1", tenant="z")
    driver.enqueue("z2", tenant="z")
    assert ids(claim(driver, "b", most=2)) == ["y1", "z1"]
    assert driver.redis.lrange(driver.keys.turns(QUEUE), 0, -1) == [b"x", b"z"]


def test_a_tenants_jobs_that_are_all_left_wait_on_their_places(driver: Driver) -> None:
    begin(driver)
    driver.enqueue("x1", tenant="x", marks=FIRST)
    driver.enqueue("x2", tenant="x", marks=FIRST)
    reply = claim(driver, "b")
    assert (reply.jobs, reply.again_ms > 0) == ([], True)
    assert driver.listed() == ["x1", "x2"]
    assert ids(claim(driver, "a")) == ["x1", "x2"]


@pytest.mark.parametrize("how", ["released", "crashed"])
def test_what_comes_back_is_left_to_nobody(driver: Driver, how: str) -> None:
    begin(driver)
    driver.enqueue("second", marks=FIRST)
    (job,) = claim(driver, "a").jobs
    if how == "released":
        driver.release(Attempt(job, "a"))
    else:
        driver.protocol.run(crash("a", [Blame(job.attempt, max_unproven=2)]))
    assert ids(claim(driver, "b")) == ["second"]


def bulk(driver: Driver, *names: str, marks: str = f",{SYSTEM}", **fields: Any) -> None:
    """Lines that have waited longer than anybody leaves them."""
    for name in names:
        driver.enqueue(name, BULK, marks=marks, **fields)
        driver.redis.hincrby(driver.keys.job(name), JobField.ENQUEUED_MS, -LONG)


def test_a_bulk_line_of_anothers_beginning_goes_after_others(driver: Driver) -> None:
    """The worker that has it may be full: it goes on with these lines as its rows end."""
    begin(driver)
    say(driver, "a", batch_rows=1)
    bulk(driver, "line0", "line1")
    bulk(driver, "new0", "new1", marks=",00000000000000b1")
    bulk(driver, "plain", marks="")
    assert ids(claim(driver, "b", most=2)) == ["new0", "new1"]
    assert ids(claim(driver, "a", most=1)) == ["line0"]
    assert ids(claim(driver, "b")) == ["plain", "line1"], "nobody is idle for it"


def test_a_bulk_line_is_overtaken_for_a_bounded_time(driver: Driver) -> None:
    begin(driver)
    bulk(driver, "line0", "line1")
    bulk(driver, "plain0", "plain1", "plain2", marks="")
    bulk(driver, "line2")
    assert ids(claim(driver, "b", most=1)) == ["plain0"]
    assert [
        driver.redis.hexists(driver.keys.job(f"line{n}"), JobField.OVERTAKEN_MS) for n in range(3)
    ] == [1, 1, 0]
    first = driver.redis.hget(driver.keys.job("line0"), JobField.OVERTAKEN_MS)
    assert ids(claim(driver, "b", most=1)) == ["plain1"]
    assert driver.redis.hget(driver.keys.job("line0"), JobField.OVERTAKEN_MS) == first, (
        "since the first time"
    )
    driver.redis.hincrby(driver.keys.job("line0"), JobField.OVERTAKEN_MS, -60_000)
    assert ids(claim(driver, "b", most=1)) == ["line0"]
    assert ids(claim(driver, "b")) == ["line1", "plain2", "line2"], "it has the beginning now"


def test_a_claim_passes_a_bounded_number_of_lines(driver: Driver) -> None:
    begin(driver)
    bulk(driver, *(f"line{n}" for n in range(40)))
    bulk(driver, "plain", marks="")
    assert ids(claim(driver, "b", most=1)) == ["line32"]


def test_other_lanes_and_tenants_keep_their_order(driver: Driver) -> None:
    begin(driver)
    say(driver, "a", batch_rows=1)
    driver.enqueue("line", marks=FIRST)
    driver.enqueue("plain")
    assert ids(claim(driver, "b", most=1)) == ["line"]
    bulk(driver, "x1", tenant="x")
    bulk(driver, "x2", tenant="x", marks="")
    assert ids(claim(driver, "c", most=2)) == ["plain", "x1"]


def test_a_bulk_line_whose_worker_is_gone_keeps_its_place(driver: Driver) -> None:
    begin(driver)
    driver.redis.delete(driver.keys.worker("a"))
    bulk(driver, "line")
    bulk(driver, "plain", marks="")
    assert ids(claim(driver, "b", most=1)) == ["line"]


@pytest.mark.parametrize("seed", range(4))
def test_every_job_is_claimed_once_and_what_is_unmarked_in_order(driver: Driver, seed: int) -> None:
    chance = random.Random(seed)
    beginnings = [f"{n:016x}" for n in range(3)]
    plain: dict[str, list[str]] = {queue: [] for queue in LANES}
    names = [f"job{n}" for n in range(120)]
    for name in names:
        queue, marks = chance.choice(LANES), f",{chance.choice(beginnings)}"
        tenant, marks = chance.choice([("", ""), ("", marks), ("", marks), ("acme", marks)])
        if not marks:
            plain[queue].append(name)
        driver.enqueue(name, queue, marks=marks, tenant=tenant)
    claimed = []
    while driver.redis.exists(*map(driver.keys.rq_queue, LANES)):
        worker = chance.choice("abc")
        rows = int(driver.redis.scard(driver.keys.rq_worker_executions(worker)))
        say(driver, worker, batch_rows=rows + chance.randrange(9))
        reply = claim(driver, worker, most=chance.randrange(1, 9), rows=rows, affinity_ms=20)
        claimed += reply.jobs
    assert sorted(job.job_id for job in claimed) == sorted(names)
    for queue, expected in plain.items():
        found = [job.job_id for job in claimed if job.queue == queue and job.job_id in expected]
        assert found == expected


def test_the_order_is_kept_but_for_what_is_left(driver: Driver) -> None:
    begin(driver)
    for n in range(6):
        driver.enqueue(f"job{n}", marks=FIRST if n % 3 == 0 else "")
    assert ids(claim(driver, "b", most=3)) == ["job1", "job2", "job4"]
    assert driver.listed() == ["job0", "job3", "job5"]
    assert ids(claim(driver, "a")) == ["job0", "job3", "job5"]
