"""Attempts whose worker was lost (D7): what counts, what is taken back, how a job ends."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from mlx_serving.cli.main import app
from mlx_serving.cli.overview import look
from mlx_serving.common import attempts
from mlx_serving.common.protocol import calls, ended_calls
from mlx_serving.common.protocol.calls import HeldRows
from mlx_serving.common.protocol.fields import JobField
from mlx_serving.common.states import JobState
from mlx_serving.worker.delivery.sweeper import Sweeper
from tests.support.lost_machines import LEASE_MS, awake, go_back
from tests.support.protocol_driver import LANES, QUEUE, Attempt, Driver

if TYPE_CHECKING:
    from collections.abc import Callable

    from mlx_serving.common.redis.local import LocalRedis

pytestmark = [
    pytest.mark.usefixtures("settled_redis"),
    pytest.mark.may_leak(reason="jobs stay queued or running at the end of a test"),
]

MACHINES = ("0000000a", "0000000b", "0000000c", "0000000d", "0000000e", "0000000f")
HOUR_MS = 3_600_000


def take(driver: Driver, machine: str, **given: object) -> Attempt:
    """Claim one job on a worker of that machine."""
    nonce = attempts.new_nonce(machine)
    return driver.take(f"mac-{machine[-1]}", nonce=nonce, lease_ms=LEASE_MS, **given)


def may_take(driver: Driver, machine: str, **given: object) -> list[str]:
    nonce = attempts.new_nonce(machine)
    return driver.claimed_ids(f"mac-{machine[-1]}", nonce=nonce, lease_ms=LEASE_MS, **given)


def lose(driver: Driver, *lost: Attempt) -> list[tuple[str, str]]:
    """Let the machine of these attempts die."""
    driver.lapse(*(attempt.job.job_id for attempt in lost))
    return driver.reap(LEASE_MS).outcomes


def lose_on(driver: Driver, *machines: str) -> list[tuple[str, str]]:
    """Let the one job that there is be lost on these machines, one after the other."""
    return [outcome for machine in machines for outcome in lose(driver, take(driver, machine))]


def isolated(driver: Driver) -> list[bytes]:
    ids: Any = driver.redis.zrange(driver.keys.isolated(QUEUE), 0, -1)
    return list(ids)


class TestSuspicion:
    def test_one_loss_says_nothing(self, driver: Driver) -> None:
        driver.enqueue("a")
        assert lose_on(driver, MACHINES[0]) == [("a", "requeued")]
        assert take(driver, MACHINES[0]).job.max_unproven == 0

    def test_a_few_make_a_suspect_in_small_company_then_alone(self, driver: Driver) -> None:
        driver.enqueue("a")
        seen = []
        for machine in MACHINES[:3]:
            attempt = take(driver, machine)
            seen.append((attempt.job.max_unproven, attempt.job.runs_alone))
            lose(driver, attempt)
        attempt = take(driver, MACHINES[3])
        seen.append((attempt.job.max_unproven, attempt.job.runs_alone))
        assert seen == [(0, False), (0, False), (4, False), (1, True)]
        assert driver.record("a").attempts == 0

    def test_the_smaller_company_counts_of_a_crashs_and_a_losss(self, driver: Driver) -> None:
        driver.start("a")
        driver.protocol.run(calls.crash("w1", [driver.blame("a", 1, 2)]))
        lose_on(driver, *MACHINES[:2])
        assert take(driver, MACHINES[2]).job.max_unproven == 2

    def test_one_that_runs_alone_waits_for_an_empty_worker(self, driver: Driver) -> None:
        driver.enqueue("a")
        lose_on(driver, *MACHINES[:3])
        driver.enqueue("b")
        assert may_take(driver, MACHINES[3], held=HeldRows(rows=1)) == ["b"]
        driver.enqueue("c")
        assert may_take(driver, MACHINES[3]) == ["a"]
        held = HeldRows(rows=1, unproven=1, max_unproven=1)
        assert may_take(driver, MACHINES[3], held=held) == []

    def test_a_claim_sent_again_says_it_again(self, driver: Driver) -> None:
        driver.enqueue("a")
        lose_on(driver, *MACHINES[:3])
        nonce = attempts.new_nonce(MACHINES[3])
        first, again = (driver.claim("w", nonce=nonce).jobs for _ in range(2))
        assert [(job.attempt, job.max_unproven, job.runs_alone) for job in first] == [
            (job.attempt, 1, True) for job in again
        ]

    def test_batch_mates_share_losses_and_end_well(self, driver: Driver) -> None:
        """Four jobs that three machines died with: each runs alone then, and three of them end."""
        for job_id in ("poison", "x", "y", "z"):
            driver.enqueue(job_id)
        for machine in MACHINES[:3]:
            claims = driver.claim("m", nonce=attempts.new_nonce(machine)).jobs
            assert len(claims) == 4
            lose(driver, *(Attempt(job, "m") for job in claims))
        ended: list[str] = []
        for machine in [*MACHINES[3:], *MACHINES] * 2:
            for job in driver.claim("m", nonce=attempts.new_nonce(machine)).jobs:
                attempt = Attempt(job, "m")
                if job.job_id == "poison":
                    lose(driver, attempt)
                else:
                    driver.commit(attempt, attempt.end())
                    ended.append(job.job_id)
        assert sorted(ended) == ["x", "y", "z"]
        assert isolated(driver) == [b"poison"]


class TestComingBack:
    """A worker that shows itself again takes its losses back: it slept."""

    @staticmethod
    def renew(driver: Driver, attempt: Attempt) -> None:
        assert driver.renew(attempt).status == "FENCED"

    @staticmethod
    def commit(driver: Driver, attempt: Attempt) -> None:
        assert driver.commit(attempt, attempt.row()) == ["FENCED"]

    @staticmethod
    def release(driver: Driver, attempt: Attempt) -> None:
        driver.release(attempt)

    @staticmethod
    def crash(driver: Driver, attempt: Attempt) -> None:
        driver.protocol.run(calls.crash(attempt.worker, [calls.Blame(attempt.job.attempt)]))

    @pytest.mark.parametrize("how", ["renew", "commit", "release", "crash"])
    def test_a_fleet_that_sleeps_charges_nobody(self, driver: Driver, how: str) -> None:
        wake: Callable[[Driver, Attempt], None] = getattr(self, how)
        driver.enqueue("a")
        for number in range(20):
            attempt = take(driver, MACHINES[number % 6])
            assert attempt.job.max_unproven == 0
            assert lose(driver, attempt) == [("a", "requeued")]
            wake(driver, attempt)
        assert driver.redis.hget(driver.keys.job("a"), JobField.LOSSES) == b""

    def test_also_while_another_runs_it(self, driver: Driver) -> None:
        driver.enqueue("a")
        first, second, third = (take_and_lose(driver, machine) for machine in MACHINES[:3])
        running = take(driver, MACHINES[3])
        for attempt in (third, first, second):
            self.renew(driver, attempt)
        assert driver.commit(running, running.row()) == ["OK"]
        lose(driver, running)
        assert take(driver, MACHINES[4]).job.max_unproven == 0

    def test_a_isolated_job_goes_on(self, driver: Driver) -> None:
        driver.enqueue("a", tenant="acme")
        lost = [take_and_lose(driver, machine) for machine in MACHINES[:5]]
        assert isolated(driver) == [b"a"]
        self.renew(driver, lost[-1])
        assert driver.reap(LEASE_MS).outcomes == [("a", "requeued")]
        assert (isolated(driver), driver.listed()) == ([], ["a"])
        assert driver.redis.lrange(driver.keys.line(QUEUE, "acme"), 0, -1) == [b"a"]

    def test_another_life_of_the_same_name_forgives_nothing(self, driver: Driver) -> None:
        driver.enqueue("a")
        take_and_lose(driver, MACHINES[0])
        again = take(driver, MACHINES[0])
        self.release(driver, again)
        assert take_and_lose(driver, MACHINES[0]).job.max_unproven == 0
        assert take(driver, MACHINES[0]).job.max_unproven == 4


def take_and_lose(driver: Driver, machine: str) -> Attempt:
    attempt = take(driver, machine)
    lose(driver, attempt)
    return attempt


class TestEnd:
    def test_two_machines_that_it_was_alone_on_make_it_dead(self, driver: Driver) -> None:
        driver.enqueue("a")
        outcomes = lose_on(driver, *MACHINES[:5])
        assert outcomes == [*[("a", "requeued")] * 4, ("a", "isolated")]
        assert (driver.state("a"), driver.listed()) == ("queued", [])
        go_back(driver, "a", HOUR_MS)
        assert awake(driver, MACHINES[3]) == []  # of the other it is not known yet
        assert awake(driver, MACHINES[4]) == [("a", "dead")]
        record = driver.record("a")
        assert (record.state, record.error_code) == (JobState.DEAD, "poison")
        assert record.message == (
            "workers on 2 machines were lost while the job ran alone (mac-d, mac-e), "
            "5 workers in all"
        )
        assert (driver.listed(), driver.leased(), driver.indexed()) == ([], [], [])
        assert isolated(driver) == []
        assert driver.events("a")[-1].state == "dead"

    def test_machines_that_never_come_back_prove_nothing(self, driver: Driver) -> None:
        """They may be laptops that sleep over a weekend."""
        driver.enqueue("a")
        lose_on(driver, *MACHINES[:5])
        go_back(driver, "a", 80 * HOUR_MS)
        assert driver.reap(LEASE_MS).outcomes == []
        assert (driver.state("a"), isolated(driver)) == ("queued", [b"a"])

    def test_a_requeue_forgives_its_losses(self, driver: Driver) -> None:
        self.test_two_machines_that_it_was_alone_on_make_it_dead(driver)
        driver.protocol.run(ended_calls.requeue("a"))
        attempt = take(driver, MACHINES[3])
        assert (attempt.job.max_unproven, attempt.job.runs_alone) == (0, False)

    def test_a_machine_that_is_awake_for_a_moment_proves_nothing(self, driver: Driver) -> None:
        """A laptop has just woken: its workers may not have spoken yet."""
        driver.enqueue("a")
        lose_on(driver, *MACHINES[:5])
        go_back(driver, "a", HOUR_MS)
        for machine in MACHINES[3:5]:
            assert awake(driver, machine, leases=5) == []
        assert driver.state("a") == "queued"

    def test_one_machine_alone_is_isolated_and_never_dead(self, driver: Driver) -> None:
        driver.enqueue("a")
        for _ in range(3):
            take_and_lose(driver, MACHINES[0])
        take_and_lose(driver, MACHINES[0])
        assert may_take(driver, MACHINES[0]) == []  # others go first for a while
        go_back(driver, "a", HOUR_MS)
        assert lose(driver, take(driver, MACHINES[0])) == [("a", "isolated")]
        go_back(driver, "a", 100 * HOUR_MS)
        assert awake(driver, MACHINES[0]) == []
        assert may_take(driver, MACHINES[0]) == []
        assert driver.state("a") == "queued"

    def test_another_machine_that_comes_takes_it_out_of_isolation(self, driver: Driver) -> None:
        self.test_one_machine_alone_is_isolated_and_never_dead(driver)
        assert awake(driver, MACHINES[1]) == [("a", "requeued")]
        assert may_take(driver, MACHINES[0]) == []
        attempt = take(driver, MACHINES[1])
        assert attempt.job.runs_alone
        assert lose(driver, attempt) == [("a", "isolated")]
        go_back(driver, "a", HOUR_MS)
        assert awake(driver, MACHINES[0]) + awake(driver, MACHINES[1]) == [("a", "dead")]

    def test_two_workers_of_one_machine_are_not_two_machines(self, driver: Driver) -> None:
        driver.enqueue("a")
        for name in ("one", "two", "three", "four", "five"):
            nonce = attempts.new_nonce(MACHINES[0])
            (job,) = driver.claim(name, nonce=nonce, lease_ms=LEASE_MS).jobs
            lose(driver, Attempt(job, name))
            go_back(driver, "a", HOUR_MS)
        awake(driver, MACHINES[0])
        assert (driver.state("a"), isolated(driver)) == ("queued", [b"a"])

    def test_a_mate_on_the_same_machine_is_company(self, driver: Driver) -> None:
        """The poison ran on the machine's other worker: who was alone beside it is innocent."""
        driver.enqueue("a")
        lose_on(driver, *MACHINES[:3])
        for machine in MACHINES[3:5]:
            alone = take(driver, machine)
            driver.enqueue("poison" + machine)
            (job,) = driver.claim("neighbour", nonce=attempts.new_nonce(machine)).jobs
            lose(driver, alone, Attempt(job, "neighbour"))
        assert (isolated(driver), "a" in driver.listed()) == ([], True)
        go_back(driver, "a", HOUR_MS)
        for machine in MACHINES[3:5]:
            awake(driver, machine)
        assert driver.state("a") == "queued"

    def test_an_attempt_that_got_far_did_not_die_of_how_it_began(self, driver: Driver) -> None:
        driver.enqueue("a")
        lose_on(driver, *MACHINES[:3])
        for machine in MACHINES[3:]:
            attempt = take(driver, machine)
            driver.commit(attempt, *[attempt.row() for _ in range(20)])
            assert lose(driver, attempt) == [("a", "requeued")]

    def test_with_machines_without_end_it_comes_to_an_end(self, driver: Driver) -> None:
        """Whatever it does to them, and however far it gets each time."""
        driver.enqueue("a")
        for number in range(40):
            jobs = driver.claim("w", nonce=attempts.new_nonce(f"{number:08x}")).jobs
            if not jobs:
                break
            attempt = Attempt(jobs[0], "w")
            driver.commit(attempt, *[attempt.row() for _ in range(20)])
            lose(driver, attempt)
        assert number == 16
        assert isolated(driver) == [b"a"]

    def test_workers_that_name_no_machine_are_a_machine_each(self, driver: Driver) -> None:
        driver.enqueue("a")
        for number in range(5):
            lose(driver, driver.take(f"mac, {number}"))
        assert isolated(driver) == [b"a"]
        go_back(driver, "a", 25 * HOUR_MS)
        assert driver.reap(LEASE_MS).outcomes == []  # nobody can see that such a machine is awake


