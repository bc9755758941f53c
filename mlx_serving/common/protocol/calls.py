"""The delivery protocol without I/O: what each script is sent, and what its reply means.

`Protocol` (sync) and `AsyncProtocol` run these calls; every call may be sent again after a lost
reply, which is what makes retrying safe (DESIGN, delivery contract).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, NamedTuple, TypeVar

import msgspec

from mlx_serving.common import events, lifetimes, limits
from mlx_serving.common.attempts import Attempt
from mlx_serving.common.errors import CorruptJob
from mlx_serving.common.protocol.fields import TOKENS_OPENING, EntryField
from mlx_serving.common.protocol.refusal import Refusal
from mlx_serving.common.states import JobState

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from mlx_serving.common.events import Event
    from mlx_serving.common.lifetimes import Lifetimes

T = TypeVar("T")
Argument = str | bytes | int | float
RowStatus = Literal["OK", "DUP", "FENCED", "GAP", "ERROR"]


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
    max_attempts: int = 2
    min_protocol: int = 1
    deadline_ms: int = 0  # relative; Redis TIME fixes it at enqueue
    timeout_ms: int = 0
    abandon_ms: int = 0
    result_ttl: int = 3600
    lifetimes: Lifetimes = lifetimes.DEFAULT
    stream: bool = True
    tenant: str = ""  # '': none
    marks: str = ""  # see `producer.marks`; '': none
    rows: int = 1  # of the batch that it takes
    idempotency_key: str = ""  # '': none; not written, but an error names it
    digest: str = ""  # of the payload, if there is a key; see `producer.envelope`


@dataclass(frozen=True, slots=True)
class EnqueueReply:
    """Whether this call created the job, and the state that it has now; or its refusal."""

    created: bool
    state: JobState
    refusal: Refusal | None = None


class ClaimedJob(msgspec.Struct, frozen=True, gc=False):
    """A job this worker holds from now on. Times are ms of Redis TIME, durations ms (0: none)."""

    attempt: Attempt
    queue: str
    seq: int  # last committed event
    data: bytes  # RQ's payload, compressed; empty when there is a problem
    deadline_ms: int
    timeout_ms: int
    stream: bool
    result_ttl: int
    enqueued_ms: int
    started_ms: int
    first_token_ms: int
    now_ms: int
    problem: str = ""  # code of what is wrong with RQ's hash of the job; '': nothing
    problem_field: str = ""
    signature: str = ""  # see `signing`; empty if there is none
    max_unproven: int = 0  # unproven rows that may run with this one, itself included; 0: any
    adopted: bool = False  # of RQ's own enqueue; see `adoption`
    runs_alone: bool = False  # nothing may run with it until it ends

    @property
    def job_id(self) -> str:
        """The job's id."""
        return self.attempt.job_id

    @property
    def epoch(self) -> int:
        """How many claims of the job there were, this one included."""
        return self.attempt.epoch


@dataclass(frozen=True, slots=True)
class HeldRows:
    """What a worker's batch holds when it claims, as the rule on suspects needs it.

    `unproven` of the `rows` have not run long enough to show that the engine survives them;
    `max_unproven` is the least of what these allow, themselves included (0: any).
    """

    rows: int = 0
    unproven: int = 0
    max_unproven: int = 0


class Returned(NamedTuple):
    """A job that goes back to its queue; what it needs of a worker, 0: leave it as it is noted."""

    attempt: Attempt
    kv_tokens: int = 0
    rows: int = 0


@dataclass(frozen=True, slots=True)
class Blame:
    """What a crash says of one job. `max_unproven` as in `ClaimedJob`; 0: it is not charged."""

    attempt: Attempt
    max_unproven: int = 0
    alone: bool = False


