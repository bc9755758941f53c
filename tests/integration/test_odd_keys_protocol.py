"""Keys that jobs share are of a wrong type: every script goes on, and each key is quarantined once.

The reviewer's case was one type under some keys. Here: every shared key, every wrong type, planted
before each step of a job's life.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
import redis

from mlx_serving.common.protocol import calls, quarantine
from mlx_serving.common.redis.local import LocalRedis
from mlx_serving.common.states import JobState
from mlx_serving.worker.delivery.sweeper import Sweeper
from tests.support.helpers import wait_until
from tests.support.odd_keys import OF_JOBS, TENANT, cases, check_quarantined_once, plant
from tests.support.protocol_driver import LANES, QUEUE, Driver

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.usefixtures("settled_redis")

FAR_MS = 60_000


class Life:
    """A job's life, which ends one way; the odd key is planted before the step `at`."""

    def __init__(self, driver: Driver, at: str, plant_it: Callable[[], None]) -> None:
        self.driver, self.at, self.plant_it = driver, at, plant_it
        self.sweeper = Sweeper(driver.protocol, LANES, lease_ms=60_000, reap_seconds=60)

    def before(self, step: str) -> None:
        if step == self.at:
            self.plant_it()

    def submit(self, job_id: str, deadline_ms: int = FAR_MS) -> None:
        self.before("submit")
        reply = self.driver.enqueue(job_id, tenant=TENANT, deadline_ms=deadline_ms)
        assert reply.created

    def claim(self, job_id: str) -> None:
        self.before("claim")
        self.repair()
        self.attempt = self.driver.take()
        assert self.attempt.job.job_id == job_id

    def repair(self) -> None:
        """What a hand took away with the old key comes back as the sweeper works."""
        for _ in range(2):
            self.sweeper.reconcile(QUEUE)
            for _ in range(4):
                self.sweeper._audit.look()

    def finish(self, job_id: str) -> JobState:
        self.submit(job_id)
        self.claim(job_id)
        self.before("commit")
        assert self.driver.commit(self.attempt, self.attempt.row()) == ["OK"]
        self.before("renew")
        assert self.driver.renew(self.attempt).status == "OK"
        self.before("end")
        assert self.driver.commit(self.attempt, self.attempt.end()) == ["OK"]
        return JobState.FINISHED

    def cancel_queued(self, job_id: str) -> JobState:
        self.submit(job_id)
        self.before("end")
        assert self.driver.cancel(job_id) is JobState.CANCELLED
        return JobState.CANCELLED

    def cancel_running(self, job_id: str) -> JobState:
        self.submit(job_id)
        self.claim(job_id)
        self.before("end")
        assert self.driver.cancel(job_id) is JobState.RUNNING
        assert self.driver.renew(self.attempt).reason == "cancelled"
        assert self.driver.release(self.attempt) == ["OK"]
        return JobState.CANCELLED

    def give_back(self, job_id: str) -> JobState:
        self.submit(job_id)
        self.claim(job_id)
        self.before("release")
        assert self.driver.release(self.attempt) == ["OK"]
        self.claim(job_id)
        blame = self.driver.blame(job_id, 2, 1, alone=True)
        self.before("crash")
        outcome = self.driver.protocol.run(calls.crash("w1", [blame]))
        assert outcome == [(job_id, "charged")]
        self.claim(job_id)
        self.before("end")
        blame = self.driver.blame(job_id, 3, 1, alone=True)
        assert self.driver.protocol.run(calls.crash("w1", [blame])) == [(job_id, "dead")]
        return JobState.DEAD

    def take_over(self, job_id: str) -> JobState:
        """Its worker is silent: the lease that a hand took away is given again, and lapses."""
        self.submit(job_id)
        self.claim(job_id)
        self.before("reap")
        self.repair()
        self.driver.protocol.run(calls.reconcile(QUEUE, [job_id], lease_ms=60_000))
        self.driver.lapse(job_id)
        assert (job_id, "requeued") in self.driver.reap().outcomes
        self.before("end")
        assert self.driver.cancel(job_id) is JobState.CANCELLED
        return JobState.CANCELLED

    def expire(self, job_id: str) -> JobState:
        self.submit(job_id, deadline_ms=1)
        self.before("end")
        wait_until(lambda: not self.waits(job_id), timeout=2)
        return JobState.EXPIRED

    def waits(self, job_id: str) -> bool:
        """If its deadline is gone with the old key, a claim is what finds it."""
        self.driver.reap()
        self.repair()
        time.sleep(0.002)  # its deadline
        assert self.driver.claim().jobs == []
        return self.driver.state(job_id) == "queued"


