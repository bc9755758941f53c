"""Tenants in the scripts: limits on queued and running jobs, turns, sets that stay right."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from mlx_serving.common.protocol import calls
from mlx_serving.common.protocol.refusal import Refusal
from mlx_serving.common.states import JobState
from tests.support.protocol_driver import QUEUE, Attempt, Driver, entry

pytestmark = pytest.mark.may_leak(reason="jobs stay queued or running at the end of a test")


def many(driver: Driver, tenant: str, count: int, **fields: Any) -> list[str]:
    """Enqueue jobs `<tenant>0`, `<tenant>1`, … in one call."""
    ids = [f"{tenant}{n}" for n in range(count)]
    driver.protocol.run(calls.enqueue_many([entry(i, tenant=tenant, **fields) for i in ids]))
    return ids


def text(raw: bytes | str) -> str:
    return raw.decode() if isinstance(raw, bytes) else raw


def limit(driver: Driver, **limits: int | str) -> None:
    """`queued`, `running`: of all; `queued_acme`: of one."""
    for name, value in limits.items():
        driver.redis.hset(driver.keys.limits(), name.replace("_", ":"), value)


def sets(driver: Driver, tenant: str) -> tuple[set[str], set[str]]:
    keys = (driver.keys.tenant_queued(tenant), driver.keys.tenant_running(tenant))
    queued, running = ({text(i) for i in driver.redis.smembers(key)} for key in keys)
    return queued, running


def line(driver: Driver, tenant: str, queue: str = QUEUE) -> list[str]:
    return [text(i) for i in driver.redis.lrange(driver.keys.line(queue, tenant), 0, -1)]


def tenant_keys(driver: Driver) -> list[bytes]:
    patterns = ("mlxs:tenant*", "mlxs:line:*", "mlxs:turns:*")
    return [key for pattern in patterns for key in driver.redis.scan_iter(pattern)]


class TestQueued:
    def test_beyond_the_limit_a_job_is_refused_and_nothing_is_written(self, driver: Driver) -> None:
        limit(driver, queued=2)
        many(driver, "acme", 2)
        before = driver.snapshot()
        reply = driver.enqueue("more", tenant="acme")
        assert (reply.created, reply.refusal) == (False, Refusal("queued", limit=2, found=2))
        assert driver.snapshot() == before

    def test_others_and_jobs_without_a_tenant_are_not_touched_by_it(self, driver: Driver) -> None:
        limit(driver, queued_acme=0)
        assert driver.enqueue("a", tenant="acme").refusal
        assert driver.enqueue("b", tenant="other").created
        assert driver.enqueue("c").created

    def test_a_tenants_own_limit_goes_before_the_one_of_all(self, driver: Driver) -> None:
        limit(driver, queued=1, queued_big=2, queued_free="none")
        replies = {t: [driver.enqueue(f"{t}{n}", tenant=t).created for n in range(3)]
                   for t in ("small", "big", "free")}  # fmt: skip
        assert {t: sum(created) for t, created in replies.items()} == {
            "small": 1, "big": 2, "free": 3,
        }  # fmt: skip

    def test_a_resend_of_a_job_that_was_taken_is_no_new_one(self, driver: Driver) -> None:
        limit(driver, queued=1)
        assert driver.enqueue("a", tenant="acme").created
        again = driver.enqueue("a", tenant="acme")
        assert (again.created, again.state, again.refusal) == (False, JobState.QUEUED, None)
        assert sets(driver, "acme") == ({"a"}, set())

    def test_it_counts_all_lanes_and_models(self, driver: Driver) -> None:
        limit(driver, queued=2)
        assert driver.enqueue("a", "tally:bulk", tenant="acme").created
        assert driver.enqueue("b", "other:interactive", tenant="acme").created
        assert driver.enqueue("c", tenant="acme").refusal

    def test_a_claim_makes_room(self, driver: Driver) -> None:
        limit(driver, queued=1)
        driver.start("a", tenant="acme")
        assert driver.enqueue("b", tenant="acme").created

    @pytest.mark.parametrize("odd", ["", "-1 or so", "1e"])
    def test_a_limit_that_is_no_number_is_none(self, driver: Driver, odd: str) -> None:
        limit(driver, queued_acme=odd)
        assert driver.enqueue("a", tenant="acme").created


class TestRows:
    """A choice is a row of the batch, and `running` counts rows."""

    def test_a_job_with_more_rows_than_its_tenant_may_run_is_refused(self, driver: Driver) -> None:
        limit(driver, running=8)
        before = driver.snapshot()
        reply = driver.enqueue("a", tenant="acme", rows=9)
        assert (reply.created, reply.refusal) == (False, Refusal("running", 8, 9))
        assert driver.snapshot() == before
        assert driver.enqueue("b", tenant="acme", rows=8).created
        assert driver.enqueue("c", rows=9).created

    def test_rows_are_counted_over_jobs_and_workers(self, driver: Driver) -> None:
        limit(driver, running=8)
        many(driver, "acme", 4, rows=3)
        assert driver.claimed_ids("w1") == ["acme0", "acme1"]
        assert driver.claimed_ids("w2") == []
        assert driver.redis.scard(driver.keys.tenant_running("acme")) == 6

    def test_a_job_that_does_not_fit_is_not_overtaken_by_its_tenants_small_ones(
        self, driver: Driver
    ) -> None:
        limit(driver, running=4)
        small = driver.start("small", tenant="acme")
        driver.enqueue("large", tenant="acme", rows=4)
        many(driver, "acme", 3)
        driver.enqueue("other", tenant="other")
        assert driver.claimed_ids() == ["other"]
        driver.commit(small, small.end())
        assert driver.claimed_ids() == ["large"]

    def test_nor_by_those_in_another_models_queue(self, driver: Driver) -> None:
        limit(driver, running=4)
        small = driver.start("small", tenant="acme")
        driver.enqueue("large", tenant="acme", rows=4)
        driver.enqueue("elsewhere", "other:default", tenant="acme")
        driver.enqueue("later", "other:bulk", tenant="acme")
        driver.enqueue("urgent", "other:interactive", tenant="acme")
        assert driver.claimed_ids() == []
        others = [f"other:{lane}" for lane in ("interactive", "default", "bulk")]
        (urgent,) = driver.claim("w2", others).jobs  # lanes keep their priority
        assert urgent.job_id == "urgent"
        for attempt in (small, Attempt(urgent, "w2")):
            driver.commit(attempt, attempt.end())
        assert driver.claimed_ids("w2", queues=others) == []
        large = driver.take()
        assert large.job.job_id == "large"
        driver.commit(large, large.end())
        assert driver.claimed_ids("w2", queues=others) == ["elsewhere", "later"]

    def test_room_is_kept_for_a_while_only(self, driver: Driver) -> None:
        """Nobody may be there to look at the large job again."""
        limit(driver, running=4)
        driver.start("small", tenant="acme")
        driver.enqueue("large", tenant="acme", rows=4)
        driver.enqueue("elsewhere", "other:default", tenant="acme")
        assert driver.claimed_ids() == []
        assert 0 < driver.redis.pttl("mlxs:tenant:acme:room_for") <= 3000
        driver.redis.delete("mlxs:tenant:acme:room_for")
        assert driver.claimed_ids(queues=["other:default"]) == ["elsewhere"]

    def test_after_the_limit_was_lowered_it_runs_when_its_tenant_runs_nothing(
        self, driver: Driver
    ) -> None:
        for name in ("large", "larger"):
            driver.enqueue(name, tenant="acme", rows=64)
        limit(driver, running=1)
        large = driver.take()
        assert driver.claimed_ids() == []
        driver.commit(large, large.end())
        assert driver.claimed_ids() == ["larger"]

    def test_zero_lets_a_job_of_many_rows_wait(self, driver: Driver) -> None:
        limit(driver, running=0)
        assert driver.enqueue("a", tenant="acme", rows=64).created
        assert driver.claimed_ids() == []

    @pytest.mark.parametrize("way", ["end", "release", "reap", "crash", "resend", "bury"])
    @pytest.mark.usefixtures("settled_redis")
    def test_all_rows_of_a_job_that_goes_are_given_back(self, driver: Driver, way: str) -> None:
        attempt = driver.start("a", tenant="acme", rows=128)
        running = driver.keys.tenant_running("acme")
        assert driver.redis.scard(running) == 128
        if way in {"end", "resend"}:
            row = attempt.end()
            driver.commit(attempt, row)
            if way == "resend":
                assert driver.commit(attempt, row) == ["DUP"]
        elif way == "release":
            driver.release(attempt)
        elif way == "crash":
            driver.protocol.run(calls.crash("w1", [driver.blame("a", 1)]))
        else:
            if way == "bury":
                driver.redis.hset(driver.keys.job("a"), "n", "many")
            driver.lapse("a")
            driver.reap()
        assert driver.state("a") != "running"
        assert not driver.redis.exists(running)

    def test_the_audit_counts_rows(self, driver: Driver) -> None:
        driver.start("a", tenant="acme", rows=3)
        driver.enqueue("b", tenant="acme", rows=3)
        queued, running = driver.keys.tenant_queued("acme"), driver.keys.tenant_running("acme")
        right = driver.snapshot()
        driver.redis.srem(running, "a:2")
        driver.redis.sadd(running, "a:4", "a:1", "a:02", "a:x:2", "b:2", "ghost:2")
        driver.redis.sadd(queued, "a:3", "a")
        members = [*driver.redis.smembers(running), *driver.redis.smembers(queued)]
        repaired = driver.protocol.run(calls.audit("acme", members))
        assert sorted(repaired) == [("a", "running"), ("b", "queued"), ("ghost", "closed")]
        members = [*driver.redis.smembers(running), *driver.redis.smembers(queued)]
        assert driver.protocol.run(calls.audit("acme", members)) == []
        assert sets(driver, "acme") == ({"b"}, {"a", "a:2", "a:3"})
        assert driver.snapshot().keys() == right.keys()


@pytest.mark.usefixtures("settled_redis")
class TestRunning:
    def test_a_job_beyond_the_limit_stays_queued_and_blocks_nobody(self, driver: Driver) -> None:
        limit(driver, running_acme=2)
        many(driver, "acme", 5)
        driver.enqueue("other", tenant="other")
        driver.enqueue("nobodys")
        assert sorted(driver.claimed_ids(most=32)) == ["acme0", "acme1", "nobodys", "other"]
        assert driver.listed() == line(driver, "acme") == ["acme2", "acme3", "acme4"]
        assert driver.claimed_ids() == []

    def test_it_holds_over_workers_lanes_and_models(self, driver: Driver) -> None:
        limit(driver, running=2)
        for n, queue in enumerate(("tally:interactive", "tally:bulk", "other:bulk")):
            driver.enqueue(f"j{n}", queue, tenant="acme")
        assert driver.claimed_ids("w1") == ["j0", "j1"]
        assert driver.claimed_ids("w2", queues=["other:bulk"]) == []

    @pytest.mark.parametrize("way", ["end", "release", "reap", "crash", "cancel"])
    def test_a_job_that_ends_or_goes_back_makes_room(self, driver: Driver, way: str) -> None:
        limit(driver, running=1)
        many(driver, "acme", 2)
        attempt = driver.take()
        assert driver.claimed_ids() == []
        if way == "end":
            driver.commit(attempt, attempt.end())
        elif way == "release":
            driver.release(attempt)
        elif way == "reap":
            driver.lapse("acme0")
            driver.reap()
        elif way == "crash":
            blame = calls.Blame(attempt.job.attempt)
            driver.protocol.run(calls.crash("w1", [blame]))
        else:
            driver.cancel("acme0")
            driver.release(attempt)
        first = "acme1" if way in {"end", "cancel"} else "acme0"
        assert driver.claimed_ids() == [first]
        assert sets(driver, "acme")[1] == {first}

    def test_zero_lets_a_tenant_queue_and_run_nothing(self, driver: Driver) -> None:
        limit(driver, running_acme=0)
        many(driver, "acme", 2)
        assert driver.claimed_ids() == []
        limit(driver, running_acme=1)  # an operator may change it at any time
        assert driver.claimed_ids() == ["acme0"]


class TestTurns:
    def test_a_single_job_does_not_wait_behind_ten_thousand(self, driver: Driver) -> None:
        for start in range(0, 10_000, 1000):
            ids = [f"big{n}" for n in range(start, start + 1000)]
            driver.protocol.run(calls.enqueue_many([entry(i, tenant="big") for i in ids]))
        driver.enqueue("single", tenant="small")
        assert driver.claimed_ids(most=2) == ["big0", "single"]
        assert len(driver.listed()) == 9_999

    def test_tenants_share_what_is_claimed_and_keep_their_order(self, driver: Driver) -> None:
        for tenant, count in (("a", 20), ("b", 5), ("c", 20)):
            many(driver, tenant, count)
        taken: list[str] = []
        while jobs := driver.claimed_ids(most=4):
            taken += jobs
        assert len(taken) == 45
        for tenant in "abc":
            own = [i for i in taken if i[0] == tenant]
            assert own == [f"{tenant}{n}" for n in range(len(own))]
        assert Counter(i[0] for i in taken[:15]) == {"a": 5, "b": 5, "c": 5}
        assert Counter(i[0] for i in taken[15:]) == {"a": 15, "c": 15}

    def test_who_comes_often_does_not_come_first(self, driver: Driver) -> None:
        """One that has a single job at a time gets every other claim, not each."""
        many(driver, "many", 6)
        taken: list[str] = []
        for n in range(6):
            driver.enqueue(f"often{n}", tenant="often")
            taken += driver.claimed_ids(most=1)
        assert [i.rstrip("0123456789") for i in taken] == ["many", "often"] * 3

    def test_a_turn_that_passes_does_not_pile_up(self, driver: Driver) -> None:
        limit(driver, running_held=0)
        many(driver, "held", 9)
        many(driver, "a", 4)
        many(driver, "b", 4)
        assert driver.claimed_ids(most=4) == ["a0", "b0", "a1", "b1"]
        limit(driver, running_held=9)
        assert sorted(i.rstrip("0123456789") for i in driver.claimed_ids(most=6)) == [
            "a", "a", "b", "b", "held", "held",
        ]  # fmt: skip

    def test_jobs_without_a_tenant_keep_their_place(self, driver: Driver) -> None:
        driver.enqueue("x0")
        many(driver, "a", 2)
        driver.enqueue("x1")
        many(driver, "b", 1)
        assert driver.claimed_ids(most=2) == ["x0", "a0"]
        assert driver.claimed_ids(most=2) == ["b0", "a1"]
        assert driver.claimed_ids() == ["x1"]

    def test_a_job_that_went_back_is_the_first_of_its_tenant(self, driver: Driver) -> None:
        many(driver, "a", 3)
        first, second = (Attempt(job, "w1") for job in driver.claim(most=2).jobs)
        driver.release(second, first)
        assert line(driver, "a") == driver.listed() == ["a0", "a1", "a2"]

    def test_lanes_keep_their_priority(self, driver: Driver) -> None:
        many(driver, "a", 3, queue="tally:bulk")
        driver.enqueue("b0", "tally:interactive", tenant="b")
        driver.enqueue("b1", "tally:bulk", tenant="b")
        assert driver.claimed_ids(most=3) == ["b0", "a0", "b1"]

    def test_a_job_for_another_worker_stops_neither_its_tenant_nor_others(
        self, driver: Driver
    ) -> None:
        driver.enqueue("new", tenant="a", min_protocol=2)
        many(driver, "a", 2)
        many(driver, "b", 1)
        assert sorted(driver.claimed_ids()) == ["a0", "a1", "b0"]
        assert driver.listed() == line(driver, "a") == ["new"]
        assert driver.claimed_ids(protocol=2) == ["new"]

    def test_more_held_back_tenants_than_are_asked_block_nobody(self, driver: Driver) -> None:
        limit(driver, running=0, running_free="none")
        for n in range(100):
            driver.enqueue(f"held{n}", tenant=f"t{n}")
        driver.enqueue("free", tenant="free")
        assert driver.claimed_ids() == ["free"]


@pytest.mark.usefixtures("settled_redis")
class TestSets:
    """Whatever happens to a job, its tenant's sets say so, and nothing of it stays."""

    @pytest.mark.parametrize(
        "way",
        ["finish", "cancel", "cancel running", "expire", "dead", "stock cancel", "stock delete"],
    )
    def test_nothing_is_left_of_a_tenant_whose_jobs_ended(self, driver: Driver, way: str) -> None:
        driver.enqueue("a", tenant="acme", max_attempts=1, deadline_ms=1 if way == "expire" else 0)
        assert sets(driver, "acme") == ({"a"}, set())
        if way in {"finish", "cancel running", "dead"}:
            attempt = driver.take()
            assert sets(driver, "acme") == (set(), {"a"})
            assert line(driver, "acme") == []
        if way == "finish":
            driver.commit(attempt, attempt.row(), attempt.end())
        elif way == "cancel":
            driver.cancel("a")
        elif way == "cancel running":
            driver.cancel("a")
            driver.lapse("a")
            driver.reap()
        elif way == "dead":
            blame = calls.Blame(attempt.job.attempt, max_unproven=1, alone=True)
            driver.protocol.run(calls.crash("w1", [blame]))
        elif way == "stock cancel":
            driver.redis.hset("rq:job:a", "status", "canceled")
            driver.redis.lrem("rq:queue:tally:default", 1, "a")
            driver.protocol.run(calls.reconcile(QUEUE, ["a"], lease_ms=1000))
        elif way == "stock delete":
            driver.redis.delete("rq:job:a", "rq:queue:tally:default")
            driver.protocol.run(calls.reconcile(QUEUE, ["a"], lease_ms=1000))
        elif way == "expire":
            while driver.state("a") == "queued":
                driver.reap()
        assert driver.record("a").state not in {JobState.QUEUED, JobState.RUNNING}
        assert tenant_keys(driver) == []

    def test_a_stock_cancel_is_dropped_from_the_line_by_a_claim(self, driver: Driver) -> None:
        many(driver, "a", 2)
        driver.redis.hset("rq:job:a0", "status", "canceled")
        driver.redis.lrem("rq:queue:tally:default", 1, "a0")
        reply = driver.claim()
        assert ([job.job_id for job in reply.jobs], reply.dropped) == (["a1"], ["a0"])
        assert sets(driver, "a") == (set(), {"a1"})

    def test_the_audit_puts_right_what_a_hand_did(self, driver: Driver) -> None:
        many(driver, "a", 2)
        driver.take()
        keys = driver.keys
        driver.redis.sadd(keys.tenant_running("a"), "ghost", "a1")
        driver.redis.srem(keys.tenant_queued("a"), "a1")
        driver.enqueue("b0", tenant="b")
        driver.redis.sadd(keys.tenant_queued("a"), "b0")
        ids = ["a0", "a1", "b0", "ghost"]
        repaired = driver.protocol.run(calls.audit("a", ids))
        assert sorted(repaired) == [("a1", "queued"), ("b0", "closed"), ("ghost", "closed")]
        assert sets(driver, "a") == ({"a1"}, {"a0"})
        assert driver.protocol.run(calls.audit("a", ids)) == []

    def test_an_index_of_nobody_is_forgotten(self, driver: Driver) -> None:
        driver.redis.sadd(driver.keys.tenants(), "gone")
        driver.protocol.run(calls.audit("gone", []))
        assert tenant_keys(driver) == []

    @pytest.mark.parametrize("key", ["tenant:a:queued", "tenant:a:running", "line:tally:default:a",
                                     "turns:tally:default", "tenants", "limits"])  # fmt: skip
    def test_an_odd_key_stops_nobody(self, driver: Driver, key: str) -> None:
        many(driver, "a", 1)
        many(driver, "b", 1)
        driver.redis.delete(f"mlxs:{key}")
        driver.redis.set(f"mlxs:{key}", "odd")
        assert driver.enqueue("more", tenant="a").created
        claimed = {job.job_id: Attempt(job, "w1") for job in driver.claim().jobs}
        assert sorted(claimed) == ["a0", "b0", "more"]
        for attempt in claimed.values():
            assert driver.commit(attempt, attempt.end()) == ["OK"]
