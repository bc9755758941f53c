"""Odd keys under a job's id, as a hand or a stock tool may leave them: nobody else is stopped."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import redis

from mlx_serving.common.attempts import new_nonce
from mlx_serving.common.protocol import calls
from mlx_serving.common.protocol.fields import JobField
from mlx_serving.common.states import JobState
from tests.support.helpers import wait_until
from tests.support.protocol_driver import LANES, QUEUE, Attempt, Driver

if TYPE_CHECKING:
    from collections.abc import Callable


pytestmark = [
    pytest.mark.usefixtures("settled_redis"),
    pytest.mark.may_leak(reason="odd keys have no TTL"),
]


def wrong_type(key: str) -> Callable[[Driver], None]:
    def mangle(driver: Driver) -> None:
        driver.redis.delete(key)
        driver.redis.set(key, "of another type")

    return mangle


def field(name: str, value: str | None) -> Callable[[Driver], None]:
    def mangle(driver: Driver) -> None:
        if value is None:
            driver.redis.hdel("mlxs:job:odd", name)
        else:
            driver.redis.hset("mlxs:job:odd", name, value)

    return mangle


def ahead(driver: Driver) -> None:
    driver.redis.xadd("mlxs:ev:odd", {"e": "x"}, id="1000000-0")


def gone(driver: Driver) -> None:
    driver.redis.delete("mlxs:job:odd", "rq:job:odd")


ODDITIES = {
    "control hash of wrong type": wrong_type("mlxs:job:odd"),
    "control hash without state": field(JobField.STATE, None),
    "control hash with an unknown state": field(JobField.STATE, "sleeping"),
    "control hash without queue": field(JobField.QUEUE, None),
    "control hash without owner": field(JobField.OWNER, None),
    "control hash without cancel reason": field(JobField.CANCEL_REASON, None),
    "epoch is no number": field(JobField.EPOCH, "x"),
    "seq is no number": field(JobField.SEQ, "1.5"),
    "seq is missing": field(JobField.SEQ, None),
    "attempts is no number": field(JobField.CRASHES, "many"),
    "deadline is no number": field(JobField.DEADLINE_MS, "soon"),
    "ttl is negative": field(JobField.RESULT_TTL, "-3"),
    "start time is no number": field(JobField.STARTED_MS, "then"),
    "RQ hash of wrong type": wrong_type("rq:job:odd"),
    "events of wrong type": wrong_type("mlxs:ev:odd"),
    "events ahead of the hash": ahead,
    "results of wrong type": wrong_type("rq:results:odd"),
    "executions of wrong type": wrong_type("rq:executions:odd"),
    "everything gone": gone,
}


@pytest.fixture(params=ODDITIES)
def mangle(request: pytest.FixtureRequest) -> Callable[[Driver], None]:
    return ODDITIES[request.param]


def open_places(driver: Driver) -> list[str]:
    return [*driver.listed(), *driver.leased(), *driver.indexed()]


def end_what_is_left(driver: Driver) -> None:
    """Run the jobs, where they still can, until they are dead at the latest."""
    for _ in range(8):
        for job in driver.claim("w9").jobs:
            blame = calls.Blame(job.attempt, max_unproven=1, alone=True)
            driver.protocol.run(calls.crash("w9", [blame]))
        driver.reap()
        candidates = driver.indexed()
        driver.protocol.run(calls.reconcile(QUEUE, candidates, lease_ms=1))


def test_a_queued_one_neither_stops_a_claim_nor_stays(
    driver: Driver, mangle: Callable[[Driver], None]
) -> None:
    driver.enqueue("odd", max_attempts=2)
    driver.enqueue("good")
    mangle(driver)
    assert "good" in driver.claimed_ids()
    driver.cancel("good")
    driver.lapse("good", "odd")
    driver.reap()
    end_what_is_left(driver)
    assert open_places(driver) == []


def test_a_running_one_stops_neither_commit_renew_nor_release_of_others(
    driver: Driver, mangle: Callable[[Driver], None]
) -> None:
    odd, good = driver.start("odd", max_attempts=1), driver.start("good")
    mangle(driver)
    statuses = driver.commit(good, odd.row(), good.row(), odd.end(), good.row())
    assert (statuses[1], statuses[3]) == ("OK", "OK")
    held = [odd.job.attempt, good.job.attempt]
    renewed = driver.protocol.run(calls.renew("w1", held, lease_ms=60_000))
    assert renewed[1].status == "OK"
    assert driver.release(odd, good)[1] == "OK"
    assert "good" in driver.listed()


@pytest.mark.parametrize("call", ["renew", "release", "recall"])
def test_a_running_one_that_still_holds_its_lease_stops_no_call_on_others(
    driver: Driver, mangle: Callable[[Driver], None], call: str
) -> None:
    nonce = new_nonce()
    driver.enqueue("odd")
    driver.enqueue("good")
    odd, good = (Attempt(job, "w1") for job in driver.claim(nonce=nonce).jobs)
    mangle(driver)
    if call == "renew":
        held = [odd.job.attempt, good.job.attempt]
        renewed = driver.protocol.run(calls.renew("w1", held, lease_ms=60_000))
        assert renewed[1].status == "OK"
    elif call == "release":
        assert driver.release(odd, good)[1] == "OK"
    else:
        assert "good" in [job.job_id for job in driver.claim(nonce=nonce, most=0).jobs]


def test_a_running_one_does_not_stop_the_reaper(
    driver: Driver, mangle: Callable[[Driver], None]
) -> None:
    for job_id in ("odd", "good"):
        driver.start(job_id, max_attempts=2)
    mangle(driver)
    driver.lapse("odd", "good")
    assert ("good", "requeued") in driver.reap().outcomes
    end_what_is_left(driver)
    assert open_places(driver) == []


def test_a_deadline_of_one_does_not_stop_the_reaper(
    driver: Driver, mangle: Callable[[Driver], None]
) -> None:
    driver.enqueue("odd")
    driver.enqueue("good", deadline_ms=1)
    driver.redis.zadd("mlxs:deadlines", {"odd": 1})
    mangle(driver)
    while driver.state("good") != "expired":
        driver.reap()
    assert not driver.redis.exists("mlxs:deadlines")


def test_cancelling_one_answers(driver: Driver, mangle: Callable[[Driver], None]) -> None:
    driver.enqueue("odd")
    mangle(driver)
    assert driver.cancel("odd") in {None, JobState.CANCELLED, JobState.FAILED}


@pytest.mark.parametrize("key", ["rq:finished", "rq:failed", "rq:canceled", "rq:wip"])
def test_a_registry_of_wrong_type_decides_nothing(driver: Driver, key: str) -> None:
    """RQ's registries are a view."""
    driver.redis.set(f"{key}:tally:default", "of another type")
    attempt = driver.start("a")
    assert driver.commit(attempt, attempt.row(), attempt.end()) == ["OK", "OK"]
    assert driver.state("a") == "finished"
    other = driver.start("b")
    driver.release(other)
    driver.take()
    driver.lapse("b")
    assert driver.reap().outcomes == [("b", "requeued")]


