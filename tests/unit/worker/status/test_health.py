"""The verdict table: what makes a worker red, degraded, or neither."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_serving.worker.status.health import HealthLimits, assess
from mlx_serving.worker.status.status import ChildState, Snapshot, StatusTracker, WorkerStatus

LIMITS = HealthLimits(stall_seconds=10.0, buffer_tokens=100)


def view(child: ChildState = "up", silent_for: float = 0.1, **fields: Any) -> WorkerStatus:
    snapshot = Snapshot(**({"phase": "serving"} | fields))
    return WorkerStatus(child, snapshot, silent_for, 0, {}, {}, {}, {})


HEALTHY: list[dict[str, Any]] = [
    {},
    {"engine_age": 7.8},
    {"backlog": 99},
    {"redis_age": 4.8, "redis_failing": 1.9},
    {"main_age": 29.8},
]
RED: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"child": "gone"}, ("child_gone",)),
    ({"child": "restarting"}, ("child_restarting",)),
    ({"engine_dead": True}, ("engine_dead",)),
    ({"publisher_dead": True}, ("publisher_dead",)),
    ({"engine_age": 8.0}, ("engine_stalled",)),
    ({"engine_age": 4.1, "silent_for": 4.0}, ("engine_stalled",)),
    ({"silent_for": 8.0}, ("child_silent",)),
    ({"backlog": 100}, ("buffer_full",)),
    (
        {"backlog": 100, "redis_age": 60.0, "redis_failing": 60.0},
        ("buffer_full", "redis_unreachable"),
    ),
    ({"phase": "draining", "engine_dead": True}, ("engine_dead",)),
]
DEGRADED: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"redis_age": 5.0}, ("redis_unreachable",)),
    ({"redis_age": 3600.0, "backlog": 99}, ("redis_unreachable",)),
    ({"redis_failing": 2.0}, ("redis_failing",)),
    ({"redis_evicts": True}, ("redis_evicts",)),
    ({"main_age": 30.0}, ("main_loop_late",)),
]


@pytest.mark.parametrize("fields", HEALTHY)
def test_ok(fields: dict[str, Any]) -> None:
    verdict = assess(view(**fields), LIMITS)
    assert (verdict.status, verdict.reasons, verdict.http_status) == ("ok", (), 200)


@pytest.mark.parametrize(("fields", "reasons"), RED)
def test_red(fields: dict[str, Any], reasons: tuple[str, ...]) -> None:
    verdict = assess(view(**fields), LIMITS)
    assert (verdict.status, verdict.reasons, verdict.http_status) == ("red", reasons, 503)


@pytest.mark.parametrize(("fields", "reasons"), DEGRADED)
def test_redis_away_is_not_red(fields: dict[str, Any], reasons: tuple[str, ...]) -> None:
    verdict = assess(view(**fields), LIMITS)
    assert (verdict.status, verdict.reasons, verdict.http_status) == ("degraded", reasons, 200)


def test_starting_is_not_ready() -> None:
    verdict = assess(view("starting", silent_for=100.0, phase="loading"), LIMITS)
    assert (verdict.status, verdict.reasons, verdict.http_status) == ("starting", ("loading",), 503)


def test_a_drain_is_no_fault() -> None:
    assert assess(view(phase="draining"), LIMITS).status == "draining"
    away = assess(view(phase="draining", redis_age=9.0), LIMITS)
    assert (away.status, away.reasons, away.http_status) == (
        "draining",
        ("redis_unreachable",),
        200,
    )


def test_a_worker_that_may_not_work_says_why() -> None:
    paused = assess(view(paused=("hot", "on_battery")), LIMITS)
    assert (paused.status, paused.reasons, paused.http_status) == (
        "paused",
        ("hot", "on_battery"),
        200,
    )
    assert assess(view(paused=("hot",), redis_age=9.0), LIMITS).reasons == (
        "hot",
        "redis_unreachable",
    )
    assert assess(view(paused=("hot",), engine_dead=True), LIMITS).status == "red"
    assert assess(view(paused=("hot",), phase="draining"), LIMITS).status == "draining"


def test_red_comes_before_the_watchdog_and_not_from_idling() -> None:
    child = Snapshot()
    assert HealthLimits(stall_seconds=10.0).red_seconds(child) == 8.0
    assert HealthLimits(stall_seconds=2.0).red_seconds(child) == 1.6
    # An idle loop comes round every 0.5 s and is reported every 0.5 s.
    assert HealthLimits(stall_seconds=0.5).red_seconds(child) == 1.5


def test_a_models_first_step_is_neither_red_nor_ended_before_its_own_time() -> None:
    assert assess(view(engine_age=47.0, stall_seconds=60.0), LIMITS).status == "ok"
    assert assess(view(engine_age=48.0, stall_seconds=60.0), LIMITS).reasons == ("engine_stalled",)
    assert LIMITS.hung_seconds(Snapshot(stall_seconds=60.0)) == 54.0
    assert LIMITS.hung_seconds(Snapshot(stall_seconds=10.0)) == 9.0


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_life_of_children() -> None:
    clock = Clock()
    tracker = StatusTracker(clock)

    def status() -> str:
        return assess(tracker.status(), LIMITS).status

    tracker.begin()
    assert status() == "starting"
    tracker.receive(Snapshot(phase="loading"))
    assert status() == "starting"
    tracker.receive(Snapshot(phase="serving"))
    assert status() == "ok"
    clock.now += 8.0
    assert status() == "red"  # nobody has said that the engine lives
    tracker.receive(Snapshot(phase="serving"))
    assert status() == "ok"
    tracker.end("crashed", restarts=True)
    assert status() == "red"
    tracker.begin()
    assert status() == "red"  # not `starting`: it was up, and is not
    tracker.receive(Snapshot(phase="loading"))
    assert status() == "red"
    tracker.receive(Snapshot(phase="serving"))
    assert status() == "ok"
    tracker.end("drained", restarts=False)
    assert assess(tracker.status(), LIMITS).reasons == ("child_gone",)
    assert tracker.status().restarts == 1
    assert tracker.status().exits == {"crashed": 1, "drained": 1}


def test_a_parent_that_slept_too_blames_nobody() -> None:
    clock = Clock()
    tracker = StatusTracker(clock)
    tracker.begin()
    tracker.receive(Snapshot(phase="serving"))
    clock.now += 3600.0
    assert assess(tracker.status(), LIMITS).reasons == ("child_silent",)
    tracker.excuse()
    assert assess(tracker.status(), LIMITS).status == "ok"
