"""Whether a worker is healthy, from what the parent knows of its child. Pure.

Red means that this worker does no work, and that only a person or its supervisor can change that.
A worker that can't reach Redis is not red: it goes on decoding into a buffer, and otherwise all
workers would turn red for one cause. It is `degraded` until the buffer is full and the engine has
to pause.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from mlx_serving.common import defaults

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlx_serving.worker.status.status import Snapshot, WorkerStatus

HealthStatus = Literal["ok", "starting", "draining", "paused", "degraded", "red"]
STATUSES: Final[tuple[HealthStatus, ...]] = (
    "ok", "starting", "draining", "paused", "degraded", "red",
)  # fmt: skip

EARLY: Final = 0.8  # of the stall time, so that red shows before the watchdog ends the child
HUNG: Final = 0.9  # of the stall time: the parent ends a child that is silent for so long
LEAST_SECONDS: Final = 1.5  # an idle engine comes round twice a second, and so do snapshots
REDIS_SECONDS: Final = 5.0  # the reaper alone asks Redis every 2 s
WRITES_SECONDS: Final = 2.0
MAIN_LOOP_SECONDS: Final = 30.0


@dataclass(frozen=True, slots=True)
class HealthLimits:
    """Limits from the settings.

    `stall_seconds`: how long the engine may make no progress. `buffer_tokens`: how many decoded
    tokens may wait for Redis.
    """

    stall_seconds: float = 10.0
    buffer_tokens: int = defaults.BUFFER_TOKENS

    def red_seconds(self, child: Snapshot) -> float:
        """How long the engine may make no progress before it counts as hung."""
        return max(LEAST_SECONDS, EARLY * self._stall_seconds(child))

    def hung_seconds(self, child: Snapshot) -> float:
        """How long a child may say nothing before its parent ends it."""
        return max(LEAST_SECONDS, HUNG * self._stall_seconds(child))

    def _stall_seconds(self, child: Snapshot) -> float:
        """The stall time as it is now; it is longer before a model's first step."""
        return max(self.stall_seconds, child.stall_seconds)


@dataclass(frozen=True, slots=True)
class Health:
    """A status, and why it is not `ok`."""

    status: HealthStatus
    reasons: tuple[str, ...] = ()

    @property
    def http_status(self) -> int:
        """503 if the worker does no work and should; 200 otherwise."""
        return 503 if self.status in {"red", "starting"} else 200


def assess(worker: WorkerStatus, limits: HealthLimits) -> Health:
    """Return the worst status that applies, and all reasons."""
    of_child = {
        "restarting": Health("red", ("child_restarting",)),
        "gone": Health("red", ("child_gone",)),
        "recycling": Health("starting", ("recycling",)),
        "starting": Health("starting", ("loading",)),
    }.get(worker.child)
    if of_child is not None:
        return of_child
    red, degraded = tuple(_red(worker, limits)), tuple(_degraded(worker))
    if red:
        return Health("red", red + degraded)
    if worker.snapshot.phase == "draining":
        planned = ("recycling",) if worker.snapshot.recycling else ()
        return Health("draining", planned + degraded)
    paused = worker.snapshot.paused
    return Health("paused" if paused else "degraded" if degraded else "ok", paused + degraded)


def _red(worker: WorkerStatus, limits: HealthLimits) -> Iterator[str]:
    now, red_seconds = worker.snapshot, limits.red_seconds(worker.snapshot)
    if now.engine_dead:
        yield "engine_dead"
    if now.publisher_dead:
        yield "publisher_dead"
    if worker.silent_for >= red_seconds:
        yield "child_silent"  # no word of its engine either
    elif now.engine_age + worker.silent_for >= red_seconds:
        yield "engine_stalled"
    if now.backlog >= limits.buffer_tokens:
        yield "buffer_full"


def _degraded(worker: WorkerStatus) -> Iterator[str]:
    now = worker.snapshot
    if now.redis_age >= REDIS_SECONDS:
        yield "redis_unreachable"
    elif now.redis_failing >= WRITES_SECONDS:
        yield "redis_failing"
    if now.redis_evicts:
        yield "redis_evicts"
    if now.memory_short:
        yield "memory_short"
    if now.main_age >= MAIN_LOOP_SECONDS:
        yield "main_loop_late"