@dataclass(frozen=True, slots=True)
class ClaimReply:
    """What a claim took; `dropped` ids had no business on the list (cancelled, deleted, stale)."""

    suspended: bool
    jobs: list[ClaimedJob]
    dropped: list[str]
    reserved: str = ""  # queue to look into first: a suspect of it waits for this worker
    again_ms: int = 0  # look again then: jobs were left to workers that have their prefix; 0: none


class JobEnd(msgspec.Struct, frozen=True, gc=False):
    """How a job ends."""

    state: JobState
    result: bytes = b""  # result record, JSON
    rq_result: bytes = b""  # RQ's own form of it, see `rq_worker`; empty: RQ is to keep none
    error_code: str = ""
    message: str = ""


class CommitRow(msgspec.Struct, frozen=True, gc=False):
    """One event of one job, and, if it is the last, the job's end."""

    attempt: Attempt
    seq: int
    body: bytes  # the event's JSON without its opening, see `events.body`
    has_tokens: bool
    publish: bool = True
    end: JobEnd | None = None

    @classmethod
    def of(
        cls, attempt: Attempt, event: Event, *, publish: bool = True, end: JobEnd | None = None
    ) -> CommitRow:
        """Row of an event that this attempt wrote.

        Without `publish`, what has no tokens is published all the same: the begin and the end of
        an attempt, so that whoever waits for them need not poll.
        """
        publish = publish or not event.has_tokens
        return cls(attempt, event.seq, events.body(event), event.has_tokens, publish, end)


class WireRow(NamedTuple):
    """A row as `commit.lua` takes it: text alone, since Redis's MessagePack knows no bytes."""

    job_id: str
    epoch: str
    nonce: str
    seq: int
    form: EntryField  # how the body is stored and given: BODY, or TOKENS without its beginning
    body: str
    has_tokens: bool
    publish: bool
    state: str  # '': the job goes on
    result: str
    rq_result: str
    error_code: str
    message: str


class RowReply(msgspec.Struct, frozen=True, gc=False):
    """What became of a row; `reason`: why its job should stop ('' if not), or Redis's error."""

    status: RowStatus
    reason: str = ""


OK: Final = RowReply("OK")


@dataclass(frozen=True, slots=True)
class Swept:
    """What a sweep did; `waiting`: Redis restarted too lately to reap."""

    waiting: bool = False
    outcomes: list[tuple[str, str]] = field(default_factory=list)


def iso_now() -> str:
    """Wall clock in RQ's text form. Only RQ's view holds such times; nothing decides by them."""
    # Not by strftime: the C library then looks at the system's time zone each time.
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def _text(value: str | bytes) -> str:
    # A foreign hand may have written anything; one odd reply must not stop the whole batch.
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def read_state(value: str | bytes) -> JobState:
    """Read a state as a script names it. Raises CorruptJob."""
    try:
        return JobState(_text(value))
    except ValueError:
        raise CorruptJob("the job's control hash names no state") from None


def _claimed(row: Sequence[Any], nonce: str) -> ClaimedJob:
    (
        job_id, queue, epoch, seq, data, problem, problem_field, signature, deadline_ms, timeout_ms,
        stream, result_ttl, enqueued_ms, started_ms, first_token_ms, now_ms, max_unproven, adopted,
        runs_alone,
    ) = row  # fmt: skip
    return ClaimedJob(
        attempt=Attempt(_text(job_id), int(epoch), nonce),
        queue=_text(queue),
        seq=int(seq),
        data=data.encode() if isinstance(data, str) else data,
        deadline_ms=int(deadline_ms),
        timeout_ms=int(timeout_ms),
        stream=int(stream) != 0,
        result_ttl=int(result_ttl),
        enqueued_ms=int(enqueued_ms),
        started_ms=int(started_ms),
        first_token_ms=int(first_token_ms),
        now_ms=int(now_ms),
        problem=_text(problem),
        problem_field=_text(problem_field),
        signature=_text(signature),
        max_unproven=int(max_unproven),
        adopted=int(adopted) != 0,
        runs_alone=int(runs_alone) != 0,
    )


