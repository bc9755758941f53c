"""What Redis refused of a producer: what the producer is told."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from mlx_serving.common.errors import (
    FieldError,
    IdempotencyConflict,
    JobNotEnded,
    JobNotFound,
    TenantLimited,
    TenantRowsExceeded,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mlx_serving.common.errors import InvalidJob
    from mlx_serving.common.protocol.calls import EnqueueEntry, EnqueueReply
    from mlx_serving.common.protocol.refusal import Refusal
    from mlx_serving.common.states import JobState

FOR_GOOD: Final[dict[str, type[InvalidJob]]] = {
    "digest": IdempotencyConflict,
    "running": TenantRowsExceeded,
}
"""Why a job was refused → the error, if the same job will be refused again."""


def check_admitted(entries: Sequence[EnqueueEntry], replies: Sequence[EnqueueReply]) -> None:
    """Check that no job was refused.

    Raises:
        IdempotencyConflict: a job's key names a job with another payload.
        TenantRowsExceeded: a job has more rows than its tenant may ever run.
        TenantLimited: a tenant has as many jobs queued as it may.

    Each says in `job_ids` which jobs were enqueued. One that a resend can't mend goes first.
    """
    refused = {i: reply.refusal for i, reply in enumerate(replies) if reply.refusal}
    if not refused:
        return
    ids = [None if r.refusal else e.job_id for e, r in zip(entries, replies, strict=True)]
    errors = [_field_error(entries, at, why) for at, why in refused.items()]
    for why in refused.values():
        if why.reason in FOR_GOOD:
            raise FOR_GOOD[why.reason](errors, job_ids=ids)
    raise _limited(entries, refused, ids)


def _field_error(entries: Sequence[EnqueueEntry], at: int, why: Refusal) -> FieldError:
    """What is wrong with the entry at this place, as `InvalidJob` tells it."""
    entry, parent = entries[at], f"jobs[{at}]." if len(entries) > 1 else ""
    if why.reason == "digest":
        reason = f"{entry.idempotency_key!r} names job {entry.job_id}, which has another payload"
        return FieldError(f"{parent}idempotency_key", reason)
    if why.reason == "running":
        return FieldError(f"{parent}n", why.of_tenant(entry.tenant))
    return FieldError(f"{parent}tenant", why.of_tenant(entry.tenant))


def _limited(
    entries: Sequence[EnqueueEntry], refused: dict[int, Refusal], ids: Sequence[str | None]
) -> TenantLimited:
    at, why = next(iter(refused.items()))
    first, tenants = entries[at], {entries[each].tenant for each in refused}
    text = why.of_tenant(first.tenant)
    if len(entries) > 1:
        others = f", and {len(tenants) - 1} more tenants" if len(tenants) > 1 else ""
        text += f": {len(refused)} of {len(entries)} jobs were not enqueued{others}"
    return TenantLimited(text, tenant=first.tenant, limit=why.limit, queued=why.found, job_ids=ids)


def check_forgotten(job_id: str, state: JobState | None) -> None:
    """Check that a job is gone, given the state that keeps it from being forgotten.

    Raises:
        JobNotEnded: there is such a state.

    """
    if state is not None:
        raise JobNotEnded(f"job {job_id} is {state.value}: cancel it first, or wait for its end")


def requeued_state(job_id: str, reply: EnqueueReply | None) -> JobState:
    """Return the state of a job that was to be enqueued anew.

    Raises:
        JobNotFound: it is gone, or its payload is.
        TenantLimited: its tenant has reached its limit of queued jobs.

    """
    if reply is None:
        raise JobNotFound(f"there is no job {job_id!r}, or its payload is no longer kept")
    if reply.refusal:
        limit, found = reply.refusal.limit, reply.refusal.found
        text = f"the tenant of job {job_id} has {found} jobs queued and may have {limit}"
        raise TenantLimited(text, limit=limit, queued=found, job_ids=[None])
    return reply.state
