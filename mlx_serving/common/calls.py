"""The delivery protocol without I/O: what each script is sent, and what its reply means.

`Protocol` (sync) and `AsyncProtocol` run these calls; every call may be sent again after a lost
reply, which is what makes retrying safe (DESIGN, delivery contract).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from mlx_serving.common.states import JobState

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

T = TypeVar("T")
Argument = str | bytes | int | float
Row = Literal["OK", "DUP", "FENCED", "GAP", "ERROR"]


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One script call: its name, its arguments after the prefixes, and the reading of its reply."""

    script: str
    arguments: list[Argument]
    parse: Callable[[Any], T]


@dataclass(frozen=True, slots=True)
class EnqueueEntry:
    """All that the enqueue script writes. Durations are milliseconds (0: none), TTL seconds."""

    job_id: str
    queue: str
    rq_fields: Mapping[str, str | bytes | int]  # RQ's own job hash, from ``rq.job.Job.to_dict``
    max_attempts: int = 5
    min_protocol: int = 1
    deadline_ms: int = 0  # relative; Redis TIME fixes it at enqueue
    timeout_ms: int = 0
    abandon_ms: int = 0
    result_ttl: int = 3600
    stream: bool = True


@dataclass(frozen=True, slots=True)
class EnqueueReply:
    """Whether this call created the job, and the state that it has now."""

    created: bool
    state: JobState


@dataclass(frozen=True, slots=True)
class ClaimedJob:
    """A job this worker holds from now on. Times are ms of Redis TIME, durations ms (0: none)."""

    job_id: str
    queue: str
    epoch: int
    seq: int  # last committed event
    data: bytes  # RQ's payload, compressed; empty when there is a problem
    problem: str  # '' or '<code>:<field>'
    deadline_ms: int
    timeout_ms: int
    stream: bool
    result_ttl: int
    enqueued_ms: int
    started_ms: int
    first_token_ms: int
    now_ms: int


@dataclass(frozen=True, slots=True)
class ClaimReply:
    """What a claim took; `dropped` ids had no business on the list (cancelled, deleted, stale)."""

    suspended: bool
    jobs: list[ClaimedJob]
    dropped: list[str]


@dataclass(frozen=True, slots=True)
class CommitRow:
    """One event of one job, and, where `state` is set, the job's end."""

    job_id: str
    epoch: int
    seq: int
    event: bytes
    publish: bool = True
    state: JobState | None = None
    result: bytes = b""  # result record, JSON
    rq_result: bytes = b""  # RQ's own form of it: see `rq_result` of the worker's RQ module
    error_code: str = ""
    message: str = ""


@dataclass(frozen=True, slots=True)
class RowReply:
    """What became of a row; `reason`: why its job should stop ('' if not), or Redis's error."""

    status: Row
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Swept:
    """What a sweep did; `waiting`: Redis restarted too lately to reap."""

    waiting: bool = False
    outcomes: list[tuple[str, str]] = field(default_factory=list)


def iso_now() -> str:
    """Wall clock in RQ's text form. Only RQ's view holds such times; nothing decides by them."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _claimed(row: Sequence[Any]) -> ClaimedJob:
    job_id, queue, epoch, seq, data, problem, *numbers = row
    deadline, timeout, stream, ttl, enqueued, started, first, now = map(int, numbers)
    raw = data.encode() if isinstance(data, str) else data
    return ClaimedJob(
        _text(job_id), _text(queue), int(epoch), int(seq), raw, _text(problem),
        deadline, timeout, bool(stream), ttl, enqueued, started, first, now,
    )  # fmt: skip


def _pairs(rows: Sequence[Sequence[Any]]) -> list[tuple[str, str]]:
    return [(_text(a), _text(b)) for a, b in rows]


def _row_replies(rows: Sequence[Sequence[Any]]) -> list[RowReply]:
    return [RowReply(status, reason) for status, reason in _pairs(rows)]  # type: ignore[arg-type]


def enqueue(entry: EnqueueEntry) -> Call[EnqueueReply]:
    """Enqueue once; a second call with the same id changes nothing and says so."""
    arguments: list[Argument] = [
        entry.job_id, entry.queue, iso_now(), entry.max_attempts, entry.min_protocol,
        entry.deadline_ms, entry.timeout_ms, entry.abandon_ms, entry.result_ttl, int(entry.stream),
    ]  # fmt: skip
    for name, value in entry.rq_fields.items():
        arguments += [name, value]
    return Call("enqueue", arguments, lambda r: EnqueueReply(bool(r[0]), JobState(_text(r[1]))))


def claim(
    worker: str,
    queues: Sequence[str],
    *,
    most: int,
    lease_ms: int,
    protocol: int,
    capacity_tokens: int,
    max_payload_bytes: int,
) -> Call[ClaimReply]:
    """Take up to `most` jobs that speak `protocol` or older and fit `capacity_tokens`."""
    arguments: list[Argument] = [
        worker, iso_now(), lease_ms, protocol, capacity_tokens, most, max_payload_bytes, *queues,
    ]  # fmt: skip

    def parse(reply: Sequence[Any]) -> ClaimReply:
        suspended, jobs, dropped = reply
        return ClaimReply(bool(suspended), [_claimed(j) for j in jobs], [_text(i) for i in dropped])

    return Call("claim", arguments, parse)


def commit(worker: str, rows: Sequence[CommitRow], *, lease_ms: int) -> Call[list[RowReply]]:
    """Write the events of a flush, and ends, in one step; one reply a row."""
    arguments: list[Argument] = [worker, iso_now(), lease_ms]
    for r in rows:
        arguments += [
            r.job_id, r.epoch, r.seq, int(r.publish), r.event, r.state or "",
            r.result, r.rq_result, r.error_code, r.message,
        ]  # fmt: skip
    return Call("commit", arguments, _row_replies)


def renew(worker: str, held: Sequence[tuple[str, int]], *, lease_ms: int) -> Call[list[RowReply]]:
    """Renew the leases of (job id, epoch) pairs."""
    arguments: list[Argument] = [worker, lease_ms]
    for job_id, epoch in held:
        arguments += [job_id, epoch]
    return Call("renew", arguments, _row_replies)


def release(worker: str, held: Sequence[tuple[str, int, int]]) -> Call[list[Row]]:
    """Hand (job id, epoch, needed KV tokens or 0) back to the front of their queues, uncharged."""
    arguments: list[Argument] = [worker, iso_now()]
    for row in held:
        arguments += row
    return Call("release", arguments, lambda rows: [_text(r) for r in rows])  # type: ignore[misc]


def cancel(job_id: str, reason: str) -> Call[JobState | None]:
    """Cancel; the reply is the state after the call, None for an unknown job."""
    return Call("cancel", [job_id, iso_now(), reason], lambda r: JobState(_text(r)) if r else None)


def reap(*, lease_ms: int, most: int = 256, queues: Sequence[str] = ()) -> Call[Swept]:
    """Take over what a dead worker held, expire what waited past its deadline.

    `queues`, the caller's own, are looked at whether or not RQ's set of queues still names them,
    and RQ's registries of their ended jobs are trimmed.
    """
    arguments: list[Argument] = [iso_now(), lease_ms, most, *queues]
    return Call("reap", arguments, lambda r: Swept(bool(r[0]), _pairs(r[1])))


def reconcile(queue: str, candidates: Sequence[str], *, lease_ms: int) -> Call[Swept]:
    """Repair open jobs that seem to be on no list and under no lease."""
    return Call(
        "reconcile", [iso_now(), queue, lease_ms, *candidates], lambda r: Swept(outcomes=_pairs(r))
    )
