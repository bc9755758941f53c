"""From what the parent knows of its child to a verdict. Pure.

Red means: this worker does no work, and nobody but a person or its supervisor can change that.
Redis being away is not that. Decode goes on into a buffer, and ten workers would turn red for
one cause; the worker is `degraded` until the buffer is full and the engine has to pause.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from mlx_serving.common import defaults

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlx_serving.worker.status.status import Snapshot, View

Status = Literal["ok", "starting", "draining", "paused", "degraded", "red"]
STATUSES: Final[tuple[Status, ...]] = (
    "ok", "starting", "draining", "paused", "degraded", "red",
)  # fmt: skip

EARLY: Final = 0.8  # of the stall time: red shows before the watchdog ends the child
HUNG: Final = 0.9  # of the stall time: a child that is silent for so long is ended
LEAST_SECONDS: Final = 1.5  # an idle engine comes round, and is reported, twice a second
REDIS_SECONDS: Final = 5.0  # the reaper alone asks Redis every 2 s
WRITES_SECONDS: Final = 2.0
MAIN_LOOP_SECONDS: Final = 30.0


@dataclass(frozen=True, slots=True)
class Limits:
    """The settings that a verdict goes by: seconds, and decoded tokens not yet in Redis."""

    stall_seconds: float = 10.0
    buffer_tokens: int = defaults.BUFFER_TOKENS

    def red_seconds(self, child: Snapshot) -> float:
        """How long an engine may be silent before it counts as hung."""
        return max(LEAST_SECONDS, EARLY * self._stall_seconds(child))

    def hung_seconds(self, child: Snapshot) -> float:
        """How long a child may say nothing before its parent ends it."""
        return max(LEAST_SECONDS, HUNG * self._stall_seconds(child))

    def _stall_seconds(self, child: Snapshot) -> float:
        """Return the stall time as it is now: longer before a model's first step."""
        return max(self.stall_seconds, child.stall_seconds)


@dataclass(frozen=True, slots=True)
class Verdict:
    """A status, and why it is not `ok`."""

    status: Status
    reasons: tuple[str, ...] = ()

    @property
    def http_status(self) -> int:
        """200 while the worker does, or is allowed not to do, its work; 503 else."""
        return 503 if self.status in {"red", "starting"} else 200


def judge(view: View, limits: Limits) -> Verdict:
    """The worst that holds decides; all that is wrong is named."""
    of_child = {
        "restarting": Verdict("red", ("child_restarting",)),
        "gone": Verdict("red", ("child_gone",)),
        "recycling": Verdict("starting", ("recycling",)),
        "starting": Verdict("starting", ("loading",)),
    }.get(view.child)
    if of_child is not None:
        return of_child
    red, degraded = tuple(_red(view, limits)), tuple(_degraded(view))
    if red:
        return Verdict("red", red + degraded)
    if view.snapshot.phase == "draining":
        planned = ("recycling",) if view.snapshot.recycling else ()
        return Verdict("draining", planned + degraded)
    paused = view.snapshot.paused
    return Verdict("paused" if paused else "degraded" if degraded else "ok", paused + degraded)


def _red(view: View, limits: Limits) -> Iterator[str]:
    now, red_seconds = view.snapshot, limits.red_seconds(view.snapshot)
    if now.engine_dead:
        yield "engine_dead"
    if now.publisher_dead:
        yield "publisher_dead"
    if view.silent_for >= red_seconds:
        yield "child_silent"  # no word of its engine either
    elif now.engine_age + view.silent_for >= red_seconds:
        yield "engine_stalled"
    if now.backlog >= limits.buffer_tokens:
        yield "buffer_full"


def _degraded(view: View) -> Iterator[str]:
    now = view.snapshot
    if now.redis_age >= REDIS_SECONDS:
        yield "redis_unreachable"
    elif now.redis_failing >= WRITES_SECONDS:
        yield "redis_failing"
    if now.memory_short:
        yield "memory_short"
    if now.main_age >= MAIN_LOOP_SECONDS:
        yield "main_loop_late"
