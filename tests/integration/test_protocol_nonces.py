"""Attempts are told apart by the nonce of their claim, also where Redis forgot the claim (D3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from mlx_serving.common.attempts import Attempt as Name
from mlx_serving.common.attempts import new_nonce
from mlx_serving.common.protocol import calls
from mlx_serving.common.protocol.fields import JobField
from tests.support.protocol_driver import QUEUE, Attempt, Driver

if TYPE_CHECKING:
    from collections.abc import Callable

    from mlx_serving.common.redis.local import LocalRedis

pytestmark = pytest.mark.may_leak(reason="jobs stay queued or running at the end of a test")


def forget(driver: Driver, since: dict[bytes, bytes]) -> None:
    """Bring Redis back to an earlier state, as a failover or a restored snapshot does."""
    driver.redis.flushall()
    for key, dump in since.items():
        driver.redis.restore(key, 0, dump)


def claimed_twice(driver: Driver) -> tuple[Attempt, Attempt]:
    """One job's attempts by the same worker and under the same epoch; Redis forgot the first."""
    driver.enqueue("a")
    before = driver.snapshot()
    old = driver.take()
    forget(driver, before)
    new = driver.take()
    assert (old.job.epoch, old.worker) == (new.job.epoch, new.worker)
    assert old.job.attempt != new.job.attempt
    return old, new


class TestForgottenClaim:
    def test_rows_of_the_lost_attempt_are_refused(self, driver: Driver) -> None:
        old, new = claimed_twice(driver)
        assert driver.commit(old, old.row(), old.end()) == ["FENCED", "FENCED"]
        assert driver.commit(new, new.row(), new.row(), new.end()) == ["OK"] * 3
        assert [event.seq for event in driver.events("a")] == [1, 2, 3]

    def test_rows_under_the_new_attempts_numbers_do_not_pass_for_its_own(
        self, driver: Driver
    ) -> None:
        old, new = claimed_twice(driver)
        driver.commit(new, new.row(text="new"))
        assert driver.commit(old, old.row(text="new")) == ["FENCED"]

    def test_it_renews_and_releases_nothing(self, driver: Driver) -> None:
        old, _ = claimed_twice(driver)
        assert driver.renew(old).status == "FENCED"
        assert driver.release(old) == ["FENCED"]
        assert driver.state("a") == "running"

    def test_a_late_verdict_on_it_is_too_late(self, driver: Driver) -> None:
        old, new = claimed_twice(driver)
        blame = calls.Blame(old.job.attempt, max_unproven=1, alone=True)
        assert driver.protocol.run(calls.crash("w1", [blame])) == [("a", "gone")]
        assert (driver.state("a"), driver.record("a").attempts) == ("running", 0)
        assert driver.commit(new, new.row()) == ["OK"]

    def test_a_charge_is_told_by_the_nonce(self, driver: Driver) -> None:
        """The job was charged under that epoch before Redis forgot: that was another attempt."""
        driver.enqueue("a")
        first = driver.take()
        driver.protocol.run(calls.crash("w1", [calls.Blame(first.job.attempt, max_unproven=2)]))
        driver.redis.hset(driver.keys.job("a"), JobField.EPOCH, 0)
        second = driver.take()
        driver.release(second)
        blame = calls.Blame(second.job.attempt, max_unproven=2)
        assert driver.protocol.run(calls.crash("w1", [blame])) == [("a", "charged")]
        assert driver.record("a").attempts == 2


class TestOtherAttempts:
    def test_a_row_of_the_right_attempt_by_another_worker_is_refused(self, driver: Driver) -> None:
        attempt = driver.start("a")
        assert driver.commit(attempt, attempt.row(), worker="w2") == ["FENCED"]

    def test_a_release_of_an_older_attempt_is_no_resend(self, driver: Driver) -> None:
        first = driver.start("a")
        driver.release(first)
        second = driver.take()
        driver.release(second)
        assert driver.release(second) == ["DUP"]
        assert driver.release(first) == ["FENCED"]

    def test_a_late_verdict_takes_no_job_from_the_same_workers_next_attempt(
        self, driver: Driver
    ) -> None:
        first = driver.start("a")
        driver.release(first)
        driver.take()
        blame = calls.Blame(first.job.attempt, max_unproven=1, alone=True)
        assert driver.protocol.run(calls.crash("w1", [blame])) == [("a", "gone")]
        assert driver.state("a") == "running"