@pytest.fixture
def held(driver: Driver) -> Driver:
    """With a isolated job `a`."""
    driver.enqueue("a", tenant="acme", deadline_ms=HOUR_MS)
    lose_on(driver, *MACHINES[:5])
    assert isolated(driver) == [b"a"]
    return driver


class TestIsolation:
    def test_it_is_queued_and_yet_nobody_takes_it(self, held: Driver) -> None:
        held.enqueue("b", tenant="acme")
        assert may_take(held, MACHINES[5]) == ["b"]
        assert (held.state("a"), held.rq_status("a")) == ("queued", "queued")
        assert held.redis.smembers(held.keys.tenant_queued("acme")) == {b"a"}

    def test_the_reconciler_leaves_it_there(self, held: Driver) -> None:
        sweeper = Sweeper(held.protocol, LANES, lease_ms=LEASE_MS, reap_seconds=1)
        held.redis.lpush(held.keys.rq_queue(QUEUE), "junk")
        for _ in range(3):
            assert sweeper.reconcile(QUEUE) == []
        assert isolated(held) == [b"a"]

    def test_a_hand_that_lists_it_again_starts_nothing(self, held: Driver) -> None:
        held.redis.rpush(held.keys.rq_queue(QUEUE), "a")
        assert may_take(held, MACHINES[5]) == []
        assert (held.listed(), isolated(held)) == ([], [b"a"])

    def test_a_list_that_has_it_instead_gives_it_back(self, held: Driver) -> None:
        held.redis.delete(held.keys.isolated(QUEUE))
        held.redis.rpush(held.keys.rq_queue(QUEUE), "a")
        assert may_take(held, MACHINES[5]) == []
        assert (held.listed(), isolated(held)) == ([], [b"a"])

    @pytest.mark.parametrize("how", ["cancel", "expire"])
    def test_its_end_walks_no_list(self, held: Driver, how: str) -> None:
        held.redis.zadd("mlxs:deadlines", {"a": 1})
        held.redis.rpush(held.keys.rq_queue(QUEUE), "a")  # who looks for it there finds it
        if how == "cancel":
            held.cancel("a")
        else:
            assert held.reap(LEASE_MS).outcomes == [("a", "expired")]
        assert (held.listed(), isolated(held)) == (["a"], [])

    def test_a_call_judges_few(self, held: Driver) -> None:
        for number in range(40):
            held.redis.zadd(held.keys.isolated(QUEUE), {f"gone-{number}": 1})
        held.reap(LEASE_MS)
        assert len(isolated(held)) >= 41 - 8

    def test_a_full_redis_renews_although_a_loss_is_forgiven(self, driver: Driver) -> None:
        driver.enqueue("a")
        lost = take_and_lose(driver, MACHINES[0])
        driver.redis.config_set("maxmemory", 1)
        try:
            assert driver.renew(lost).status == "FENCED"
        finally:
            driver.redis.config_set("maxmemory", 0)
        assert driver.redis.hget(driver.keys.job("a"), JobField.LOSSES) == b""

    def test_a_pardon_lets_it_run_again_as_if_nothing_was(self, held: Driver) -> None:
        assert held.protocol.run(ended_calls.pardon("a")) is JobState.QUEUED
        attempt = take(held, MACHINES[0])
        assert (attempt.job.max_unproven, attempt.job.runs_alone) == (0, False)
        held.commit(attempt, attempt.end())
        assert held.protocol.run(ended_calls.pardon("a")) is JobState.FINISHED
        assert held.protocol.run(ended_calls.pardon("unknown")) is None
        assert (isolated(held), held.listed()) == ([], [])

    def test_the_operator_sees_it_and_pardons_it(
        self, held: Driver, settled_redis: LocalRedis
    ) -> None:
        at = ["--redis-url", settled_redis.url]
        shown = CliRunner().invoke(app, ["status", *at])
        assert "tally:default: job a is isolated" in shown.output
        (queue,) = look(held.redis, held.keys).queues
        assert queue.oldest_seconds is not None
        assert queue.oldest_seconds < 60
        assert "workers_lost  5" in CliRunner().invoke(app, ["status", "a", *at]).output
        assert CliRunner().invoke(app, ["pardon", "a", *at]).output == "queued\n"
        assert "isolated" not in CliRunner().invoke(app, ["status", *at]).output
        assert CliRunner().invoke(app, ["pardon", "unknown", *at]).exit_code == 1
        assert held.listed() == ["a"]

    def test_it_can_be_cancelled(self, held: Driver) -> None:
        assert held.cancel("a") is JobState.CANCELLED
        assert (isolated(held), held.indexed()) == ([], [])

    def test_it_can_be_cancelled_with_rqs_tools(self, held: Driver) -> None:
        held.redis.hset("rq:job:a", "status", "canceled")
        assert held.reap(LEASE_MS).outcomes == [("a", "cancelled")]
        assert isolated(held) == []

    def test_its_deadline_ends_it(self, held: Driver) -> None:
        held.redis.zadd("mlxs:deadlines", {"a": 1})
        assert held.reap(LEASE_MS).outcomes == [("a", "expired")]
        assert isolated(held) == []

    def test_an_odd_hash_of_it_stops_nobody(self, held: Driver) -> None:
        held.redis.hset(held.keys.job("a"), "seq", "odd")
        held.reap(LEASE_MS)
        assert (held.record("a").error_code, isolated(held)) == ("corrupt_job", [])

    def test_odd_losses_and_machines_are_none(self, driver: Driver) -> None:
        driver.enqueue("a")
        driver.redis.hset(driver.keys.job("a"), JobField.LOSSES, b"\xff, junk 1,2,3 ,,,,")
        driver.redis.rpush(f"mlxs:machine:{MACHINES[0]}", "a list")
        assert lose_on(driver, MACHINES[0]) == [("a", "requeued")]
        assert take(driver, MACHINES[0]).job.max_unproven == 0

    def test_an_earlier_life_of_the_machine_is_no_company(self, driver: Driver) -> None:
        """It died before, and its machine came back at once: not with this attempt."""
        driver.enqueue("a")
        for number, machine in enumerate([*MACHINES[:3], MACHINES[0], MACHINES[1]]):
            name = f"life-{number}"
            (job,) = driver.claim(name, nonce=attempts.new_nonce(machine), lease_ms=LEASE_MS).jobs
            time.sleep(0.002)
            lose(driver, Attempt(job, name))
            time.sleep(0.002)
        assert isolated(driver) == [b"a"]
        go_back(driver, "a", HOUR_MS)
        assert awake(driver, MACHINES[0]) + awake(driver, MACHINES[1]) == [("a", "dead")]
