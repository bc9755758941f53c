"""A worker that lives lost nothing for good, although it never speaks of the attempt again (D7)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from mlx_serving.common import attempts
from mlx_serving.common.protocol.fields import JobField
from tests.support.lost_machines import LEASE_MS, go_back

if TYPE_CHECKING:
    from tests.support.protocol_driver import Driver

pytestmark = [
    pytest.mark.usefixtures("settled_redis"),
    pytest.mark.may_leak(reason="jobs stay queued at the end of a test"),
]
MACHINE, LIFE, OTHER = "0000000a", "11111111", "22222222"


def lose(driver: Driver, life: str, worker: str = "mac") -> list[tuple[str, str]]:
    nonce = attempts.new_nonce(MACHINE, life)
    driver.take(worker, nonce=nonce, lease_ms=LEASE_MS)
    driver.lapse("a")
    return driver.reap(LEASE_MS).outcomes


def losses(driver: Driver) -> int:
    return len((driver.redis.hget(driver.keys.job("a"), JobField.LOSSES) or b"").split())


def test_the_worker_that_claims_its_lost_job_again_is_back(driver: Driver) -> None:
    driver.enqueue("a")
    for _ in range(20):
        assert lose(driver, LIFE) == [("a", "requeued")]
        assert losses(driver) == 1


@pytest.mark.parametrize(("worker", "life"), [("mac", OTHER), ("mac", ""), ("other", LIFE)])
def test_another_worker_or_another_life_is_not(driver: Driver, worker: str, life: str) -> None:
    driver.enqueue("a")
    lose(driver, LIFE)
    lose(driver, life, worker)
    assert losses(driver) == 2


@pytest.mark.parametrize(
    ("life", "age_ms", "stay"), [(LIFE, 40_000, 1), (LIFE, 5_000, 2), (OTHER, 40_000, 2)]
)
def test_a_worker_whose_record_lives_on_is_back(
    driver: Driver, life: str, age_ms: int, stay: int
) -> None:
    """Its record may be older than the loss for as long as a record is kept."""
    driver.enqueue("a")
    lose(driver, LIFE)
    go_back(driver, "a", age_ms)
    driver.redis.hset(driver.keys.worker("mac"), "life", life)
    lose(driver, LIFE, "other")
    assert losses(driver) == stay


def test_an_isolated_job_goes_on_once_its_workers_are_seen(driver: Driver) -> None:
    driver.enqueue("a")
    for number in range(5):
        life, worker = f"{number + 1:08x}", f"mac-{number}"
        nonce = attempts.new_nonce(f"{number + 10:08x}", life)
        driver.take(worker, nonce=nonce, lease_ms=LEASE_MS)
        driver.lapse("a")
        outcomes = driver.reap(LEASE_MS).outcomes
    assert outcomes == [("a", "isolated")]
    go_back(driver, "a", 60_000)
    for number in range(5):
        driver.redis.hset(driver.keys.worker(f"mac-{number}"), "life", f"{number + 1:08x}")
    assert driver.reap(LEASE_MS).outcomes == [("a", "requeued")]
    assert losses(driver) == 0
