"""A reaper that was cut off from Redis, or refused, gives the others one lease to renew (D5)."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
import redis

from mlx_serving.worker.delivery.sweeper import Sweeper
from tests.support.helpers import wait_until
from tests.support.protocol_driver import LANES, Driver

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlx_serving.common.redis.local import LocalRedis

pytestmark = pytest.mark.may_leak(reason="jobs stay queued or running at the end of a test")

LEASE_SECONDS = 1.0


@pytest.fixture
def driver(redis_client: redis.Redis, settled_redis: LocalRedis) -> Iterator[Driver]:
    del settled_redis
    yield Driver(redis_client)
    redis_client.config_set("maxmemory", "0")


@pytest.fixture
def sweeper(driver: Driver) -> Sweeper:
    """One that has been up for a lease."""
    sweeper = just_started(driver)
    sweeper.sweep()
    sweeper._hold_until = 0.0
    time.sleep(0.06)
    return sweeper


def just_started(driver: Driver) -> Sweeper:
    return Sweeper(driver.protocol, LANES, lease_ms=int(LEASE_SECONDS * 1000), reap_seconds=0.05)


def test_without_an_outage_it_reaps_at_once(driver: Driver, sweeper: Sweeper) -> None:
    driver.start("a")
    sweeper.sweep()
    driver.lapse("a")
    time.sleep(0.06)
    sweeper.sweep()
    assert driver.listed() == ["a"]


def waits_one_lease(driver: Driver, sweeper: Sweeper) -> None:
    began = time.monotonic()
    sweeper.sweep()
    assert driver.listed() == []
    time.sleep(0.1)
    sweeper.sweep()
    assert driver.listed() == []

    def came_back() -> bool:
        sweeper.sweep()
        return driver.listed() == ["a"]

    wait_until(came_back, timeout=2)
    assert time.monotonic() - began >= LEASE_SECONDS - 0.1


def test_when_it_has_just_started_it_waits(driver: Driver) -> None:
    """It can't know of a silence that has just ended, nor can a fleet that starts whole."""
    driver.start("a")
    driver.lapse("a")
    waits_one_lease(driver, just_started(driver))


def test_after_an_outage_it_waits(driver: Driver, sweeper: Sweeper) -> None:
    driver.start("a")
    sweeper.sweep()
    driver.lapse("a")
    assert sweeper._answered_at is not None
    sweeper._answered_at -= 10
    sweeper._reaped_at = 0.0
    waits_one_lease(driver, sweeper)


def test_after_a_full_memory_it_waits(driver: Driver, sweeper: Sweeper) -> None:
    driver.start("a")
    driver.lapse("a")
    driver.redis.config_set("maxmemory", "1")
    with pytest.raises(redis.OutOfMemoryError):
        sweeper.sweep()
    driver.redis.config_set("maxmemory", "0")
    time.sleep(0.06)
    waits_one_lease(driver, sweeper)


def test_where_a_beat_was_refused_it_waits(driver: Driver, sweeper: Sweeper) -> None:
    """A young Redis reaps nothing, so its script tells nobody that writes are refused."""
    driver.start("a")
    driver.lapse("a")
    sweeper.hold("MISCONF")
    waits_one_lease(driver, sweeper)


def test_a_full_memory_lets_leases_be_renewed(driver: Driver) -> None:
    attempt = driver.start("a")
    driver.lapse("a")
    driver.redis.config_set("maxmemory", "1")
    driver.renew(attempt)
    assert driver.reap().outcomes == []