def test_a_wrong_type_of_rqs_set_of_queues_does_not_stop_the_reaper(driver: Driver) -> None:
    driver.start("a")
    driver.redis.set("rq:queues", "of another type")
    driver.lapse("a")
    assert driver.reap(queues=LANES).outcomes == [("a", "requeued")]


def test_one_that_can_be_read_ends_as_failed_with_an_end_event(driver: Driver) -> None:
    driver.enqueue("odd")
    field(JobField.EPOCH, "x")(driver)
    assert driver.claim().dropped == ["odd"]
    record = driver.record("odd")
    assert (record.state.value, record.error_code) == ("failed", "corrupt_job")
    (end,) = driver.events("odd")
    assert (end.type, end.state) == ("end", "failed")
    assert driver.rq_status("odd") == "failed"
    assert driver.redis.ttl("mlxs:job:odd") > 0


def clock(driver: Driver) -> int:
    """Redis's time in microseconds."""
    seconds, microseconds = driver.redis.time()
    return seconds * 1_000_000 + microseconds


def test_a_full_redis_loses_no_job(driver: Driver) -> None:
    """Writes are refused: a script must not take a good job off its list for that."""
    driver.enqueue("late", deadline_ms=1)
    driver.enqueue("a")
    enqueued = driver.redis.time()
    wait_until(
        lambda: driver.redis.time() > (enqueued[0], enqueued[1] + 2000), what="deadline passed"
    )
    driver.redis.config_set("maxmemory", driver.redis.info("memory")["used_memory"] // 2)
    try:
        for call in (driver.claim, driver.reap, lambda: driver.enqueue("b")):
            try:
                call()
            except redis.RedisError as error:
                assert "OOM" in str(error) or "memory" in str(error)  # noqa: PT017
    finally:
        driver.redis.config_set("maxmemory", 0)
    driver.lapse("a")
    driver.reap()
    driver.claim()
    assert driver.state("late") == "expired"
    assert driver.state("a") == "running"
