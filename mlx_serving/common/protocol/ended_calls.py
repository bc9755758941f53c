"""The calls on jobs that ended, or that nobody may claim: what a person decides. See `calls`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlx_serving.common.protocol.calls import Call, EnqueueReply, iso_now, read_enqueued, read_state

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mlx_serving.common.states import JobState


def forget(job_ids: Sequence[str]) -> Call[list[JobState | None]]:
    """Delete ended jobs; the reply has the state of each that has not ended and stays."""
    return Call("forget", [*job_ids], lambda states: [read_state(s) if s else None for s in states])


def requeue(job_id: str) -> Call[EnqueueReply | None]:
    """Enqueue a job anew that ended without finishing, under its id.

    The reply says whether it did, and the job's state now; None: there is no such job, or its
    payload is gone.
    """

    def parse(reply: Any) -> EnqueueReply | None:  # noqa: ANN401 -- redis-py's own union
        return read_enqueued(*reply) if reply else None

    return Call("requeue", [job_id, iso_now()], parse)


def pardon(job_id: str) -> Call[JobState | None]:
    """Take all losses of a job back, so that it may be claimed; None for an unknown job."""
    return Call("pardon", [job_id], lambda reply: read_state(reply) if reply else None)
