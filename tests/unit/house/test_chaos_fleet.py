"""The chaos run tells a worker that is slow from one that is stuck."""

from __future__ import annotations

import os

import pytest

from tests.chaos import fleet
from tests.chaos.fleet import BUSY_SECONDS, IDLE_SECONDS, Effort, cpu_seconds


class Clock:
    def __init__(self) -> None:
        self.seconds = 100.0

    def monotonic(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(fleet, "time", made)
    return made


def test_a_start_that_waits_for_a_core_is_not_stuck(clock: Clock) -> None:
    effort = Effort()
    for tenths in range(200):  # twenty times slower than alone
        clock.seconds += 2.0
        assert not effort.is_spent(tenths / 10)


def test_a_worker_that_does_nothing_is_stuck(clock: Clock) -> None:
    effort = Effort()
    assert not effort.is_spent(3.0)
    clock.seconds += IDLE_SECONDS - 1
    assert not effort.is_spent(3.0)
    clock.seconds += 2
    assert effort.is_spent(3.01)


def test_a_worker_that_computes_for_ever_is_stuck(clock: Clock) -> None:
    effort = Effort()
    for second in range(int(BUSY_SECONDS) + 1):
        clock.seconds += 1
        assert not effort.is_spent(float(second))
    assert effort.is_spent(BUSY_SECONDS + 1.5)


def test_the_time_that_a_process_computed_is_read() -> None:
    before = cpu_seconds(os.getpid())
    sum(range(5_000_000))
    assert cpu_seconds(os.getpid()) > before
