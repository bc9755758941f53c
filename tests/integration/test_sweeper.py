"""Reaper and reconciler (D1, D5): what a dead worker held comes back; what fell between, too."""

from __future__ import annotations

import time

import pytest

from mlx_serving.common.protocol.fields import JobField
from mlx_serving.common.redis.local import LocalRedis
from mlx_serving.worker.delivery.sweeper import Sweeper
from tests.support.helpers import wait_until
from tests.support.protocol_driver import LANES, QUEUE, Attempt, Driver, rq_fields

pytestmark = [
    pytest.mark.usefixtures("settled_redis"),
    pytest.mark.may_leak(reason="jobs stay queued or running at the end of a test"),
]


@pytest.fixture
def sweeper(driver: Driver) -> Sweeper:
    return Sweeper(driver.protocol, LANES, lease_ms=1_000, reap_seconds=0.1)


def lost(driver: Driver, attempt: Attempt) -> list[tuple[str, str]]:
    driver.lapse(attempt.job.job_id)
    return driver.reap().outcomes


class TestReap:
    def test_a_lease_ends_by_redis_time(self, driver: Driver) -> None:
        driver.enqueue("a")
        attempt = driver.take(lease_ms=100)
        assert driver.reap().outcomes == []
        wait_until(lambda: driver.reap().outcomes == [("a", "requeued")], timeout=1)
        assert driver.listed() == ["a"]
        assert driver.commit(attempt, attempt.row()) == ["FENCED"]

    def test_a_renewed_lease_is_left_alone(self, driver: Driver) -> None:
        driver.enqueue("a")
        attempt = driver.take(lease_ms=50)
        driver.renew(attempt)
        time.sleep(0.06)  # the first lease is over
        assert driver.reap().outcomes == []

    def test_it_goes_to_the_front_and_starts_again_at_seq(self, driver: Driver) -> None:
        attempt = driver.start("a")
        driver.enqueue("b")
        driver.commit(attempt, attempt.row(), attempt.row())
        assert lost(driver, attempt) == [("a", "requeued")]
        assert driver.listed() == ["a", "b"]
        record = driver.record("a")
        assert (record.seq, record.owner) == (2, "")
        assert driver.rq_status("a") == "queued"
        again = driver.take("w2")
        assert (again.job.epoch, again.job.seq) == (2, 2)

    def test_a_lost_lease_charges_no_crash(self, driver: Driver) -> None:
        """What a kill -9, a power cut or a sleeping Mac says of a job: test_losses.py."""
        driver.enqueue("a", max_attempts=1)
        assert lost(driver, driver.take()) == [("a", "requeued")]
        assert driver.record("a").attempts == 0

    def test_hand_overs_are_not_charged(self, driver: Driver) -> None:
        driver.enqueue("a", max_attempts=1)
        for _ in range(5):
            assert driver.release(driver.take()) == ["OK"]
        assert driver.record("a").attempts == 0

    @pytest.mark.parametrize(
        ("reason", "outcome"), [("because", "cancelled"), ("deadline_exceeded", "expired")]
    )
    def test_a_job_cancelled_while_its_worker_died_ends(
        self, driver: Driver, reason: str, outcome: str
    ) -> None:
        attempt = driver.start("a")
        driver.commit(attempt, attempt.row())
        driver.cancel("a", reason)
        assert lost(driver, attempt) == [("a", outcome)]
        assert [(e.seq, e.state) for e in driver.events("a")] == [(1, None), (2, outcome)]

    def test_two_reapers_requeue_once(self, driver: Driver) -> None:
        driver.start("a")
        driver.lapse("a")
        assert [driver.reap().outcomes, driver.reap().outcomes] == [[("a", "requeued")], []]
        assert driver.listed() == ["a"]

    def test_queues_that_rq_forgot_are_reaped_by_those_who_serve_them(self, driver: Driver) -> None:
        """`rq` deletes a queue's name from its set when somebody deletes the queue."""
        attempt = driver.start("a")
        driver.redis.delete("rq:queues")
        assert lost(driver, attempt) == [("a", "requeued")]

    def test_a_fresh_redis_is_given_one_lease_to_renew(self) -> None:
        with LocalRedis(appendonly="always") as server, server.client() as client:
            driver = Driver(client)
            attempt = driver.start("a")
            driver.lapse("a")
            server.restart()
            swept = driver.reap(lease_ms=1_000)
            assert (swept.waiting, swept.outcomes) == (True, [])
            assert driver.commit(attempt, attempt.row()) == ["OK"]
            wait_until(lambda: not driver.reap(lease_ms=1_000).waiting)
            assert driver.record("a").owner == "w1"


