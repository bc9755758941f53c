"""The states of a job, and every transition between them that is allowed.

`TRANSITIONS` is the one table: the Lua scripts' moves, RQ's view and
`docs/reference/state_machine.md` are tested against it.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final


class JobState(StrEnum):
    """Where a job stands, as its control hash (the authority) says."""

    QUEUED = "queued"
    """Waits for a worker: just submitted, handed over by a draining worker, or recovered."""

    RUNNING = "running"
    """A worker claimed it and holds its lease; its row may wait for room in the batch."""

    FINISHED = "finished"
    """Ended as it should: end of sequence, a stop string, or `max_tokens`."""

    FAILED = "failed"
    """Ended by an error of its own; the result keeps the code and what was generated."""

    CANCELLED = "cancelled"
    """Ended because somebody asked for it, or because its RQ job was deleted."""

    EXPIRED = "expired"
    """Ended by its `deadline`, its `timeout`, or because nobody listened (`abandon_after`)."""

    DEAD = "dead"
    """Given up: it crashed the engine while alone, after `max_attempts` crashes in all; or two
    machines, on each of which it ran alone, were lost with it and did not come back."""


_ENDS: Final = frozenset(
    {
        JobState.FINISHED,
        JobState.FAILED,
        JobState.CANCELLED,
        JobState.EXPIRED,
        JobState.DEAD,
    }
)

TRANSITIONS: Final[dict[JobState, frozenset[JobState]]] = {
    # Failed from the queue: a control hash so mangled that nobody could claim the job. Dead from
    # the queue: its workers were lost, and did not come back while it was isolated.
    JobState.QUEUED: frozenset(
        {JobState.RUNNING, JobState.CANCELLED, JobState.EXPIRED, JobState.FAILED, JobState.DEAD}
    ),
    # Back to queued: hand-off (drain, no room) or recovery after a crash.
    JobState.RUNNING: frozenset({JobState.QUEUED}) | _ENDS,
    **dict.fromkeys(_ENDS, frozenset[JobState]()),
}

TERMINAL: Final[frozenset[JobState]] = frozenset(
    state for state, moves in TRANSITIONS.items() if not moves
)

RQ_STATUS: Final[dict[JobState, str]] = {
    JobState.QUEUED: "queued",
    JobState.RUNNING: "started",
    JobState.FINISHED: "finished",
    JobState.FAILED: "failed",
    JobState.CANCELLED: "canceled",
    # RQ knows no such states; its failed registry is where its tools look for them.
    JobState.EXPIRED: "failed",
    JobState.DEAD: "failed",
}
"""What RQ's job hash and registries show for each state (values of `rq.job.JobStatus`)."""


def can_move(old: JobState, new: JobState) -> bool:
    """Whether a job may go from one state to the other; staying is no move."""
    return new in TRANSITIONS[old]
