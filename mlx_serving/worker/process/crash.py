"""Why a child died, and which of its jobs that speaks against. Pure."""

from __future__ import annotations

import signal
from enum import Enum
from typing import TYPE_CHECKING, Final

from mlx_serving.common.protocol.calls import Blame
from mlx_serving.worker.process.inflight_file import RowState

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mlx_serving.worker.process.inflight_file import InflightRow

EXIT_STALLED: Final = 69  # sysexits' EX_UNAVAILABLE: the engine made no progress for too long
EXIT_ENGINE: Final = 70  # sysexits' EX_SOFTWARE: the engine is dead
EXIT_RECYCLE: Final = 75  # sysexits' EX_TEMPFAIL: it made room for a fresh child, by plan
EXIT_CONFIGURATION: Final = 78  # sysexits' EX_CONFIG: the engine can't come up, ever

CRASH_SIGNALS: Final = frozenset(
    {
        signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE,
        signal.SIGTRAP, signal.SIGSYS,
    }
)  # fmt: skip


class Cause(Enum):
    """Why the child is gone."""

    DRAINED = "drained"
    """It ended as it was asked to."""

    RECYCLED = "recycled"
    """It handed over what it held and ended by plan: a fresh one goes on."""

    CONFIGURATION = "configuration"
    """The engine could not be loaded, and would not be the next time."""

    CRASHED = "crashed"
    """It ended itself: a fault, an abort, an engine that failed. What ran is suspect."""

    STALLED = "stalled"
    """Its engine made no progress for the stall time. That says nothing about any job: the device
    may only be slow."""

    OUT_OF_MEMORY = "out of memory"
    """SIGKILL while the system was short of memory. What ran is suspect."""

    KILLED = "killed"
    """A signal from outside, which says nothing about any job."""

    @property
    def charges(self) -> bool:
        """Whether the jobs that ran are suspects."""
        return self in {Cause.CRASHED, Cause.OUT_OF_MEMORY}

    @property
    def faults_load(self) -> bool:
        """Whether a model that was being loaded is to be left alone from now on."""
        return self.charges or self is Cause.STALLED


MEANT_EXITS: Final = {
    0: Cause.DRAINED,
    EXIT_STALLED: Cause.STALLED,
    EXIT_RECYCLE: Cause.RECYCLED,
    EXIT_CONFIGURATION: Cause.CONFIGURATION,
}
"""What the child's own exit statuses say; any other one is a crash."""


def classify(exit_code: int, *, memory_pressure: bool, silenced: bool = False) -> Cause:
    """Read an exit code as `multiprocessing` gives it: -n for signal n.

    `silenced`: the parent ended the child because it had said nothing for too long.
    """
    if silenced:
        return Cause.STALLED
    if exit_code in MEANT_EXITS:
        return MEANT_EXITS[exit_code]
    if exit_code > 0 or -exit_code in CRASH_SIGNALS:
        return Cause.CRASHED
    if -exit_code == signal.SIGKILL and memory_pressure:
        return Cause.OUT_OF_MEMORY
    return Cause.KILLED


def judge(rows: Sequence[InflightRow], cause: Cause) -> list[Blame]:
    """Say for every held job what the death means for it; those to run first come first.

    Suspects are the jobs whose prompt was being rendered or prefilled, and those that had not run
    for long. If there are none, all that ran are suspects. A suspect may run again among half as
    many unproven rows as there were suspects, itself included, so that another crash tells more.
    For those that were being prefilled it is half of these alone, so that a single one runs alone.
    If the child died while it loaded a model, that model is to blame and no job is charged.
    """
    loading, rows = loaded_at_death(rows), [r for r in rows if r.state is not RowState.LOADING]
    entering = [row for row in rows if row.state is RowState.ENTERING]
    fresh = entering + [row for row in rows if row.state is RowState.RUNNING]
    ran = fresh + [row for row in rows if row.state is RowState.PROVEN]
    if not cause.charges or loading:
        return [Blame(row.attempt) for row in rows]
    bound = dict.fromkeys(fresh or ran, _half(fresh or ran))
    bound |= dict.fromkeys(entering, _half(entering))
    blamed = [Blame(row.attempt, bound.get(row, 0), alone=len(ran) == 1) for row in rows]
    return sorted(blamed, key=lambda b: b.max_unproven or len(rows) + 1)


def loaded_at_death(rows: Sequence[InflightRow]) -> list[str]:
    """Return the models that the child was loading when it died: one at most."""
    return [row.attempt.job_id for row in rows if row.state is RowState.LOADING]


def _half(rows: Sequence[InflightRow]) -> int:
    return (len(rows) + 1) // 2
