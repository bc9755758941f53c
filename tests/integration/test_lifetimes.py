"""How long Redis keeps what it holds of a job, and who may end that earlier (D11)."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from mlx_serving.common.lifetimes import Lifetimes
from mlx_serving.common.protocol import calls, ended_calls
from mlx_serving.common.protocol.fields import JobField
from mlx_serving.common.protocol.refusal import Refusal
from mlx_serving.common.redis.connection import connect, resolve
from mlx_serving.common.settings import Settings
from mlx_serving.common.states import JobState
from tests.support.helpers import wait_until
from tests.support.odd_keys import PLANTS, plant
from tests.support.paths import ROOT
from tests.support.protocol_driver import PAYLOAD, QUEUE, Attempt, Driver, rq_fields
from tests.support.redis_users import as_user
from tests.support.worker_process import quick_settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlx_serving.common.protocol.client import JobRecord
    from mlx_serving.common.redis.local import LocalRedis

pytestmark = pytest.mark.usefixtures("settled_redis")

ENDS = (JobState.FINISHED, JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED)
KEPT = Lifetimes(queued=3_000, events=20, failed=2_000)
RESULT_TTL = 100


def end(driver: Driver, state: JobState = JobState.FINISHED, **fields: Any) -> None:
    """A job `a` that a worker ended."""
    given: dict[str, Any] = {"result_ttl": RESULT_TTL, "lifetimes": KEPT} | fields
    attempt = driver.start("a", **given)
    driver.commit(attempt, attempt.row(), attempt.end(state))


def die(driver: Driver, attempt: Attempt) -> None:
    blame = calls.Blame(attempt.job.attempt, max_unproven=1, alone=True)
    assert driver.protocol.run(calls.crash(attempt.worker, [blame])) == [("a", "dead")]


def ttls(driver: Driver) -> dict[str, int]:
    """Seconds that each key of job `a` is kept."""
    keys = driver.keys
    names = {"job": keys.job("a"), "events": keys.events("a"), "payload": keys.rq_job("a")}
    return {what: driver.redis.ttl(name) for what, name in names.items()}


def about(**seconds: int) -> Any:
    return pytest.approx(seconds, abs=2)


@contextmanager
def a_producer(server: LocalRedis) -> Iterator[Driver]:
    """The user of `ops/redis/users.acl`."""
    lines = (ROOT / "ops" / "redis" / "users.acl").read_text().splitlines()
    (rules,) = (line.split()[2:] for line in lines if line.startswith("user producer"))
    with server.client() as admin:
        admin.execute_command("ACL", "SETUSER", "producer", *rules)
        url = as_user(server.url, "producer", "change-me-producer")
        with connect(resolve(quick_settings(url))) as client:
            yield Driver(client)
        admin.execute_command("ACL", "DELUSER", "producer")


class TestEnded:
    @pytest.mark.parametrize("state", ENDS)
    def test_each_key_has_its_own_time(self, driver: Driver, state: JobState) -> None:
        end(driver, state)
        kept = KEPT.failed if state is JobState.FAILED else RESULT_TTL
        assert ttls(driver) == about(job=kept, events=KEPT.events, payload=kept)

    @pytest.mark.parametrize("state", ENDS)
    def test_events_are_never_kept_longer_than_the_result_nor_a_failed_job_shorter(
        self, driver: Driver, state: JobState
    ) -> None:
        end(driver, state, lifetimes=Lifetimes(events=5_000, failed=1))
        assert ttls(driver) == about(job=RESULT_TTL, events=RESULT_TTL, payload=RESULT_TTL)

    def test_a_job_that_ended_without_a_result_record_keeps_its_events(
        self, driver: Driver
    ) -> None:
        """They are its only output."""
        attempt = driver.start("a", result_ttl=RESULT_TTL, lifetimes=KEPT)
        driver.commit(attempt, attempt.row())
        driver.release(attempt)
        driver.cancel("a")
        assert driver.record("a").result == b""
        assert ttls(driver) == about(job=RESULT_TTL, events=RESULT_TTL, payload=RESULT_TTL)

    def test_a_dead_job_keeps_its_payload_and_what_it_said(self, driver: Driver) -> None:
        attempt = driver.start("a", result_ttl=RESULT_TTL, lifetimes=KEPT, max_attempts=1)
        driver.commit(attempt, attempt.row())
        die(driver, attempt)
        assert ttls(driver) == about(job=KEPT.failed, events=KEPT.failed, payload=KEPT.failed)

    def test_a_job_of_rqs_own_enqueue_has_the_defaults(self, driver: Driver) -> None:
        driver.redis.hset("rq:job:a", mapping=rq_fields())  # type: ignore[arg-type]
        driver.redis.rpush("rq:queue:tally:default", "a")
        attempt = driver.take()
        driver.commit(attempt, attempt.end(JobState.FAILED))
        default = Lifetimes()
        assert ttls(driver) == about(
            job=default.failed, events=default.events, payload=default.failed
        )


class TestUnserved:
    """`queued_ttl`"""

    BRIEF = Lifetimes(queued=1)

    @staticmethod
    def reaped(driver: Driver) -> JobRecord:
        """The job, ended by a worker of other queues."""
        wait_until(lambda: driver.reap(queues=["other:default"]).outcomes == [("a", "expired")])
        return driver.record("a")

    def test_a_job_that_nobody_takes_ends_and_its_end_names_the_queue_and_the_time(
        self, driver: Driver
    ) -> None:
        driver.enqueue("a", "mispelt:bulk", lifetimes=self.BRIEF, tenant="acme")
        record = self.reaped(driver)
        assert (record.state, record.error_code) == (JobState.EXPIRED, "unserved")
        assert record.message == (
            "no worker took the job from the queue mispelt:bulk for 1 s (queued_ttl)"
        )
        (last,) = driver.events("a")
        assert (last.type, last.state, last.error and last.error.code) == (
            "end",
            "expired",
            "unserved",
        )
        assert driver.listed("mispelt:bulk") == driver.indexed("mispelt:bulk") == []
        assert not driver.redis.exists("mlxs:deadlines", "mlxs:tenant:acme:queued", "mlxs:tenants")

    def test_it_needs_no_queue_that_rq_knows(self, driver: Driver) -> None:
        driver.enqueue("a", lifetimes=self.BRIEF)
        driver.redis.delete("rq:queues")
        assert self.reaped(driver).error_code == "unserved"

    def test_one_that_reads_as_none_of_ours_ends_too(self, driver: Driver) -> None:
        """Nobody else looks at a queue that nobody serves."""
        driver.enqueue("a", "misspelt:default", lifetimes=self.BRIEF)
        driver.redis.hset(driver.keys.job("a"), JobField.CRASHES, "odd")

        def ended() -> bool:
            driver.reap()
            return driver.redis.hget(driver.keys.job("a"), JobField.STATE) == b"failed"

        wait_until(ended)
        assert driver.record("a").error_code == "corrupt_job"
        assert driver.listed("misspelt:default") == driver.indexed("misspelt:default") == []
        assert not driver.redis.exists("mlxs:deadlines")

    @pytest.mark.parametrize("state", ["running", "failed"])
    def test_but_not_one_that_runs_or_has_ended(self, driver: Driver, state: str) -> None:
        attempt = driver.start("a")
        if state == "failed":
            driver.commit(attempt, attempt.end(JobState.FAILED))
        driver.redis.hset(driver.keys.job("a"), JobField.CRASHES, "odd")
        driver.redis.zadd("mlxs:deadlines", {"a": 1})
        before = driver.redis.dump(driver.keys.job("a"))
        driver.reap()
        assert driver.redis.dump(driver.keys.job("a")) == before
        assert not driver.redis.exists("mlxs:deadlines")
        driver.redis.hset(driver.keys.job("a"), JobField.CRASHES, 0)
        driver.cancel("a")

    def test_an_earlier_deadline_ends_it_as_such(self, driver: Driver) -> None:
        driver.enqueue("a", deadline_ms=200)
        assert self.reaped(driver).error_code == "deadline_exceeded"

    def test_it_comes_before_a_later_deadline(self, driver: Driver) -> None:
        driver.enqueue("a", lifetimes=self.BRIEF, deadline_ms=600_000)
        assert self.reaped(driver).error_code == "unserved"

    @pytest.mark.parametrize("deadline_ms", [0, 600_000])
    def test_a_job_that_was_taken_runs_on(self, driver: Driver, deadline_ms: int) -> None:
        attempt = driver.start("a", lifetimes=self.BRIEF, deadline_ms=deadline_ms)
        due = driver.redis.zscore("mlxs:deadlines", "a")
        wait_until(lambda: driver.reap().outcomes == [] and later(driver, due))
        assert driver.redis.zscore("mlxs:deadlines", "a") == (
            driver.record("a").deadline_ms or None
        )
        assert driver.commit(attempt, attempt.row(), attempt.end()) == ["OK", "OK"]

    def test_one_that_came_back_has_its_whole_time_again(self, driver: Driver) -> None:
        attempt = driver.start("a", lifetimes=Lifetimes(queued=2))
        due = driver.redis.zscore("mlxs:deadlines", "a")
        assert due is not None
        wait_until(lambda: redis_ms(driver) > due - 1_000)
        driver.release(attempt)
        wait_until(lambda: redis_ms(driver) > due)
        assert driver.reap().outcomes == []
        assert self.reaped(driver).error_code == "unserved"
        assert redis_ms(driver) >= due + 1_000


def redis_ms(driver: Driver) -> float:
    seconds, micros = driver.redis.time()
    return float(seconds) * 1000 + micros / 1000


def later(driver: Driver, due: Any) -> bool:
    """Whether a job that was due then has been looked at."""
    return bool(driver.redis.zscore("mlxs:deadlines", "a") != due)


class TestForget:
    @pytest.mark.parametrize("state", ENDS)
    def test_nothing_of_an_ended_job_is_left(self, driver: Driver, state: JobState) -> None:
        end(driver, state, tenant="acme", deadline_ms=60_000)
        assert driver.protocol.run(ended_calls.forget(["a"])) == [None]
        names = set(driver.redis.scan_iter(count=1000))
        assert {name for name in names if not name.startswith(b"mlxs:claim:")} == {b"rq:queues"}

    def test_an_open_job_stays(self, driver: Driver) -> None:
        driver.start("a")
        driver.enqueue("b")
        before = {name: driver.redis.dump(name) for name in driver.redis.scan_iter()}
        states = driver.protocol.run(ended_calls.forget(["a", "b"]))
        assert states == [JobState.RUNNING, JobState.QUEUED]
        assert {name: driver.redis.dump(name) for name in driver.redis.scan_iter()} == before
        driver.cancel("a")
        driver.cancel("b")

    def test_one_that_is_gone_or_odd_does_no_harm(self, driver: Driver) -> None:
        end(driver)
        driver.redis.set(driver.keys.job("odd"), "no hash")
        for _ in range(2):
            assert driver.protocol.run(ended_calls.forget(["a", "odd", "b"])) == [None] * 3
        assert driver.enqueue("a").created

    def test_a_job_of_rqs_own_enqueue_waits_before_anybody_claimed_it(
        self, server: LocalRedis, driver: Driver
    ) -> None:
        driver.redis.hset("rq:job:a", mapping=rq_fields())  # type: ignore[arg-type]
        driver.redis.rpush("rq:queue:tally:default", "a")
        with a_producer(server) as producer:
            assert producer.protocol.run(ended_calls.forget(["a"])) == [JobState.QUEUED]
            attempt = driver.take()
            driver.commit(attempt, attempt.end(JobState.FAILED))
            driver.redis.delete(driver.keys.job("a"))
            assert producer.protocol.run(ended_calls.forget(["a"])) == [None]
        assert not driver.redis.exists("rq:job:a")

    def test_thousands_at_once(self, driver: Driver) -> None:
        ids = [f"j{number}" for number in range(3_000)]
        for job_id in ids:
            fields = {JobField.STATE: "failed", JobField.QUEUE: QUEUE}
            driver.redis.hset(driver.keys.job(job_id), mapping=fields)  # type: ignore[arg-type]
            driver.redis.zadd("rq:failed:tally:default", {job_id: 1})
        assert driver.protocol.run(ended_calls.forget(ids)) == [None] * len(ids)
        assert {*driver.redis.scan_iter(count=1000)} == set()


class TestRequeue:
    def requeued(self, driver: Driver) -> Any:
        return driver.protocol.run(ended_calls.requeue("a"))

    @pytest.mark.parametrize("state", [s for s in ENDS if s is not JobState.FINISHED])
    def test_a_job_that_did_not_finish_runs_again_from_its_beginning(
        self, driver: Driver, state: JobState
    ) -> None:
        end(driver, state, deadline_ms=60_000, tenant="acme", marks="c,b")
        before = driver.record("a")
        reply = self.requeued(driver)
        assert (reply.created, reply.state) == (True, JobState.QUEUED)
        record = driver.record("a")
        assert (record.state, record.seq, record.epoch) == (JobState.QUEUED, 0, before.epoch)
        assert (record.result, record.error_code, record.message) == (b"", "", "")
        assert record.deadline_ms - record.enqueued_ms == 60_000
        assert set(ttls(driver).values()) == {-1, -2}  # no events yet; the rest is kept
        assert driver.listed() == driver.indexed() == ["a"]
        assert driver.redis.smembers("mlxs:tenant:acme:queued") == {b"a"}
        for registry in driver.keys.rq_ended(QUEUE):
            assert not driver.redis.exists(registry)
        again = driver.take()
        assert (again.job.data, again.job.epoch) == (PAYLOAD, before.epoch + 1)
        assert driver.commit(again, again.row(), again.end()) == ["OK", "OK"]
        assert [e.type for e in driver.events("a")] == ["tokens", "end"]
        assert driver.record("a").result
        assert ttls(driver) == about(job=RESULT_TTL, events=KEPT.events, payload=RESULT_TTL)

    def test_a_dead_one_is_still_a_suspect(self, driver: Driver) -> None:
        attempt = driver.start("a", max_attempts=1)
        die(driver, attempt)
        assert self.requeued(driver).created
        driver.enqueue("b")
        beside = calls.HeldRows(rows=1)
        assert driver.claimed_ids(held=beside) == ["b"]
        assert (driver.take().job.job_id, driver.record("a").attempts) == ("a", 0)
        driver.cancel("a")
        driver.cancel("b")

    def test_a_suspect_has_waited_from_now_on(self, driver: Driver) -> None:
        """Else a worker that holds rows would take nothing more at once, to make room for it."""
        attempt = driver.start("a", max_attempts=1)
        die(driver, attempt)
        driver.redis.hset(driver.keys.job("a"), JobField.SUSPECT_SINCE_MS, 1)
        assert self.requeued(driver).created
        reply = driver.claim(held=calls.HeldRows(rows=3, unproven=3))
        assert (reply.jobs, reply.reserved) == ([], "")
        driver.cancel("a")

    def test_the_worker_of_the_life_that_ended_writes_nothing(self, driver: Driver) -> None:
        old = driver.start("a")
        driver.commit(old, old.row(), old.end(JobState.FAILED))
        self.requeued(driver)
        assert driver.commit(old, old.row(1), old.row(3)) == ["FENCED", "FENCED"]
        driver.take()
        assert driver.commit(old, old.row(1), old.row(3)) == ["FENCED", "FENCED"]
        driver.cancel("a")

    def test_a_resend_changes_nothing_nor_does_it_to_any_other_job(self, driver: Driver) -> None:
        end(driver, JobState.FAILED)
        assert self.requeued(driver).created
        reply = self.requeued(driver)
        assert (reply.created, reply.state, driver.listed()) == (False, JobState.QUEUED, ["a"])
        attempt = driver.take()
        assert self.requeued(driver).state is JobState.RUNNING
        driver.commit(attempt, attempt.end())
        reply = self.requeued(driver)
        assert (reply.created, reply.state, driver.listed()) == (False, JobState.FINISHED, [])

    @pytest.mark.parametrize("gone", ["mlxs:job:a", "rq:job:a"])
    def test_one_without_its_payload_is_gone(self, driver: Driver, gone: str) -> None:
        end(driver, JobState.FAILED)
        driver.redis.delete(gone)
        assert self.requeued(driver) is None

    @pytest.mark.parametrize("kind", PLANTS)
    def test_nor_is_anything_written_if_the_payload_is_something_else(
        self, driver: Driver, kind: str
    ) -> None:
        end(driver, JobState.FAILED)
        plant(driver.redis, "rq:job:a", kind)
        before = driver.snapshot()
        for _ in range(2):
            assert self.requeued(driver) is None
        assert driver.snapshot() == before
        driver.redis.delete("rq:job:a")

    def test_a_tenants_limit_holds(self, driver: Driver) -> None:
        end(driver, JobState.FAILED, tenant="acme")
        driver.redis.hset(driver.keys.limits(), "queued", 1)
        driver.enqueue("b", tenant="acme")
        assert self.requeued(driver).refusal == Refusal("queued", limit=1, found=1)
        assert driver.state("a") == "failed"
        driver.cancel("b")
        driver.redis.delete(driver.keys.limits())


def test_the_settings_defaults_are_those_of_the_scripts() -> None:
    jobs = Settings().jobs
    assert Lifetimes(jobs.queued_ttl, jobs.events_ttl, jobs.failed_ttl) == Lifetimes()