class TestResend:
    def test_the_same_row_is_a_resend(self, driver: Driver) -> None:
        attempt = driver.start("a")
        row = attempt.row()
        assert driver.commit(attempt, row) + driver.commit(attempt, row) == ["OK", "DUP"]

    @pytest.mark.parametrize("what", ["tokens", "end"])
    def test_another_row_under_a_committed_number_is_none(self, driver: Driver, what: str) -> None:
        """Redis forgot a commit of this attempt, or its worker counts wrong: nothing is spliced."""
        attempt = driver.start("a")
        driver.commit(attempt, attempt.row(text="one"), attempt.row(text="two"))
        other = attempt.row(2, text="other") if what == "tokens" else attempt.end(seq=2)
        before = driver.snapshot()
        assert driver.commit(attempt, other) == ["FENCED"]
        assert driver.events("a")[-1].choices[0].text == "two"
        assert driver.snapshot().keys() == before.keys()
        assert driver.state("a") == "running"


class TestClaimSentAgain:
    def test_it_returns_the_same_jobs_and_no_others(self, driver: Driver) -> None:
        for job_id in "abc":
            driver.enqueue(job_id)
        nonce = new_nonce()
        first = driver.claim(nonce=nonce, most=2).jobs
        again = driver.claim(nonce=nonce, most=2).jobs
        assert [job.job_id for job in first] == ["a", "b"]
        assert [(j.attempt, j.data, j.seq) for j in again] == [
            (j.attempt, j.data, j.seq) for j in first
        ]
        assert driver.listed() == ["c"]
        attempt = Attempt(again[0], "w1")
        assert driver.commit(attempt, attempt.row(), attempt.end()) == ["OK", "OK"]

    def test_what_is_no_longer_its_own_is_left_out(self, driver: Driver) -> None:
        for job_id in "abcd":
            driver.enqueue(job_id)
        nonce = new_nonce()
        jobs = {job.job_id: job for job in driver.claim(nonce=nonce).jobs}
        driver.release(Attempt(jobs["a"], "w1"))
        driver.take("w2")
        done = Attempt(jobs["b"], "w1")
        driver.commit(done, done.end())
        driver.release(Attempt(jobs["c"], "w1"))
        assert [job.job_id for job in driver.claim(nonce=nonce).jobs] == ["d"]
        assert driver.listed() == ["c"]

    def test_its_jobs_have_a_whole_lease_again(self, driver: Driver) -> None:
        nonce = new_nonce()
        driver.enqueue("a")
        driver.claim(nonce=nonce)
        driver.lapse("a")
        driver.claim(nonce=nonce)
        assert driver.reap().outcomes == []

    def test_another_worker_gets_nothing_by_it(self, driver: Driver) -> None:
        nonce = new_nonce()
        driver.enqueue("a")
        driver.claim("w1", nonce=nonce)
        assert driver.claim("w2", nonce=nonce).jobs == []

    @pytest.mark.parametrize("suspended", [False, True])
    def test_recalled_after_it_ran_it_gives_its_jobs(
        self, driver: Driver, *, suspended: bool
    ) -> None:
        nonce = new_nonce()
        driver.enqueue("a")
        driver.enqueue("b")
        driver.claim(nonce=nonce, most=1)
        if suspended:
            driver.redis.set("rq:suspended", 1)
        assert [job.job_id for job in driver.claim(nonce=nonce, most=0).jobs] == ["a"]
        assert driver.listed() == ["b"]

    def test_recalled_before_it_ran_it_takes_nothing_when_it_comes(self, driver: Driver) -> None:
        nonce = new_nonce()
        driver.enqueue("a")
        assert driver.claim(nonce=nonce, most=0).jobs == []
        assert driver.claim(nonce=nonce, most=8).jobs == []
        assert driver.listed() == ["a"]
        assert driver.claimed_ids() == ["a"]

    @pytest.mark.parametrize("how", ["deleted", "cancelled"])
    def test_what_a_stock_tool_ended_meanwhile_is_cancelled(self, driver: Driver, how: str) -> None:
        nonce = new_nonce()
        driver.enqueue("a")
        driver.claim(nonce=nonce)
        if how == "deleted":
            driver.redis.delete("rq:job:a")
        else:
            driver.redis.hset("rq:job:a", "status", "canceled")
        assert driver.claim(nonce=nonce, most=0).jobs == []
        assert driver.state("a") == "cancelled"

    @pytest.mark.parametrize("ran", [False, True])
    def test_a_full_redis_answers_a_recall(self, driver: Driver, *, ran: bool) -> None:
        nonce = new_nonce()
        driver.enqueue("a")
        if ran:
            driver.claim(nonce=nonce)
        driver.redis.config_set("maxmemory", "1")
        try:
            recalled = driver.claim(nonce=nonce, most=0).jobs
        finally:
            driver.redis.config_set("maxmemory", "0")
        assert len(recalled) == ran

    def test_an_odd_key_under_its_nonce_stops_no_claim(self, driver: Driver) -> None:
        nonce = new_nonce()
        driver.redis.rpush(f"mlxs:claim:{nonce}", "x")
        driver.enqueue("a")
        assert [job.job_id for job in driver.claim(nonce=nonce).jobs] == ["a"]
        driver.redis.set("mlxs:claim:other", "a unknown \xff :")
        assert driver.claim(nonce="other", most=0).jobs == []

    def test_what_it_took_is_remembered_for_three_leases(self, driver: Driver) -> None:
        nonce = new_nonce()
        driver.enqueue("a")
        driver.claim(nonce=nonce, lease_ms=5_000)
        assert 10_000 < driver.redis.pttl(f"mlxs:claim:{nonce}") <= 15_000
        driver.claim(nonce="empty")
        assert driver.redis.exists("mlxs:claim:empty") == 0


