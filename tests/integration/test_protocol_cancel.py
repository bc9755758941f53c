"""Cancel (D8) in every state: at once or flagged, and the same however often it is sent."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from mlx_serving.common.protocol.fields import JobField
from mlx_serving.common.states import JobState

if TYPE_CHECKING:
    from tests.support.protocol_driver import Driver

pytestmark = pytest.mark.may_leak(reason="jobs stay running at the end of a test")


def test_a_queued_job_ends_at_once(driver: Driver) -> None:
    driver.enqueue("a")
    assert driver.cancel("a", "not needed") is JobState.CANCELLED
    assert (driver.listed(), driver.indexed()) == ([], [])
    (end,) = driver.events("a")
    assert (end.type, end.seq, end.state) == ("end", 1, "cancelled")
    assert end.error is not None
    assert (end.error.code, end.error.message) == ("cancelled", "not needed")
    assert driver.rq_status("a") == "canceled"
    assert driver.redis.zrange("rq:canceled:tally:default", 0, -1) == [b"a"]


def test_the_end_event_is_published_and_its_message_quoted(driver: Driver) -> None:
    driver.enqueue("a")
    with driver.redis.pubsub(ignore_subscribe_messages=True) as pubsub:
        pubsub.subscribe("mlxs:ch:a")
        pubsub.get_message(timeout=1)
        driver.cancel("a", 'quote " backslash \\ newline \n é')
        message = pubsub.get_message(timeout=1)
    assert message is not None
    (end,) = driver.events("a")
    assert driver.protocol.read_events("a") == [message["data"]]
    assert end.error is not None
    assert end.error.message == 'quote " backslash \\ newline \n é'


def test_a_running_job_is_flagged_and_its_worker_told(driver: Driver) -> None:
    attempt = driver.start("a")
    with driver.redis.pubsub(ignore_subscribe_messages=True) as pubsub:
        pubsub.subscribe(driver.keys.control("w1"))
        pubsub.get_message(timeout=1)
        assert driver.cancel("a", "because") is JobState.RUNNING
        message = pubsub.get_message(timeout=1)
    assert message is not None
    assert message["data"] == b"cancel a"
    (reply,) = driver.commit_replies(attempt, attempt.row())
    assert (reply.status, reply.reason) == ("OK", "because")
    assert driver.commit(attempt, attempt.end(JobState.CANCELLED)) == ["OK"]
    assert driver.state("a") == "cancelled"


def test_the_first_reason_stands(driver: Driver) -> None:
    driver.start("a")
    driver.cancel("a", "first")
    driver.cancel("a", "second")
    assert driver.record("a").cancel_reason == "first"


def test_a_worker_that_finished_before_it_saw_the_flag_wins(driver: Driver) -> None:
    attempt = driver.start("a")
    driver.cancel("a")
    assert driver.commit(attempt, attempt.row(), attempt.end()) == ["OK", "OK"]
    assert driver.cancel("a") is JobState.FINISHED


@pytest.mark.parametrize(
    "state", [JobState.FINISHED, JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED]
)
def test_a_job_that_ended_stays_as_it_is(driver: Driver, state: JobState) -> None:
    attempt = driver.start("a")
    driver.commit(attempt, attempt.end(state))
    before = driver.snapshot()
    assert [driver.cancel("a"), driver.cancel("a")] == [state, state]
    assert driver.snapshot() == before


@pytest.mark.parametrize("start", ["queued", "running"])
def test_a_second_cancel_changes_nothing(driver: Driver, start: str) -> None:
    driver.enqueue("a")
    if start == "running":
        driver.take()
    first = driver.cancel("a")
    before = driver.snapshot()
    assert driver.cancel("a") is first
    assert driver.snapshot() == before


def test_an_unknown_job_is_none(driver: Driver) -> None:
    before = driver.snapshot()
    assert driver.cancel("nobody") is None
    assert driver.snapshot() == before


def test_a_handed_over_job_keeps_its_events(driver: Driver) -> None:
    attempt = driver.start("a")
    driver.commit(attempt, attempt.row(), attempt.row())
    driver.release(attempt)
    assert driver.cancel("a") is JobState.CANCELLED
    assert [(e.seq, e.type) for e in driver.events("a")] == [
        (1, "tokens"),
        (2, "tokens"),
        (3, "end"),
    ]


@pytest.mark.parametrize("reason", ["deadline_exceeded", "timeout", "abandoned"])
def test_reasons_of_time_lead_to_expired(driver: Driver, reason: str) -> None:
    driver.enqueue("a")
    assert driver.cancel("a", reason) is JobState.EXPIRED
    assert driver.record("a").error_code == reason
    assert driver.rq_status("a") == "failed"


class TestAbandoned:
    """`abandon_after`: nobody listens, told by the receivers of each publish."""

    def test_a_job_that_nobody_listens_to_is_told_to_end(self, driver: Driver) -> None:
        attempt = driver.start("a", abandon_ms=50)
        driver.redis.hset("mlxs:job:a", JobField.STARTED_MS, 1)  # it started long ago
        assert driver.commit_replies(attempt, attempt.row())[0].reason == "abandoned"

    def test_a_listener_keeps_it(self, driver: Driver) -> None:
        attempt = driver.start("a", abandon_ms=50)
        driver.redis.hset("mlxs:job:a", JobField.STARTED_MS, 1)
        with driver.redis.pubsub(ignore_subscribe_messages=True) as pubsub:
            pubsub.subscribe("mlxs:ch:a")
            pubsub.get_message(timeout=1)
            assert driver.commit_replies(attempt, attempt.row())[0].reason == ""

    def test_it_does_not_overwrite_a_cancel(self, driver: Driver) -> None:
        attempt = driver.start("a", abandon_ms=50)
        driver.redis.hset("mlxs:job:a", JobField.STARTED_MS, 1)
        driver.cancel("a", "because")
        assert driver.commit_replies(attempt, attempt.row())[0].reason == "because"
        assert driver.record("a").cancel_reason == "because"

    def test_a_job_that_does_not_stream_is_never_abandoned(self, driver: Driver) -> None:
        attempt = driver.start("a", abandon_ms=50, stream=False)
        driver.redis.hset("mlxs:job:a", JobField.STARTED_MS, 1)
        assert driver.commit_replies(attempt, attempt.row(publish=False))[0].reason == ""