def _pairs(rows: Sequence[Sequence[Any]]) -> list[tuple[str, str]]:
    return [(_text(a), _text(b)) for a, b in rows]


def _row_replies(rows: Sequence[Sequence[Any]]) -> list[RowReply]:
    return [RowReply(status, reason) for status, reason in _pairs(rows)]  # type: ignore[arg-type]


def enqueue(entry: EnqueueEntry) -> Call[EnqueueReply]:
    """Enqueue once; a second call with the same id changes nothing and says so."""
    many = enqueue_many([entry])
    return Call(many.script, many.arguments, lambda replies: many.parse(replies)[0])


def enqueue_many(entries: Sequence[EnqueueEntry]) -> Call[list[EnqueueReply]]:
    """Enqueue each once, in order, in one script; see `enqueue`."""
    arguments: list[Argument] = [iso_now()]
    for e in entries:
        rq_fields = [text for pair in e.rq_fields.items() for text in pair]
        arguments += (
            e.job_id, e.queue, e.max_attempts, e.min_protocol, e.deadline_ms, e.timeout_ms,
            e.abandon_ms, e.result_ttl, *e.lifetimes, int(e.stream), e.tenant, e.marks, e.digest,
            e.rows, len(rq_fields), *rq_fields,
        )  # fmt: skip

    def parse(replies: Sequence[Any]) -> list[EnqueueReply]:
        return [read_enqueued(*reply) for reply in replies]

    return Call("enqueue", arguments, parse)


def read_enqueued(created: int, state: str | bytes, *refusal: Any) -> EnqueueReply:
    """Read what became of one job that was to be enqueued."""
    if refusal:
        reason, *numbers = refusal
        why = Refusal(_text(reason), *numbers)  # type: ignore[arg-type]
        return EnqueueReply(created=False, state=JobState.QUEUED, refusal=why)
    return EnqueueReply(bool(created), read_state(state))


def claim(  # noqa: PLR0913 -- each is a number that the script needs
    worker: str,
    queues: Sequence[str],
    *,
    nonce: str,
    most: int,
    lease_ms: int,
    protocol: int,
    capacity_tokens: int,
    max_payload_bytes: int,
    capacity_rows: int = limits.CHOICES,
    held: HeldRows = HeldRows(),
    affinity_ms: int = 0,
    keeps_prefixes: bool = False,
) -> Call[ClaimReply]:
    """Take up to `most` jobs that speak `protocol` or older and need no more than there is.

    A job younger than `affinity_ms` is left to a worker that has its prefix and room for it; 0:
    none is, and no mark is noted. `keeps_prefixes`: this worker will have those of what it takes.

    A claim of a nonce (`attempts.new_nonce`) takes jobs once: sent again, it returns those that
    are still this worker's. With `most` 0 it does no more than that, and the claim itself takes
    nothing if it comes later.
    """
    arguments: list[Argument] = [
        worker, iso_now(), nonce, lease_ms, protocol, capacity_tokens, capacity_rows, most,
        max_payload_bytes,
        held.rows, held.unproven, held.max_unproven, affinity_ms, int(keeps_prefixes), *queues,
    ]  # fmt: skip

    def parse(reply: Sequence[Any]) -> ClaimReply:
        suspended, jobs, dropped, reserved, again_ms = reply
        claimed = [_claimed(j, nonce) for j in jobs]
        gone = [_text(i) for i in dropped]
        return ClaimReply(bool(suspended), claimed, gone, _text(reserved), again_ms)

    return Call("claim", arguments, parse)


def commit(worker: str, rows: Sequence[CommitRow], *, lease_ms: int) -> Call[list[RowReply]]:
    """Write the events of a flush, and ends, in one step; one reply a row.

    All rows are one argument, MessagePack, and only rows that are not plainly OK are answered: a
    flush of many rows costs the interpreter, which the engine needs too, little.
    """

    def parse(exceptions: Sequence[Any]) -> list[RowReply]:
        replies = [OK] * len(rows)
        for number, status, reason in exceptions:
            replies[number - 1] = RowReply(_text(status), _text(reason))  # type: ignore[arg-type]
        return replies

    packed = _packer.encode([_packed(row) for row in rows])
    return Call("commit", [worker, iso_now(), lease_ms, packed], parse)