class TestName:
    def test_a_name_reads_back(self) -> None:
        attempt = Name("a:b", 12, new_nonce())
        assert Name.parse(attempt.name) == attempt
        assert attempt.name.startswith("a:b:12:")

    @pytest.mark.parametrize("odd", ["", "a", "a:1", ":1:0f", "a:x:0f", "a:-1:0f", "a:²:0f"])
    def test_what_names_none_is_refused(self, odd: str) -> None:
        with pytest.raises(ValueError, match=r"unpack|names no attempt"):
            Name.parse(odd)

    def test_no_two_nonces_are_alike(self) -> None:
        assert len({new_nonce() for _ in range(10_000)}) == 10_000


@pytest.mark.parametrize("step", ["renew", "release", "crash"])
def test_a_job_without_a_nonce_is_nobodys(
    driver: Driver, settled_redis: LocalRedis, step: str
) -> None:
    del settled_redis
    attempt = driver.start("a")
    driver.redis.hdel(driver.keys.job("a"), JobField.NONCE)
    blame = calls.Blame(attempt.job.attempt, max_unproven=1)
    outcome: Callable[[], object] = {
        "renew": lambda: driver.renew(attempt).status,
        "release": lambda: driver.release(attempt)[0],
        "crash": lambda: driver.protocol.run(calls.crash("w1", [blame]))[0][1],
    }[step]
    assert outcome() in {"FENCED", "gone"}
    driver.lapse("a")
    assert dict(driver.reap().outcomes) == {"a": "requeued"}
    assert driver.listed(QUEUE) == ["a"]
