"""Commit, renew, release (D2, D3): a row is written once, in order, by its job's owner alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from mlx_serving.common.protocol.fields import JobField
from mlx_serving.common.states import JobState
from tests.support.protocol_driver import QUEUE, Attempt, Driver, payload

if TYPE_CHECKING:
    from collections.abc import Callable

    from mlx_serving.common.redis.local import LocalRedis

pytestmark = pytest.mark.may_leak(reason="jobs stay queued or running at the end of a test")


def seqs(driver: Driver, job_id: str = "a") -> list[int]:
    return [event.seq for event in driver.events(job_id)]


class TestRows:
    def test_rows_are_written_in_order_and_published(self, driver: Driver) -> None:
        attempt = driver.start("a")
        with driver.redis.pubsub(ignore_subscribe_messages=True) as pubsub:
            pubsub.subscribe("mlxs:ch:a")
            pubsub.get_message(timeout=1)
            rows = [attempt.row(), attempt.row(), attempt.row(publish=False)]
            assert driver.commit(attempt, *rows) == ["OK"] * 3
            heard = [pubsub.get_message(timeout=0.2) for _ in range(3)]
        assert [m["data"] for m in heard if m] == [payload(row) for row in rows[:2]]
        assert driver.protocol.read_events("a") == [payload(row) for row in rows]
        assert driver.record("a").seq == 3

    def test_a_resend_is_dup_and_publishes_nothing(self, driver: Driver) -> None:
        attempt = driver.start("a")
        rows = [attempt.row(), attempt.row()]
        driver.commit(attempt, *rows)
        before = driver.snapshot()
        with driver.redis.pubsub(ignore_subscribe_messages=True) as pubsub:
            pubsub.subscribe("mlxs:ch:a")
            pubsub.get_message(timeout=1)
            assert driver.commit(attempt, *rows) == ["DUP", "DUP"]
            assert pubsub.get_message(timeout=0.05) is None
        assert driver.snapshot() == before

    def test_a_resend_that_overlaps_writes_the_rest(self, driver: Driver) -> None:
        attempt = driver.start("a")
        rows = [attempt.row() for _ in range(3)]
        driver.commit(attempt, *rows[:2])
        assert driver.commit(attempt, *rows) == ["DUP", "DUP", "OK"]
        assert seqs(driver) == [1, 2, 3]

    def test_a_gap_is_refused(self, driver: Driver) -> None:
        attempt = driver.start("a")
        assert driver.commit(attempt, attempt.row(1), attempt.row(3), attempt.row(2)) == [
            "OK", "GAP", "OK",
        ]  # fmt: skip
        assert seqs(driver) == [1, 2]

    def test_an_event_that_could_not_be_published_is_written_once(self, driver: Driver) -> None:
        """The channel is the fast path alone: its refusal takes nothing from the stream."""
        attempt = driver.start("a")
        rows = [attempt.row(), attempt.row()]
        driver.redis.acl_setuser("default", reset_channels=True, enabled=True, nopass=True)
        try:
            assert driver.commit(attempt, *rows) == ["ERROR", "ERROR"]
        finally:
            driver.redis.acl_setuser("default", channels=["*"], enabled=True, nopass=True)
        assert driver.commit(attempt, *rows, attempt.row()) == ["DUP", "DUP", "OK"]
        assert (seqs(driver), driver.record("a").seq) == ([1, 2, 3], 3)

    def test_each_row_of_a_flush_stands_for_itself(self, driver: Driver) -> None:
        good, stolen, odd = (driver.start(job_id) for job_id in "abc")
        driver.lapse("b")
        driver.redis.delete("mlxs:ev:c")
        driver.redis.set("mlxs:ev:c", "not a stream")
        driver.redis.hset("mlxs:job:b", JobField.EPOCH, 2)
        rows = [odd.row(), stolen.row(), good.row(), good.end()]
        assert driver.commit(good, *rows) == ["ERROR", "FENCED", "OK", "OK"]
        assert driver.state("a") == "finished"
        # Every attempt of "c" would end like this one.
        assert (driver.state("c"), driver.record("c").error_code) == ("failed", "corrupt_job")

    def test_a_commit_renews_the_lease_by_redis_time(self, driver: Driver) -> None:
        attempt = driver.start("a")
        driver.lapse("a")
        driver.commit(attempt, attempt.row(), lease_ms=30_000)
        seconds, _ = driver.redis.time()
        score = driver.redis.zscore(driver.keys.leases(QUEUE), "a")
        assert score is not None
        assert 29_000 < score - seconds * 1000 < 32_000

    def test_a_full_redis_writes_no_half_row(self, driver: Driver) -> None:
        attempt = driver.start("a")
        used = driver.redis.info("memory")["used_memory"]
        driver.redis.config_set("maxmemory", used // 2)
        try:
            (reply,) = driver.commit_replies(attempt, attempt.row())
        finally:
            driver.redis.config_set("maxmemory", 0)
        assert reply.status == "ERROR"
        assert reply.reason.startswith("OOM")
        assert (seqs(driver), driver.record("a").seq) == ([], 0)
        assert driver.commit(attempt, attempt.row(1)) == ["OK"]


class TestFinish:
    def test_it_ends_the_job_everywhere_at_once(self, driver: Driver) -> None:
        attempt = driver.start("a", result_ttl=50)
        assert driver.commit(attempt, attempt.row(), attempt.end()) == ["OK", "OK"]
        record = driver.record("a")
        assert (record.state, record.seq) == (JobState.FINISHED, 2)
        assert record.finished_ms >= record.first_token_ms >= record.started_ms > 0
        assert (driver.listed(), driver.leased(), driver.indexed()) == ([], [], [])
        assert driver.rq_status("a") == "finished"
        assert driver.redis.zrange("rq:finished:tally:default", 0, -1) == [b"a"]
        assert not driver.redis.exists("rq:wip:tally:default", "rq:executions:a")
        for name in ("mlxs:job:a", "mlxs:ev:a", "rq:job:a", "rq:results:a"):
            assert 0 < driver.redis.ttl(name) <= 50, name

    def test_a_resend_of_the_whole_last_flush_is_dup_and_changes_nothing(
        self, driver: Driver
    ) -> None:
        attempt = driver.start("a")
        flush = [attempt.row(), attempt.end()]
        driver.commit(attempt, *flush)
        before = driver.snapshot()
        assert driver.commit(attempt, *flush) == ["DUP", "DUP"]
        assert driver.snapshot() == before

    @pytest.mark.parametrize(
        "state", [JobState.FINISHED, JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED]
    )
    def test_a_second_end_of_any_kind_is_fenced(self, driver: Driver, state: JobState) -> None:
        attempt = driver.start("a")
        driver.commit(attempt, attempt.end())
        before = driver.snapshot()
        assert driver.commit(attempt, attempt.end(state, seq=2)) == ["FENCED"]
        assert driver.commit(attempt, attempt.row(2)) == ["FENCED"]
        assert driver.snapshot() == before

    def test_rows_after_the_end_in_one_flush_are_fenced(self, driver: Driver) -> None:
        attempt = driver.start("a")
        rows = [attempt.row(), attempt.end(), attempt.row(), attempt.end(JobState.FAILED)]
        assert driver.commit(attempt, *rows) == ["OK", "OK", "FENCED", "FENCED"]
        assert (driver.state("a"), seqs(driver)) == ("finished", [1, 2])

    def test_no_job_that_ends_in_a_flush_keeps_a_lease(self, driver: Driver) -> None:
        a, b, c = (driver.start(job_id) for job_id in "abc")
        rows = [a.end(), b.row(), b.row(), b.end(), c.row()]
        assert driver.commit(a, *rows) == ["OK"] * 5
        assert (driver.leased(), driver.indexed()) == (["c"], ["c"])

    def test_rqs_counters_of_the_worker_count_each_end_once(self, driver: Driver) -> None:
        driver.redis.hset("rq:worker:w1", "birth", "now")
        driver.redis.expire("rq:worker:w1", 60)
        attempts = [driver.start(job_id) for job_id in "abc"]
        states = [JobState.FINISHED, JobState.FINISHED, JobState.FAILED]
        ends = [a.end(s) for a, s in zip(attempts, states, strict=True)]
        for _ in range(2):
            driver.commit(attempts[0], *ends)
        counts = driver.redis.hmget("rq:worker:w1", "successful_job_count", "failed_job_count")
        assert counts == [b"2", b"1"]

    def test_an_end_with_a_gap_does_not_end(self, driver: Driver) -> None:
        attempt = driver.start("a")
        assert driver.commit(attempt, attempt.end(seq=2)) == ["GAP"]
        assert driver.state("a") == "running"


def reaped(driver: Driver, attempt: Attempt) -> None:
    driver.lapse(attempt.job.job_id)
    assert driver.reap().outcomes == [(attempt.job.job_id, "requeued")]


def taken_over(driver: Driver, attempt: Attempt) -> None:
    reaped(driver, attempt)
    assert driver.take("w2").job.epoch == 2


def taken_over_and_finished(driver: Driver, attempt: Attempt) -> None:
    reaped(driver, attempt)
    other = driver.take("w2")
    driver.commit(other, other.row(), other.end())


def back_with_the_same_worker(driver: Driver, attempt: Attempt) -> None:
    reaped(driver, attempt)
    assert driver.take("w1").job.epoch == 2


def cancelled_by_the_reaper(driver: Driver, _: Attempt) -> None:
    driver.cancel("a")
    driver.lapse("a")
    assert driver.reap().outcomes == [("a", "cancelled")]


def deleted(driver: Driver, _: Attempt) -> None:
    driver.redis.delete("mlxs:job:a", "mlxs:ev:a", "rq:job:a")


def but_for_losses(driver: Driver) -> tuple[dict[bytes, bytes], dict[bytes, bytes]]:
    """All that Redis holds, but the losses of job `a`: a worker that is back takes its own back."""
    keys, name = driver.snapshot(), driver.keys.job("a")
    fields: Any = driver.redis.hgetall(name)
    return (
        {key: value for key, value in keys.items() if key != name.encode()},
        {field: value for field, value in fields.items() if field != JobField.LOSSES.encode()},
    )


@pytest.mark.usefixtures("_settled")
class TestZombie:
    """D3: whatever became of its job, a worker that lost it writes nothing anywhere."""

    @pytest.fixture
    def _settled(self, settled: Driver) -> None:
        del settled

    @pytest.mark.parametrize(
        "lose",
        [
            reaped,
            taken_over,
            taken_over_and_finished,
            back_with_the_same_worker,
            cancelled_by_the_reaper,
            deleted,
        ],
    )
    @pytest.mark.parametrize("committed", [0, 2])
    def test_it_is_fenced(
        self, driver: Driver, lose: Callable[[Driver, Attempt], None], committed: int
    ) -> None:
        zombie = driver.start("a")
        if committed:
            driver.commit(zombie, *(zombie.row() for _ in range(committed)))
        lose(driver, zombie)
        before = but_for_losses(driver)
        at = zombie.seq
        ends = [zombie.end(state, at + 1) for state in (JobState.FINISHED, JobState.CANCELLED)]
        rows = [zombie.row(at + 1, "zombie"), zombie.row(at + 2, "zombie"), *ends]
        assert driver.commit(zombie, *rows) == ["FENCED"] * 4
        assert driver.renew(zombie).status == "FENCED"
        released = driver.release(zombie)
        assert released == (["DUP"] if lose is reaped else ["FENCED"])
        assert but_for_losses(driver) == before

    def test_a_row_of_the_right_attempt_by_another_workers_name_is_fenced(
        self, driver: Driver
    ) -> None:
        attempt = driver.start("a")
        before = driver.snapshot()
        rows = [attempt.row(), attempt.end()]
        assert driver.commit(attempt, *rows, worker="w2") == ["FENCED"] * 2
        assert driver.snapshot() == before
        driver.commit(attempt, *rows)
        ended = driver.snapshot()
        assert driver.commit(attempt, *rows, worker="w2") == ["FENCED"] * 2  # no resend of its own
        assert driver.snapshot() == ended


@pytest.fixture
def settled(driver: Driver, settled_redis: LocalRedis) -> Driver:
    del settled_redis
    return driver


class TestRenew:
    def test_it_moves_the_deadline_and_brings_the_reason(self, driver: Driver) -> None:
        attempt = driver.start("a")
        driver.lapse("a")
        assert driver.renew(attempt) == driver.renew(attempt)
        assert (driver.redis.zscore(driver.keys.leases(QUEUE), "a") or 0) > 1
        driver.cancel("a", "because")
        reply = driver.renew(attempt)
        assert (reply.status, reply.reason) == ("OK", "because")

    @pytest.mark.parametrize(
        ("status", "reason"), [("canceled", "cancelled"), ("stopped", "cancelled")]
    )
    def test_it_sees_what_a_stock_tool_wrote(
        self, driver: Driver, status: str, reason: str
    ) -> None:
        attempt = driver.start("a")
        driver.redis.hset("rq:job:a", "status", status)
        assert driver.renew(attempt).reason == reason
        assert driver.record("a").cancel_reason == reason

    def test_another_workers_name_is_fenced(self, driver: Driver) -> None:
        attempt = driver.start("a")
        assert driver.renew(Attempt(attempt.job, "w2")).status == "FENCED"


class TestRelease:
    def test_jobs_go_to_the_front_in_their_order_uncharged(self, driver: Driver) -> None:
        first, second = driver.start("a"), driver.start("b")
        driver.enqueue("c")
        # As the worker does: last first, each to the front.
        assert driver.release(second, first) == ["OK", "OK"]
        assert driver.listed() == ["a", "b", "c"]
        record = driver.record("a")
        assert (record.state.value, record.attempts, record.owner) == ("queued", 0, "")
        assert driver.rq_status("a") == "queued"
        assert not driver.redis.exists("rq:wip:tally:default", "rq:execution:a:1")

    def test_a_resend_is_dup_and_does_not_enqueue_twice(self, driver: Driver) -> None:
        attempt = driver.start("a")
        assert [driver.release(attempt), driver.release(attempt)] == [["OK"], ["DUP"]]
        assert driver.listed() == ["a"]

    def test_events_go_on_where_they_stood(self, driver: Driver) -> None:
        first = driver.start("a")
        driver.commit(first, first.row(), first.row())
        driver.release(first)
        second = driver.take("w2")
        assert driver.commit(second, second.row(), second.end()) == ["OK", "OK"]
        assert seqs(driver) == [1, 2, 3, 4]

    def test_a_job_cancelled_meanwhile_ends_instead(self, driver: Driver) -> None:
        attempt = driver.start("a")
        driver.commit(attempt, attempt.row())
        driver.cancel("a")
        assert driver.release(attempt) == ["OK"]
        assert (driver.state("a"), driver.listed(), seqs(driver)) == ("cancelled", [], [1, 2])
        assert driver.release(attempt) == ["FENCED"]

    def test_it_wakes_a_worker(self, driver: Driver) -> None:
        attempt = driver.start("a")
        with driver.redis.pubsub(ignore_subscribe_messages=True) as pubsub:
            pubsub.subscribe(driver.keys.wake(QUEUE))
            pubsub.get_message(timeout=1)
            driver.release(attempt)
            message = None
            while message is None:
                message = pubsub.get_message(timeout=1)
        assert message["data"] == b"a"
