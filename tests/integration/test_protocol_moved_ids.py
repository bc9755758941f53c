"""An id that a hand put on another queue's list keeps its lease and its own queue (D1, D3)."""

from __future__ import annotations

import pytest

from mlx_serving.common.protocol import calls
from mlx_serving.worker.delivery.sweeper import Sweeper
from tests.support.protocol_driver import LANES, QUEUE, Driver

pytestmark = [
    pytest.mark.usefixtures("settled_redis"),
    pytest.mark.may_leak(reason="jobs stay queued or running at the end of a test"),
]

OTHER = "tally:bulk"


def move(driver: Driver, job_id: str, *, keep: bool = False) -> None:
    if not keep:
        driver.redis.lrem(driver.keys.rq_queue(QUEUE), 0, job_id)
    driver.redis.rpush(driver.keys.rq_queue(OTHER), job_id)


def reconcile(driver: Driver) -> list[tuple[str, str]]:
    """As workers do; a count off once may be a job on its way."""
    sweeper = Sweeper(driver.protocol, LANES, lease_ms=1_000, reap_seconds=1)
    return [each for _ in range(2) for queue in LANES for each in sweeper.reconcile(queue)]


def check_nothing_of_it_elsewhere(driver: Driver) -> None:
    assert (driver.leased(OTHER), driver.indexed(OTHER), driver.listed(OTHER)) == ([], [], [])


@pytest.mark.parametrize("tenant", ["", "acme"])
def test_moved_while_queued_it_goes_back_to_its_own(driver: Driver, tenant: str) -> None:
    driver.enqueue("a", tenant=tenant)
    move(driver, "a")
    assert driver.claim(queues=[OTHER]).dropped == ["a"]
    assert driver.state("a") == "queued"
    check_nothing_of_it_elsewhere(driver)
    assert reconcile(driver) == [("a", "requeued")]
    attempt = driver.take()
    assert attempt.job.queue == QUEUE
    assert driver.leased() == ["a"]
    driver.commit(attempt, attempt.end())
    assert (driver.leased(), driver.indexed()) == ([], [])
    check_nothing_of_it_elsewhere(driver)


def test_moved_while_queued_it_is_missed_before_anybody_claims_from_there(driver: Driver) -> None:
    driver.enqueue("a")
    move(driver, "a")
    assert ("a", "requeued") in reconcile(driver)
    assert driver.take(queues=[QUEUE]).job.queue == QUEUE
    assert driver.claim(queues=[OTHER]).dropped == ["a"]


@pytest.mark.parametrize("lanes", [LANES, (OTHER, QUEUE)])
def test_listed_in_two_queues_it_runs_once(driver: Driver, lanes: tuple[str, ...]) -> None:
    driver.enqueue("a")
    move(driver, "a", keep=True)
    reply = driver.claim(queues=lanes)
    assert [(job.job_id, job.queue) for job in reply.jobs] == [("a", QUEUE)]
    assert driver.claim("w2", queues=lanes).jobs == []
    assert driver.leased() == ["a"]
    check_nothing_of_it_elsewhere(driver)


def test_pushed_while_it_runs_it_keeps_its_lease(driver: Driver) -> None:
    attempt = driver.start("a")
    move(driver, "a", keep=True)
    assert driver.claim("w2").dropped == ["a"]
    assert driver.commit(attempt, attempt.row()) == ["OK"]
    assert driver.renew(attempt).status == "OK"
    assert driver.reap().outcomes == []
    assert driver.leased() == ["a"]
    check_nothing_of_it_elsewhere(driver)


def test_a_lease_in_another_queue_is_no_lease_of_it(driver: Driver) -> None:
    """What a claim from the wrong list once left behind, or a hand."""
    attempt = driver.start("a")
    driver.redis.zadd(driver.keys.leases(OTHER), {"a": 1})
    driver.redis.zadd(driver.keys.open(OTHER), {"a": 1})
    assert driver.reap().outcomes == []
    assert reconcile(driver) == [("a", "closed")]
    assert driver.commit(attempt, attempt.row()) == ["OK"]
    check_nothing_of_it_elsewhere(driver)


def test_it_comes_back_to_its_own_queue_when_its_worker_dies(driver: Driver) -> None:
    driver.start("a", tenant="acme")
    move(driver, "a", keep=True)
    driver.lapse("a")
    assert driver.reap().outcomes == [("a", "requeued")]
    assert driver.listed() == ["a"]
    assert driver.redis.lrange(driver.keys.line(QUEUE, "acme"), 0, -1) == [b"a"]
    assert driver.take("w2", queues=(OTHER, QUEUE)).job.queue == QUEUE


def test_in_another_queues_line_of_its_tenant_it_is_left_out(driver: Driver) -> None:
    driver.enqueue("a", tenant="acme")
    driver.enqueue("b", OTHER, tenant="acme")
    driver.redis.lpush(driver.keys.line(OTHER, "acme"), "a")
    assert driver.claimed_ids(queues=[OTHER]) == ["b"]
    assert driver.state("a") == "queued"
    assert driver.take(queues=[QUEUE]).job.queue == QUEUE
    assert driver.redis.lrange(driver.keys.line(OTHER, "acme"), 0, -1) == []


def test_cancelled_or_ended_it_is_dropped_where_it_still_stands(driver: Driver) -> None:
    for job_id in "ab":
        driver.enqueue(job_id)
        move(driver, job_id, keep=True)
    driver.cancel("a")
    attempt = driver.take()
    driver.commit(attempt, attempt.end())
    assert driver.claim(queues=[OTHER]).dropped == ["a", "b"]
    assert (driver.state("a"), driver.state("b")) == ("cancelled", "finished")
    assert driver.redis.zrange(f"rq:finished:{OTHER}", 0, -1) == []
    check_nothing_of_it_elsewhere(driver)


def test_with_an_odd_control_hash_it_ends_in_its_own_queue(driver: Driver) -> None:
    driver.start("a")
    move(driver, "a", keep=True)
    driver.redis.hset(driver.keys.job("a"), "seq", "odd")
    assert driver.claim("w2").dropped == ["a"]
    assert driver.record("a").error_code == "corrupt_job"
    assert (driver.leased(), driver.indexed()) == ([], [])
    check_nothing_of_it_elsewhere(driver)


def test_one_that_its_queue_does_not_hold_costs_no_other_job_its_turn(driver: Driver) -> None:
    driver.enqueue("a")
    move(driver, "a")
    driver.enqueue("b", OTHER)
    assert driver.claimed_ids(most=1, queues=[OTHER]) == ["b"]
    assert driver.protocol.run(calls.cancel("a", "because")) is not None
    assert driver.indexed() == []