class TestDeadlines:
    def test_a_queued_job_ends_when_its_deadline_passes(self, driver: Driver) -> None:
        driver.enqueue("a", deadline_ms=30)
        driver.enqueue("b", deadline_ms=60_000)
        wait_until(lambda: driver.reap().outcomes == [("a", "expired")])
        record = driver.record("a")
        assert (record.state.value, record.error_code) == ("expired", "deadline_exceeded")
        assert (driver.listed(), driver.indexed()) == (["b"], ["b"])
        assert driver.redis.zrange("mlxs:deadlines", 0, -1) == [b"b"]

    def test_a_running_job_is_flagged(self, driver: Driver) -> None:
        attempt = driver.start("a", deadline_ms=10)
        wait_until(lambda: not driver.reap().outcomes and driver.record("a").cancel_reason)
        assert driver.renew(attempt).reason == "deadline_exceeded"
        assert driver.state("a") == "running"

    def test_its_worker_is_told(self, driver: Driver) -> None:
        driver.enqueue("a", deadline_ms=60_000)
        driver.take("mac-7")
        driver.redis.zadd("mlxs:deadlines", {"a": 1})
        driver.redis.hset(driver.keys.job("a"), JobField.DEADLINE_MS, 1)
        with driver.redis.pubsub(ignore_subscribe_messages=True) as ears:
            ears.subscribe(driver.keys.control("mac-7"))
            ears.get_message(timeout=1)
            driver.reap()
            message = wait_until(lambda: ears.get_message(timeout=0.1))
        assert message["data"] == b"cancel a"

    def test_an_earlier_cancel_keeps_its_reason(self, driver: Driver) -> None:
        driver.start("a", deadline_ms=10)
        driver.cancel("a", "because")
        wait_until(lambda: not driver.reap().outcomes and not driver.redis.exists("mlxs:deadlines"))
        assert driver.record("a").cancel_reason == "because"


class TestReconcile:
    def repaired(self, sweeper: Sweeper) -> list[tuple[str, str]]:
        """Only a count that is off twice running is looked into."""
        assert sweeper.reconcile(QUEUE) == []
        return sweeper.reconcile(QUEUE)

    def test_nothing_to_do_costs_no_more_than_counting(
        self, driver: Driver, sweeper: Sweeper
    ) -> None:
        driver.enqueue("a")
        driver.start("b")
        driver.redis.config_resetstat()
        assert self.repaired(sweeper) == []
        assert "cmdstat_zrange" not in driver.redis.info("commandstats")

    def test_an_id_that_was_popped_and_lost_comes_back(
        self, driver: Driver, sweeper: Sweeper
    ) -> None:
        """What a stock worker's BLPOP does before it dies."""
        driver.enqueue("a")
        driver.redis.lpop("rq:queue:tally:default")
        assert self.repaired(sweeper) == [("a", "requeued")]
        assert driver.claimed_ids() == ["a"]
        assert self.repaired(sweeper) == []

    def test_a_deleted_list_comes_back_without_what_was_cancelled(
        self, driver: Driver, sweeper: Sweeper
    ) -> None:
        for job_id in "abc":
            driver.enqueue(job_id)
        driver.redis.delete("rq:queue:tally:default", "rq:queues", "rq:job:b")
        driver.redis.hset("rq:job:c", "status", "canceled")
        assert sorted(self.repaired(sweeper)) == [
            ("a", "requeued"), ("b", "cancelled"), ("c", "cancelled"),
        ]  # fmt: skip
        assert driver.listed() == ["a"]
        assert driver.redis.smembers("rq:queues") == {b"rq:queue:tally:default"}
        assert not driver.redis.exists("rq:job:b")

    def test_a_running_job_without_a_lease_gets_one(self, driver: Driver, sweeper: Sweeper) -> None:
        attempt = driver.start("a")
        driver.redis.delete(driver.keys.leases(QUEUE))
        assert self.repaired(sweeper) == [("a", "leased")]
        assert driver.commit(attempt, attempt.row()) == ["OK"]

    def test_a_stale_index_entry_is_closed(self, driver: Driver, sweeper: Sweeper) -> None:
        attempt = driver.start("a")
        driver.commit(attempt, attempt.end())
        driver.redis.zadd(driver.keys.open(QUEUE), {"a": 1, "ghost": 1})
        assert sorted(self.repaired(sweeper)) == [("a", "closed"), ("ghost", "closed")]
        assert (driver.state("a"), driver.indexed()) == ("finished", [])

    def test_a_job_that_came_back_meanwhile_is_not_enqueued_twice(self, driver: Driver) -> None:
        driver.enqueue("a")
        from mlx_serving.common.protocol import calls

        call = calls.reconcile(QUEUE, ["a"], lease_ms=1)
        assert driver.protocol.run(call).outcomes == []
        assert driver.listed() == ["a"]

    def test_an_id_twice_on_the_list_runs_once(self, driver: Driver, sweeper: Sweeper) -> None:
        driver.enqueue("a")
        driver.redis.rpush("rq:queue:tally:default", "a")
        attempt = driver.take()
        assert self.repaired(sweeper) == []
        assert driver.claim("w2").jobs == []
        assert driver.commit(attempt, attempt.end()) == ["OK"]