LIVES = {
    "finish": ("submit", "claim", "commit", "renew", "end"),
    "cancel_queued": ("submit", "end"),
    "cancel_running": ("submit", "claim", "end"),
    "give_back": ("release", "crash", "end"),
    "take_over": ("reap", "end"),
    "expire": ("submit", "end"),
}
PLANTED = [f"{life} {step}" for life, steps in LIVES.items() for step in steps]


@pytest.mark.parametrize("planted", PLANTED)
@pytest.mark.parametrize(("key", "kind"), cases(OF_JOBS))
def test_the_job_ends_as_it_should_and_the_key_is_quarantined_once(
    driver: Driver, key: str, kind: str, planted: str
) -> None:
    name, step = planted.split()
    life = Life(driver, step, lambda: plant(driver.redis, key, kind))
    state = getattr(life, name)("a")
    assert driver.state("a") == state.value
    life.at = ""
    life.finish("b")  # a whole life meets every key
    life.cancel_queued("c")
    driver.reap()
    assert [driver.state(job_id) for job_id in "bc"] == ["finished", "cancelled"]
    check_quarantined_once(driver.redis, key, kind)
    assert driver.indexed() == driver.leased() == []
    driver.redis.delete("rq:suspended")


class TestNotes:
    def test_they_are_bounded(self, driver: Driver) -> None:
        """100 keys are moved; 64 are noted, the last ones. Each key is there."""
        names = [f"mlxs:turns:{n}" for n in range(100)]
        for name in names:
            plant(driver.redis, name, "stream")
            driver.protocol.run(quarantine.mend({name: "list"}))
        moved = quarantine.read_quarantined(driver.redis, driver.keys)
        assert len(moved) == 64
        assert {each.key for each in moved} <= set(names)
        assert len(list(driver.redis.scan_iter("mlxs:quarantine:mlxs:turns:*"))) == 100
        assert driver.redis.ttl("mlxs:quarantine") > 0

    @pytest.mark.parametrize("kind", ["string", "list", "set", "hash", "stream"])
    def test_that_they_are_odd_stops_nobody(self, driver: Driver, kind: str) -> None:
        plant(driver.redis, "mlxs:quarantine", kind)
        assert quarantine.read_quarantined(driver.redis, driver.keys) == []
        plant(driver.redis, "mlxs:open:tally:default", "string")
        assert driver.enqueue("a").created
        assert [each.key for each in quarantine.read_quarantined(driver.redis, driver.keys)] == [
            "mlxs:open:tally:default"
        ]
        (place,) = driver.redis.scan_iter("mlxs:quarantine:mlxs:quarantine:*")
        assert driver.redis.type(place) == kind.encode()
        driver.cancel("a")

    def test_what_a_hand_wrote_among_them_is_shown_as_it_is(self, driver: Driver) -> None:
        driver.redis.zadd("mlxs:quarantine", {b"": 1, b"\xff\x1b[2J": 2, b"hash x": 3})
        driver.redis.expire("mlxs:quarantine", 60)
        assert len(quarantine.read_quarantined(driver.redis, driver.keys)) == 3


@pytest.fixture
def small(local_redis: LocalRedis) -> Iterator[Driver]:
    del local_redis
    with LocalRedis() as server, server.client() as client:
        yield Driver(client)


class TestFullRedis:
    """What takes memory comes first, so a full Redis refuses the whole script, or nothing of it."""

    @pytest.mark.parametrize("key", OF_JOBS)
    def test_an_enqueue_is_refused_whole(self, small: Driver, key: str) -> None:
        plant(small.redis, key, "stream")
        before = small.snapshot()
        small.redis.config_set("maxmemory", 1)
        with pytest.raises(redis.exceptions.OutOfMemoryError):
            small.enqueue("a", tenant=TENANT, deadline_ms=FAR_MS)
        assert small.snapshot() == before

    def test_a_renewal_goes_on(self, small: Driver) -> None:
        attempt = small.start("a")
        plant(small.redis, "mlxs:leases:tally:default", "string")
        small.redis.config_set("maxmemory", 1)
        assert small.renew(attempt).status == "OK"
        assert small.leased() == ["a"]
