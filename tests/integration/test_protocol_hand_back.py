"""A job that goes back to its queue: a stock cancel ends it instead, old attempts move nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from rq.job import Job
from rq.serializers import JSONSerializer

from mlx_serving.common.protocol import calls
from tests.support.protocol_driver import QUEUE, Attempt, Driver

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [
    pytest.mark.usefixtures("settled_redis"),
    pytest.mark.may_leak(reason="jobs stay queued or running at the end of a test"),
]


def release(driver: Driver, attempt: Attempt) -> None:
    assert driver.release(attempt) == ["OK"]


def crash(driver: Driver, attempt: Attempt) -> None:
    blame = calls.Blame(attempt.job.attempt, max_unproven=1)
    assert driver.protocol.run(calls.crash(attempt.worker, [blame])) == [("a", "cancelled")]


def child_died(driver: Driver, attempt: Attempt) -> None:
    blame = calls.Blame(attempt.job.attempt)
    assert driver.protocol.run(calls.crash(attempt.worker, [blame])) == [("a", "cancelled")]


def reap(driver: Driver, attempt: Attempt) -> None:
    driver.lapse(attempt.job.job_id)
    assert driver.reap().outcomes == [("a", "cancelled")]


def cancel(driver: Driver) -> None:
    Job.fetch("a", connection=driver.redis, serializer=JSONSerializer).cancel()


def stop(driver: Driver) -> None:
    """What RQ's own worker writes of a job that it stopped."""
    driver.redis.hset("rq:job:a", "status", "stopped")


def delete(driver: Driver) -> None:
    Job.fetch("a", connection=driver.redis, serializer=JSONSerializer).delete()


@pytest.mark.parametrize("way", [release, crash, child_died, reap])
@pytest.mark.parametrize("stock", [cancel, stop, delete])
def test_a_stock_cancel_of_a_running_job_survives(
    driver: Driver, way: Callable[[Driver, Attempt], None], stock: Callable[[Driver], None]
) -> None:
    attempt = driver.start("a")
    driver.commit(attempt, attempt.row())
    stock(driver)
    way(driver, attempt)
    assert driver.state("a") == "cancelled"
    assert driver.claim("w2").jobs == []
    assert (driver.listed(), driver.leased(), driver.indexed()) == ([], [], [])
    assert [event.type for event in driver.events("a")] == ["tokens", "end"]
    assert driver.rq_status("a") == (None if stock is delete else "canceled")
    assert bool(driver.redis.zscore(f"rq:canceled:{QUEUE}", "a")) == (stock is not delete)


def test_a_release_of_an_older_attempt_is_fenced(driver: Driver) -> None:
    older = driver.start("a")
    driver.release(older)
    assert driver.release(older) == ["DUP"]
    newer = driver.take()
    assert driver.release(older) == ["FENCED"]
    driver.release(newer)
    assert driver.release(older) == ["FENCED"]  # queued, but not by this attempt
    assert driver.release(newer) == ["DUP"]


@pytest.mark.parametrize("max_unproven", [0, 1])
def test_a_late_verdict_takes_nothing_from_the_same_workers_next_child(
    driver: Driver, max_unproven: int
) -> None:
    older = driver.start("a")
    driver.release(older)
    newer = driver.take()
    blame = calls.Blame(older.job.attempt, max_unproven, alone=True)
    assert driver.protocol.run(calls.crash("w1", [blame])) == [("a", "gone")]
    assert (driver.state("a"), driver.record("a").attempts) == ("running", 0)
    driver.release(newer)
    assert driver.protocol.run(calls.crash("w1", [blame])) == [("a", "gone")]
    assert driver.record("a").attempts == 0
