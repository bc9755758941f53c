"""Drives the protocol's scripts by hand: every call with short defaults, and looks at the keys."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mlx_serving.common import attempts, events
from mlx_serving.common.protocol import calls
from mlx_serving.common.protocol.client import JobRecord, Protocol
from mlx_serving.common.protocol.keys import Keys
from mlx_serving.common.states import JobState

if TYPE_CHECKING:
    from collections.abc import Sequence

    import redis

    from mlx_serving.common.protocol.calls import (
        ClaimedJob,
        ClaimReply,
        CommitRow,
        EnqueueReply,
        RowReply,
        Swept,
    )

QUEUE = "tally:default"
LANES = ("tally:interactive", "tally:default", "tally:bulk")
LEASE_MS = 60_000
PAYLOAD = b"payload"
LUA_CAPACITY = 1 << 20


def rq_fields(queue: str = QUEUE) -> dict[str, str | bytes | int]:
    """As little of an RQ job hash as RQ's tools can read."""
    now = calls.iso_now()
    return {
        "status": "queued",
        "data": PAYLOAD,
        "origin": queue,
        "created_at": now,
        "enqueued_at": now,
        "timeout": 180,
    }


def entry(job_id: str, queue: str = QUEUE, **fields: Any) -> calls.EnqueueEntry:
    fields.setdefault("result_ttl", 60)
    return calls.EnqueueEntry(job_id, queue, fields.pop("rq_fields", rq_fields(queue)), **fields)


@dataclass
class Attempt:
    """One claimed job in a worker's hands: builds the rows that its worker would send."""

    job: ClaimedJob
    worker: str
    seq: int = field(init=False)

    def __post_init__(self) -> None:
        self.seq = self.job.seq

    def row(self, seq: int | None = None, text: str = "x", *, publish: bool = True) -> CommitRow:
        """Build the next tokens row, or the one of a given seq."""
        if seq is None:
            seq = self.seq = self.seq + 1
        delta = events.ChoiceDelta(0, text, [seq])
        event = events.tokens_event(**self._writer(), seq=seq, choices=[delta])
        return calls.CommitRow.of(self.job.attempt, event, publish=publish)

    def end(self, state: JobState = JobState.FINISHED, seq: int | None = None) -> CommitRow:
        """Build the row that ends the job."""
        if seq is None:
            seq = self.seq = self.seq + 1
        event = events.end_event(**self._writer(), seq=seq, state=state)
        end = calls.JobEnd(state, b'{"v":1,"id":"x","state":"finished"}', rq_result=b"e30=")
        return calls.CommitRow.of(self.job.attempt, event, end=end)

    def _writer(self) -> dict[str, Any]:
        return {"attempt": self.job.epoch, "tag": self.job.attempt.tag}


def payload(row: CommitRow) -> bytes:
    """The event of a row, as consumers get it."""
    tag = row.attempt.tag.encode()
    return events.opening(b"%d" % row.attempt.epoch, tag, b"%d" % row.seq) + row.body


def _text(raw: Any) -> str:
    return str(raw.decode())


