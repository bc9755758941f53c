"""What a crash does to jobs in Redis (D7): the verdict's script, and whom a claim puts together."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_serving.common.protocol import calls
from mlx_serving.common.protocol.calls import Blame, HeldRows
from mlx_serving.common.protocol.fields import JobField
from mlx_serving.common.states import JobState
from tests.support.protocol_driver import QUEUE, Driver

pytestmark = pytest.mark.may_leak(reason="jobs stay queued or running at the end of a test")

BULK = "tally:bulk"
INTERACTIVE = "tally:interactive"


def crash(driver: Driver, *blamed: Blame, worker: str = "w1") -> dict[str, str]:
    outcomes = driver.protocol.run(calls.crash(worker, blamed))
    return dict(outcomes)


def claim_all(driver: Driver, *ids: str) -> None:
    for job_id in ids:
        driver.enqueue(job_id)
    assert driver.claimed_ids(most=len(ids)) == list(ids)


def suspects(driver: Driver, max_unproven: int, *ids: str, **fields: Any) -> None:
    """Leave jobs queued as a crash of their first attempt leaves them."""
    for job_id in ids:
        driver.start(job_id, **fields)
    crash(driver, *[driver.blame(job_id, 1, max_unproven) for job_id in ids])


def starve(driver: Driver, *ids: str) -> None:
    for job_id in ids:
        driver.redis.hset(driver.keys.job(job_id), JobField.SUSPECT_SINCE_MS, 1)


class TestVerdict:
    def test_jobs_come_back_at_once_in_the_order_of_the_verdict(self, driver: Driver) -> None:
        claim_all(driver, "a", "b", "c")
        driver.enqueue("d")
        blamed = [driver.blame("b", 1, 1), driver.blame("a", 1, 2), driver.blame("c", 1)]
        assert crash(driver, *blamed) == {"a": "charged", "b": "charged", "c": "requeued"}
        assert (driver.listed(), driver.leased()) == (["b", "a", "c", "d"], [])
        assert [driver.record(i).attempts for i in "abc"] == [1, 1, 0]
        assert {driver.rq_status(i) for i in "abc"} == {"queued"}

    def test_the_dead_childs_own_writes_are_fenced(self, driver: Driver) -> None:
        attempt = driver.start("a")
        driver.commit(attempt, attempt.row())
        crash(driver, driver.blame("a", 1, 1))
        assert driver.commit(attempt, attempt.row()) == ["FENCED"]
        again = driver.take("w2")
        assert (again.job.epoch, again.job.seq, again.job.max_unproven) == (2, 1, 1)

    def test_sent_again_it_charges_nobody_twice(self, driver: Driver) -> None:
        claim_all(driver, "a", "b")
        verdict = [driver.blame("a", 1, 1), driver.blame("b", 1)]
        assert crash(driver, *verdict) == {"a": "charged", "b": "requeued"}
        assert crash(driver, *verdict) == {"a": "gone", "b": "gone"}
        assert driver.record("a").attempts == 1
        assert driver.listed() == ["a", "b"]

    def test_too_late_it_touches_nobody_elses_job(self, driver: Driver) -> None:
        driver.start("a")
        assert crash(driver, driver.blame("a", 1, 1), worker="w2") == {"a": "gone"}
        crash(driver, driver.blame("a", 1))
        driver.take("w2")
        assert crash(driver, driver.blame("a", 1, 1)) == {"a": "gone"}
        assert driver.record("a").attempts == 0
        assert crash(driver, driver.blame("unknown", 1, 1)) == {"unknown": "gone"}

    def test_a_job_reaped_meanwhile_is_charged_where_it_waits(self, driver: Driver) -> None:
        attempt = driver.start("a")
        driver.release(attempt)
        assert crash(driver, driver.blame("a", 1, 1, alone=True)) == {"a": "charged"}
        assert crash(driver, driver.blame("a", 1, 1, alone=True)) == {"a": "gone"}
        assert (driver.listed(), driver.record("a").attempts) == (["a"], 1)

    def test_a_cancelled_job_ends(self, driver: Driver) -> None:
        driver.start("a")
        driver.cancel("a")
        assert crash(driver, driver.blame("a", 1, 1, alone=True)) == {"a": "cancelled"}
        assert driver.state("a") == "cancelled"

    def test_alone_and_again_is_what_makes_it_dead(self, driver: Driver) -> None:
        driver.enqueue("a")
        for epoch, alone in enumerate([False, False, True], start=1):
            driver.take()
            assert driver.state("a") == "running"
            crash(driver, driver.blame("a", epoch, 1, alone=alone))
        record = driver.record("a")
        assert (record.state, record.error_code) == (JobState.DEAD, "poison")
        assert (driver.listed(), driver.leased(), driver.indexed()) == ([], [], [])
        (end,) = driver.events("a")
        assert (end.type, end.state) == ("end", "dead")
        assert driver.rq_status("a") == "failed"

    def test_once_alone_is_not_enough(self, driver: Driver) -> None:
        driver.start("a")
        assert crash(driver, driver.blame("a", 1, 1, alone=True)) == {"a": "charged"}
        assert driver.state("a") == "queued"

    def test_in_company_a_job_never_dies(self, driver: Driver) -> None:
        driver.enqueue("a", max_attempts=1)
        for epoch in range(1, 20):
            driver.take()
            crash(driver, driver.blame("a", epoch, 2))
        assert (driver.state("a"), driver.record("a").attempts) == ("queued", 19)

    def test_company_never_grows_again(self, driver: Driver) -> None:
        driver.enqueue("a")
        for epoch, bound in enumerate([8, 2, 32], start=1):
            driver.take()
            crash(driver, driver.blame("a", epoch, bound))
        assert driver.take().job.max_unproven == 2


class TestCompany:
    def test_suspects_are_claimed_up_to_their_company(self, driver: Driver) -> None:
        suspects(driver, 2, "a", "b", "c")
        driver.enqueue("d")
        assert len(driver.claimed_ids()) == 2

    def test_the_least_company_of_all_decides(self, driver: Driver) -> None:
        claim_all(driver, "three", "two")
        crash(driver, driver.blame("three", 1, 3), driver.blame("two", 1, 2))
        for job_id in "xyz":
            driver.enqueue(job_id)
        assert driver.claimed_ids() == ["three", "two"]

    @pytest.mark.parametrize(
        ("held", "taken"),
        [
            (HeldRows(), ["a"]),
            (HeldRows(rows=1, unproven=0), ["b", "c"]),
            (HeldRows(rows=1, unproven=1), ["b", "c"]),
            (HeldRows(rows=1, unproven=1, max_unproven=1), []),
            (HeldRows(rows=2, unproven=1, max_unproven=2), ["b"]),
        ],
    )
    def test_one_that_runs_alone_runs_truly_alone(
        self, driver: Driver, held: HeldRows, taken: list[str]
    ) -> None:
        suspects(driver, 1, "a")
        driver.enqueue("b")
        driver.enqueue("c")
        assert driver.claimed_ids(held=held) == taken

    def test_proven_rows_are_no_company(self, driver: Driver) -> None:
        suspects(driver, 2, "a", "b", "c")
        assert len(driver.claimed_ids(held=HeldRows(rows=40, unproven=0))) == 2

    def test_a_full_worker_leaves_suspects_and_takes_what_stands_behind_them(
        self, driver: Driver
    ) -> None:
        suspects(driver, 2, "a", "b")
        driver.enqueue("c")
        assert driver.claimed_ids("busy", held=HeldRows(rows=9, unproven=9)) == ["c"]
        assert driver.listed() == ["a", "b"]


class TestStarvation:
    """Neither do innocents starve suspects, nor suspects their lane."""

    BUSY = HeldRows(rows=5, unproven=5)

    def test_one_worker_makes_room_for_a_suspect_that_waited_long(self, driver: Driver) -> None:
        suspects(driver, 1, "a")
        driver.enqueue("b")
        starve(driver, "a")
        reply = driver.claim("w1", held=self.BUSY)
        assert (reply.jobs, reply.reserved) == ([], QUEUE)
        assert driver.claimed_ids("w2", held=self.BUSY) == ["b"]
        assert driver.claimed_ids("w1") == ["a"]

    def test_with_many_suspects_still_one_worker_alone_makes_room(self, driver: Driver) -> None:
        suspects(driver, 1, "a", "b", "c")
        starve(driver, "a", "b", "c")
        for job_id in "xyz":
            driver.enqueue(job_id)
        assert driver.claim("w1", held=self.BUSY).reserved == QUEUE
        assert driver.claimed_ids("w2", most=2, held=self.BUSY) == ["x", "y"]
        assert driver.claimed_ids("w3", most=2, held=self.BUSY) == ["z"]

    def test_the_reservation_of_a_worker_that_died_ends(self, driver: Driver) -> None:
        suspects(driver, 1, "a")
        starve(driver, "a")
        driver.claim("w1", held=self.BUSY)
        assert 0 < driver.redis.pttl("mlxs:reserved:tally:default") <= 3000
        driver.redis.delete("mlxs:reserved:tally:default")
        assert driver.claim("w2", held=self.BUSY).reserved == QUEUE

    def test_a_fresh_suspect_holds_nobody_up(self, driver: Driver) -> None:
        suspects(driver, 1, "a")
        driver.enqueue("b")
        assert driver.claimed_ids(held=self.BUSY) == ["b"]

    def test_a_suspect_of_a_lower_lane_gets_its_turn(self, driver: Driver) -> None:
        """Asked first for the suspect's queue, a worker takes no more of the other lanes."""
        suspects(driver, 1, "low", queue=BULK)
        starve(driver, "low")
        driver.enqueue("high", queue=INTERACTIVE)
        lanes = (INTERACTIVE, QUEUE, BULK)
        reply = driver.claim(queues=lanes, held=self.BUSY)
        assert ([job.job_id for job in reply.jobs], reply.reserved) == (["high"], BULK)
        driver.enqueue("higher", queue=INTERACTIVE)
        first = (BULK, INTERACTIVE, QUEUE)
        assert driver.claim(queues=first, held=self.BUSY).jobs == []
        assert driver.claimed_ids(queues=first) == ["low"]
