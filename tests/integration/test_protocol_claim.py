"""Claim (D1, D3): atomic, in order of priority, and past what is not for this worker."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest

from mlx_serving.common.protocol import calls
from tests.support.helpers import wait_until
from tests.support.protocol_driver import PAYLOAD, QUEUE, Driver, entry, rq_fields

if TYPE_CHECKING:
    from mlx_serving.common.redis.local import LocalRedis

pytestmark = pytest.mark.may_leak(reason="jobs stay queued or running at the end of a test")


def many(driver: Driver, ids: list[str], **fields: Any) -> None:
    driver.protocol.run_many([calls.enqueue(entry(i, **fields)) for i in ids])


def test_a_claim_moves_the_id_from_the_list_to_a_lease(driver: Driver) -> None:
    attempt = driver.start("a", timeout_ms=7_000, stream=False)
    job = attempt.job
    assert (job.job_id, job.queue, job.epoch, job.seq) == ("a", QUEUE, 1, 0)
    assert (job.data, job.problem) == (PAYLOAD, "")
    assert (job.timeout_ms, job.stream, job.result_ttl) == (7_000, False, 60)
    assert job.started_ms == job.now_ms >= job.enqueued_ms > 0
    assert (driver.listed(), driver.leased(), driver.indexed()) == ([], ["a"], ["a"])
    record = driver.record("a")
    assert (record.state.value, record.owner) == ("running", "w1")
    assert driver.rq_status("a") == "started"


def test_lanes_are_served_in_order_of_priority(driver: Driver) -> None:
    for job_id, lane in [
        ("b1", "bulk"),
        ("d1", "default"),
        ("i1", "interactive"),
        ("i2", "interactive"),
    ]:
        driver.enqueue(job_id, f"tally:{lane}")
    assert driver.claimed_ids(most=3) == ["i1", "i2", "d1"]
    assert driver.claimed_ids() == ["b1"]


def test_it_takes_no_more_than_asked_in_order(driver: Driver) -> None:
    many(driver, [f"j{n}" for n in range(10)])
    assert driver.claimed_ids(most=4) == ["j0", "j1", "j2", "j3"]
    assert driver.listed()[0] == "j4"


def test_an_id_is_in_exactly_one_place_while_workers_race(
    driver: Driver, local_redis: LocalRedis
) -> None:
    ids = [f"j{n}" for n in range(300)]
    many(driver, ids)
    seen: list[str] = []

    def work(name: str) -> None:
        with local_redis.client() as client:
            mine = Driver(client)
            while taken := mine.claimed_ids(name, most=3):
                seen.extend(taken)

    threads = [threading.Thread(target=work, args=(f"w{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        with driver.redis.pipeline(transaction=True) as pipe:
            pipe.lrange("rq:queue:tally:default", 0, -1)
            pipe.zrange(driver.keys.leases(QUEUE), 0, -1)
            listed, leased = pipe.execute()
        assert len(set(listed)) + len(set(leased)) == len(set(listed) | set(leased)) == 300
    assert sorted(seen) == sorted(ids)


def test_a_newer_protocol_stays_untouched_and_blocks_nobody(driver: Driver) -> None:
    driver.enqueue("new", min_protocol=2)
    driver.enqueue("old")
    before = {k: v for k, v in driver.snapshot().items() if b"new" in k}
    assert driver.claimed_ids() == ["old"]
    assert {k: v for k, v in driver.snapshot().items() if b"new" in k} == before
    assert driver.listed() == ["new"]
    assert driver.claimed_ids(protocol=2) == ["new"]


@pytest.mark.parametrize("most", [1, 32])
def test_a_crowd_of_newer_jobs_blocks_nobody(driver: Driver, most: int) -> None:
    many(driver, [f"new{n}" for n in range(900)], min_protocol=2)
    driver.enqueue("old")
    assert driver.claimed_ids(most=most) == ["old"]
    assert len(driver.listed()) == 900


def test_a_job_too_big_for_this_worker_is_left_for_another(driver: Driver) -> None:
    attempt = driver.start("big")
    driver.enqueue("small")
    driver.release(attempt, needed=5_000)
    assert driver.claimed_ids(capacity_tokens=4_999) == ["small"]
    assert driver.listed() == ["big"]
    assert driver.claimed_ids("w2", capacity_tokens=5_000) == ["big"]


def test_a_job_of_more_choices_than_this_worker_has_rows_is_left_for_another(
    driver: Driver,
) -> None:
    attempt = driver.start("wide")
    driver.enqueue("narrow")
    driver.release(attempt, needed=100, rows_needed=16)
    assert driver.claimed_ids(capacity_rows=15) == ["narrow"]
    assert driver.listed() == ["wide"]
    assert driver.claimed_ids("w2", capacity_rows=16) == ["wide"]


def test_an_expired_job_ends_instead_of_starting(driver: Driver) -> None:
    driver.enqueue("late", deadline_ms=1)
    driver.enqueue("fine")
    wait_until(lambda: driver.redis.time()[0] * 1000 > 0)
    wait_until(lambda: now_ms(driver) > driver.record("late").deadline_ms)
    reply = driver.claim()
    assert [job.job_id for job in reply.jobs] == ["fine"]
    assert reply.dropped == ["late"]
    record = driver.record("late")
    assert (record.state.value, record.error_code) == ("expired", "deadline_exceeded")
    (end,) = driver.events("late")
    assert (end.type, end.state, end.seq) == ("end", "expired", 1)
    assert driver.rq_status("late") == "failed"


def now_ms(driver: Driver) -> int:
    seconds, micros = driver.redis.time()
    return int(seconds) * 1000 + int(micros) // 1000


def test_a_suspended_fleet_claims_nothing(driver: Driver) -> None:
    driver.enqueue("a")
    driver.redis.set("rq:suspended", 1)
    reply = driver.claim()
    assert (reply.suspended, reply.jobs) == (True, [])
    driver.redis.delete("rq:suspended")
    assert driver.claimed_ids() == ["a"]


@pytest.mark.parametrize(
    "field",
    [
        "success_callback_name",
        "failure_callback_name",
        "stopped_callback_name",
        "webhooks",
        "dependency_ids",
        "dependency_id",
        "repeats_left",
        "rate_limit_key",
    ],
)
def test_fields_that_would_run_or_fetch_something_are_named(driver: Driver, field: str) -> None:
    job = driver.start("a", rq_fields={**rq_fields(), field: "os.system"}).job
    assert (job.problem, job.problem_field, job.data) == ("forbidden_field", field, b"")


def test_a_payload_over_the_limit_is_not_even_sent(driver: Driver) -> None:
    driver.enqueue("a", rq_fields={**rq_fields(), "data": b"x" * 1001})
    (job,) = driver.claim(max_payload_bytes=1000).jobs
    assert (job.problem, job.problem_field, job.data) == ("payload_too_large", "data", b"")


def test_a_job_without_a_payload_is_named(driver: Driver) -> None:
    driver.enqueue("a")
    driver.redis.hdel("rq:job:a", "data")
    job = driver.take().job
    assert (job.problem, job.problem_field) == ("corrupt_job", "data")


def test_a_job_that_rqs_own_queue_enqueued_is_adopted(driver: Driver) -> None:
    driver.redis.hset("rq:job:stock", mapping=rq_fields())  # type: ignore[arg-type]
    driver.redis.rpush("rq:queue:tally:default", "stock")
    attempt = driver.take()
    assert (attempt.job.job_id, attempt.job.epoch, attempt.job.data) == ("stock", 1, PAYLOAD)
    assert driver.indexed() == driver.leased() == ["stock"]
    assert driver.commit(attempt, attempt.end()) == ["OK"]
    assert driver.state("stock") == "finished"


def test_an_adopted_id_has_no_event_of_an_earlier_life(driver: Driver) -> None:
    earlier = driver.start("a")
    driver.commit(earlier, earlier.row(), earlier.row(), earlier.end())
    driver.redis.delete("mlxs:job:a")  # by a hand; the events stay
    driver.redis.hset("rq:job:a", mapping=rq_fields())  # type: ignore[arg-type]
    driver.redis.rpush("rq:queue:tally:default", "a")
    attempt = driver.take()
    assert (attempt.job.seq, driver.events("a")) == (0, [])
    assert driver.commit(attempt, attempt.row(), attempt.end()) == ["OK", "OK"]
    assert [event.seq for event in driver.events("a")] == [1, 2]


def test_an_id_without_any_hash_is_dropped(driver: Driver) -> None:
    driver.redis.rpush("rq:queue:tally:default", "ghost")
    driver.enqueue("a")
    reply = driver.claim()
    assert ([job.job_id for job in reply.jobs], reply.dropped) == (["a"], ["ghost"])
    assert not driver.redis.exists("mlxs:job:ghost")


def test_a_second_entry_of_a_running_job_is_dropped(driver: Driver) -> None:
    attempt = driver.start("a")
    driver.redis.rpush("rq:queue:tally:default", "a")
    assert driver.claim("w2").dropped == ["a"]
    assert driver.commit(attempt, attempt.row()) == ["OK"]
    assert driver.record("a").owner == "w1"


def test_a_second_claim_raises_the_epoch_and_keeps_seq_and_start(driver: Driver) -> None:
    first = driver.start("a")
    driver.commit(first, first.row(), first.row())
    driver.release(first)
    second = driver.take("w2")
    assert (second.job.epoch, second.job.seq) == (2, 2)
    assert second.job.started_ms == first.job.started_ms
    assert second.job.first_token_ms > 0
    assert driver.record("a").owner == "w2"
