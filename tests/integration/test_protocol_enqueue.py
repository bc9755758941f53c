"""Enqueue (D1): once however often it is sent, and never half."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from mlx_serving.common import lifetimes
from mlx_serving.common.protocol import calls
from mlx_serving.common.protocol.refusal import Refusal
from mlx_serving.common.states import JobState
from tests.support.protocol_driver import LANES, PAYLOAD, QUEUE, Driver, entry

if TYPE_CHECKING:
    from mlx_serving.common.redis.local import LocalRedis

pytestmark = pytest.mark.may_leak(reason="jobs stay queued or running at the end of a test")


def test_a_new_job_is_on_its_list_in_the_index_and_in_rqs_hash(driver: Driver) -> None:
    reply = driver.enqueue("a")
    assert (reply.created, reply.state) == (True, JobState.QUEUED)
    assert driver.listed() == driver.indexed() == ["a"]
    assert driver.rq_status("a") == "queued"
    assert driver.redis.smembers("rq:queues") == {b"rq:queue:tally:default"}
    record = driver.record("a")
    assert (record.epoch, record.seq, record.attempts, record.owner) == (0, 0, 0, "")
    assert record.enqueued_ms > 0


def test_a_resend_changes_nothing(driver: Driver) -> None:
    driver.enqueue("a")
    before = driver.snapshot()
    reply = driver.enqueue("a", max_attempts=9, deadline_ms=5)
    assert (reply.created, reply.state) == (False, JobState.QUEUED)
    assert driver.snapshot() == before


def test_a_resend_with_another_digest_is_refused_and_changes_nothing(driver: Driver) -> None:
    driver.enqueue("a", digest="0011")
    before = driver.snapshot()
    reply = driver.enqueue("a", digest="0022")
    assert (reply.created, reply.refusal) == (False, Refusal("digest"))
    assert driver.enqueue("a", digest="0011").refusal is None
    assert driver.enqueue("a").refusal is None  # one that has no digest is not compared
    assert driver.snapshot() == before


def test_a_resend_in_one_pipeline_changes_nothing(driver: Driver) -> None:
    replies = driver.protocol.run_many([calls.enqueue(entry("a")) for _ in range(3)])
    assert [reply.created for reply in replies] == [True, False, False]
    assert driver.listed() == ["a"]


@pytest.mark.parametrize("state", ["running", "finished", "cancelled"])
def test_a_resend_answers_the_state_it_has_by_now(driver: Driver, state: str) -> None:
    if state == "cancelled":
        driver.enqueue("a")
        driver.cancel("a")
    else:
        attempt = driver.start("a")
        if state == "finished":
            driver.commit(attempt, attempt.end())
    before = driver.snapshot()
    reply = driver.enqueue("a")
    assert (reply.created, reply.state.value) == (False, state)
    assert driver.snapshot() == before
    assert driver.listed() == []


def test_a_dropped_reply_then_a_resend_leaves_one_job(
    driver: Driver, local_redis: LocalRedis
) -> None:
    call = calls.enqueue(entry("a"))
    with local_redis.client() as other:
        lost = Driver(other)
        connection = other.connection_pool.get_connection()
        script = lost.protocol._scripts["enqueue"]
        connection.send_command("EVAL", script.script, 0, "mlxs", "rq", *call.arguments)
        connection.disconnect()  # the reply is never read
    while not driver.redis.exists("mlxs:job:a"):
        pass
    assert driver.protocol.run(call).created is False
    assert driver.listed() == ["a"]
    assert driver.claimed_ids() == ["a"]


def test_a_deadline_is_fixed_by_redis_time(driver: Driver) -> None:
    seconds, micros = driver.redis.time()
    driver.enqueue("a", deadline_ms=5_000)
    assert 0 <= driver.record("a").deadline_ms - (seconds * 1000 + micros // 1000) - 5_000 < 1_000
    assert driver.redis.zscore("mlxs:deadlines", "a") == driver.record("a").deadline_ms
    driver.enqueue("b")
    assert driver.record("b").deadline_ms == 0
    due = driver.record("b").enqueued_ms + 1000 * lifetimes.DEFAULT.queued
    assert driver.redis.zscore("mlxs:deadlines", "b") == due


def test_it_wakes_idle_workers(driver: Driver) -> None:
    with driver.redis.pubsub(ignore_subscribe_messages=True) as pubsub:
        pubsub.subscribe(driver.keys.wake(QUEUE))
        pubsub.get_message(timeout=1)
        driver.enqueue("a")
        message = None
        while message is None:
            message = pubsub.get_message(timeout=1)
        assert message["data"] == b"a"


@pytest.mark.parametrize("kind", ["rq hash", "events", "results"])
def test_what_an_earlier_life_left_under_the_id_does_not_leak_into_the_new_job(
    driver: Driver, kind: str
) -> None:
    """Stale keys, of whatever type: no half-enqueued job, no foreign field, no old event."""
    names = {"rq hash": "rq:job:a", "events": "mlxs:ev:a", "results": "rq:results:a"}
    driver.redis.set(names[kind], "not what belongs here")
    assert driver.enqueue("a").created
    attempt = driver.take()
    assert attempt.job.data == PAYLOAD
    assert driver.commit(attempt, attempt.row(), attempt.end()) == ["OK", "OK"]
    assert driver.redis.xlen("rq:results:a") == 1


def test_a_stale_callback_field_is_not_inherited(driver: Driver) -> None:
    driver.redis.hset("rq:job:a", "success_callback_name", "os.system")
    driver.enqueue("a")
    assert driver.take().job.problem == ""


def test_each_lane_has_a_list_of_its_own(driver: Driver) -> None:
    for lane in LANES:
        driver.enqueue(lane.partition(":")[2], lane)
    assert [driver.listed(lane) for lane in LANES] == [["interactive"], ["default"], ["bulk"]]