class Driver:
    """The protocol, one short method a script."""

    def __init__(self, client: redis.Redis, keys: Keys | None = None) -> None:
        self.redis = client
        self.keys = keys or Keys()
        self.protocol = Protocol(client, self.keys)
        self.lease_ms = LEASE_MS  # of claims
        self._nonces: dict[tuple[str, int], str] = {}  # of attempts that were claimed here

    def enqueue(self, job_id: str, queue: str = QUEUE, **fields: Any) -> EnqueueReply:
        return self.protocol.run(calls.enqueue(entry(job_id, queue, **fields)))

    def claim(self, worker: str = "w1", queues: Sequence[str] = LANES, **given: Any) -> ClaimReply:
        options: dict[str, Any] = {
            "nonce": attempts.new_nonce(), "most": 8, "lease_ms": self.lease_ms, "protocol": 1,
            "capacity_tokens": LUA_CAPACITY, "max_payload_bytes": 1 << 20,
        }  # fmt: skip
        reply = self.protocol.run(calls.claim(worker, queues, **(options | given)))
        self._nonces |= {(job.job_id, job.epoch): job.attempt.nonce for job in reply.jobs}
        return reply

    def blame(
        self, job_id: str, epoch: int, max_unproven: int = 0, *, alone: bool = False
    ) -> calls.Blame:
        """What a crash says of an attempt that was claimed here, or of one that nobody knows."""
        nonce = self._nonces.get((job_id, epoch), "unknown")
        return calls.Blame(attempts.Attempt(job_id, epoch, nonce), max_unproven, alone)

    def claimed_ids(self, worker: str = "w1", **given: Any) -> list[str]:
        return [job.job_id for job in self.claim(worker, **given).jobs]

    def start(self, job_id: str, worker: str = "w1", **fields: Any) -> Attempt:
        """Enqueue one job and claim it."""
        self.enqueue(job_id, **fields)
        return self.take(worker)

    def take(self, worker: str = "w1", **given: Any) -> Attempt:
        """Claim exactly one job."""
        (job,) = self.claim(worker, most=1, **given).jobs
        return Attempt(job, worker)

    def commit(
        self,
        attempt: Attempt,
        *rows: CommitRow,
        worker: str | None = None,
        lease_ms: int = LEASE_MS,
    ) -> list[str]:
        return [
            r.status for r in self.commit_replies(attempt, *rows, worker=worker, lease_ms=lease_ms)
        ]

    def commit_replies(
        self,
        attempt: Attempt,
        *rows: CommitRow,
        worker: str | None = None,
        lease_ms: int = LEASE_MS,
    ) -> list[RowReply]:
        call = calls.commit(worker or attempt.worker, rows, lease_ms=lease_ms)
        return self.protocol.run(call)

    def renew(self, attempt: Attempt, lease_ms: int = LEASE_MS) -> RowReply:
        held = [attempt.job.attempt]
        (reply,) = self.protocol.run(calls.renew(attempt.worker, held, lease_ms=lease_ms))
        return reply

    def release(self, *attempts: Attempt, needed: int = 0, rows_needed: int = 0) -> list[str]:
        rows = [calls.Returned(a.job.attempt, needed, rows_needed) for a in attempts]
        replies: list[Any] = self.protocol.run(calls.release(attempts[0].worker, rows))
        return replies

    def cancel(self, job_id: str, reason: str = "cancelled") -> JobState | None:
        return self.protocol.run(calls.cancel(job_id, reason))

    def reap(self, lease_ms: int = 1, queues: Sequence[str] = LANES, machine: str = "") -> Swept:
        return self.protocol.run(calls.reap(lease_ms=lease_ms, queues=queues, machine=machine))

    def lapse(self, *job_ids: str, queue: str = QUEUE) -> None:
        """Let leases end, as time would."""
        self.redis.zadd(self.keys.leases(queue), dict.fromkeys(job_ids, 1.0), xx=True)

    def record(self, job_id: str) -> JobRecord:
        record = self.protocol.record(job_id)
        assert record is not None, job_id
        return record

    def state(self, job_id: str) -> str:
        return self.record(job_id).state.value

    def events(self, job_id: str) -> list[events.Event]:
        return [events.decode(payload) for payload in self.protocol.read_events(job_id)]

    def listed(self, queue: str = QUEUE) -> list[str]:
        return [_text(i) for i in self.redis.lrange(self.keys.rq_queue(queue), 0, -1)]

    def leased(self, queue: str = QUEUE) -> list[str]:
        return [_text(i) for i in self.redis.zrange(self.keys.leases(queue), 0, -1)]

    def indexed(self, queue: str = QUEUE) -> list[str]:
        return [_text(i) for i in self.redis.zrange(self.keys.open(queue), 0, -1)]

    def rq_status(self, job_id: str) -> str | None:
        status = self.redis.hget(self.keys.rq_job(job_id), "status")
        return None if status is None else _text(status)

    def snapshot(self) -> dict[bytes, bytes]:
        """Every key with its content, TTLs apart: equal snapshots mean that nothing was written."""
        return {name: self.redis.dump(name) or b"" for name in self.redis.scan_iter(count=1000)}