class TestSweeper:
    def test_it_reaps_at_its_interval(self, driver: Driver, sweeper: Sweeper) -> None:
        sweeper.sweep()
        sweeper._hold_until = 0.0  # it has been up for a lease
        time.sleep(0.1)
        driver.start("a")
        driver.lapse("a")
        sweeper.sweep()
        assert driver.listed() == ["a"]
        driver.take()
        driver.lapse("a")
        sweeper.sweep()
        assert driver.leased() == ["a"]

        def back() -> bool:
            sweeper.sweep()
            return driver.listed() == ["a"]

        wait_until(back)

    def test_it_trims_rqs_registries_of_all_our_queues_and_of_no_other(
        self, driver: Driver, sweeper: Sweeper
    ) -> None:
        """A fleet without stock workers has nobody else who would."""
        for registry in ("finished", "failed", "canceled"):
            driver.redis.zadd(f"rq:{registry}:tally:default", {"old": 1, "new": 1 << 40})
            driver.redis.zadd(f"rq:{registry}:unserved:bulk", {"old": 1, "new": 1 << 40})
            for other in ("somebody-elses", "default", ":bulk"):
                driver.redis.zadd(f"rq:{registry}:{other}", {"old": 1})
        driver.redis.sadd(
            "rq:queues",
            "rq:queue:somebody-elses",
            "rq:queue:unserved:bulk",
            "rq:queue:default",
            "rq:queue::bulk",
        )
        sweeper.reap()
        for registry in ("finished", "failed", "canceled"):
            assert driver.redis.zrange(f"rq:{registry}:tally:default", 0, -1) == [b"new"]
            assert driver.redis.zrange(f"rq:{registry}:unserved:bulk", 0, -1) == [b"new"]
            for other in ("somebody-elses", "default", ":bulk"):
                assert driver.redis.zrange(f"rq:{registry}:{other}", 0, -1) == [b"old"]

    def test_a_queue_that_has_nothing_more_is_forgotten_unless_it_is_served(
        self, driver: Driver, sweeper: Sweeper
    ) -> None:
        """Each misspelt model would be looked at for ever."""
        driver.enqueue("a", queue="misspelt:default")
        driver.redis.sadd("rq:queues", "rq:queue:default", "rq:queue:tally:default")
        driver.redis.zadd("mlxs:deadlines", {"a": 1})
        assert sweeper.reap() == [("a", "expired")]
        assert driver.redis.sismember(
            "rq:queues", "rq:queue:misspelt:default"
        )  # it has a failed job
        driver.redis.delete("rq:failed:misspelt:default")
        sweeper.reap()
        left = {b"rq:queue:default", b"rq:queue:tally:default"}
        assert driver.redis.smembers("rq:queues") == left

    def test_many_that_are_due_end_in_one_look_a_few_a_script(
        self, driver: Driver, sweeper: Sweeper
    ) -> None:
        for number in range(100):
            driver.enqueue(f"j{number}", queue="misspelt:default")
        driver.redis.zadd("mlxs:deadlines", {f"j{n}": 1 for n in range(100)})
        driver.redis.config_resetstat()
        assert len(sweeper.reap()) == 100
        calls = driver.redis.info("commandstats")["cmdstat_evalsha"]["calls"]
        assert calls == 4
        assert driver.redis.llen("rq:queue:misspelt:default") == 0

    def test_it_trims_so_many_entries_a_look(self, driver: Driver, sweeper: Sweeper) -> None:
        """A script that removes all of a million at once would hold Redis."""
        driver.redis.zadd("rq:finished:tally:default", {f"old{n}": n for n in range(2_500)})
        left = []
        for _ in range(3):
            sweeper.reap()
            left.append(driver.redis.zcard("rq:finished:tally:default"))
        assert left == [1_500, 500, 0]

    def test_a_job_adopted_from_rqs_queue_comes_back_too(
        self, driver: Driver, sweeper: Sweeper
    ) -> None:
        driver.redis.hset("rq:job:stock", mapping=rq_fields())  # type: ignore[arg-type]
        driver.redis.rpush("rq:queue:tally:default", "stock")
        driver.take()
        driver.lapse("stock")
        assert sweeper.reap() == [("stock", "requeued")]