_packer = msgspec.msgpack.Encoder()


def _packed(row: CommitRow) -> WireRow:
    job_id, epoch, nonce = row.attempt
    body, form = row.body.decode(), EntryField.BODY
    if body.startswith(TOKENS_OPENING):
        body, form = body[len(TOKENS_OPENING) :], EntryField.TOKENS
    return WireRow(
        job_id, str(epoch), nonce, row.seq, form, body, row.has_tokens, row.publish,
        *(_packed_end(row.end) if row.end else _GOES_ON),
    )  # fmt: skip


_GOES_ON: Final = ("",) * 5


def _packed_end(end: JobEnd) -> tuple[str, str, str, str, str]:
    result, rq_result = end.result.decode(), end.rq_result.decode()
    return end.state, result, rq_result, end.error_code, end.message


def renew(worker: str, held: Sequence[Attempt], *, lease_ms: int) -> Call[list[RowReply]]:
    """Renew the leases of attempts."""
    arguments: list[Argument] = [worker, lease_ms]
    for job_id, epoch, nonce in held:
        arguments += [job_id, epoch, nonce]
    return Call("renew", arguments, _row_replies)


def release(worker: str, held: Sequence[Returned]) -> Call[list[RowStatus]]:
    """Hand jobs back to the front of their queues, uncharged."""
    arguments: list[Argument] = [worker, iso_now()]
    for row in held:
        arguments += [*row.attempt, row.kv_tokens, row.rows]
    return Call("release", arguments, lambda rows: [_text(r) for r in rows])  # type: ignore[misc]


def cancel(job_id: str, reason: str) -> Call[JobState | None]:
    """Cancel; the reply is the state after the call, None for an unknown job."""
    return Call("cancel", [job_id, iso_now(), reason], lambda r: read_state(r) if r else None)


def crash(worker: str, blamed: Sequence[Blame]) -> Call[list[tuple[str, str]]]:
    """Hand back what a worker's dead child held; the first of `blamed` is to run first.

    The reply names each job's outcome: 'requeued', 'charged', 'dead' (poison), 'cancelled',
    'expired', or 'gone' if the job is no longer this worker's.
    """
    arguments: list[Argument] = [worker, iso_now()]
    for b in blamed:
        arguments += [*b.attempt, b.max_unproven, int(b.alone)]
    return Call("crash", arguments, _pairs)


def reap(
    *, lease_ms: int, most: int = 32, queues: Sequence[str] = (), machine: str = ""
) -> Call[Swept]:
    """Take over what a dead worker held, expire what waited too long, trim RQ's registries.

    `queues`, the caller's own, are looked at whether or not RQ's set of queues still names them.
    `most`: jobs of each kind and queue. `machine` is the caller's, if it runs jobs.
    """

    def parse(reply: Sequence[Any]) -> Swept:
        waited, outcomes = reply
        return Swept(bool(waited), _pairs(outcomes))

    return Call("reap", [iso_now(), lease_ms, most, machine, *queues], parse)


def reconcile(queue: str, candidates: Sequence[str | bytes], *, lease_ms: int) -> Call[Swept]:
    """Repair open jobs that seem to be on no list and under no lease."""
    return Call(
        "reconcile", [iso_now(), queue, lease_ms, *candidates], lambda r: Swept(outcomes=_pairs(r))
    )


def audit(tenant: str, job_ids: Sequence[str | bytes]) -> Call[list[tuple[str, str]]]:
    """Put right what a tenant's sets of jobs say wrongly of them; the reply names each job."""
    return Call("audit", [tenant, *job_ids], _pairs)
