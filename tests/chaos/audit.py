"""What must hold at the end of a run. Every line of `Audit.violations` is a broken contract."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from mlx_serving.common import events, results
from mlx_serving.common.protocol.keys import Keys
from mlx_serving.common.protocol.quarantine import read_quarantined
from mlx_serving.common.protocol.stored_events import payloads
from tests.chaos import answers
from tests.chaos.forgetting import Forgetting, since
from tests.chaos.producer import digest, seen
from tests.chaos.worker import crc_of
from tests.support.helpers import leaked_keys

if TYPE_CHECKING:
    from collections.abc import Sequence

    import redis

    from mlx_serving.common.events import Event, Usage
    from tests.chaos.trace import Claim, Commit, Trace
    from tests.chaos.work import Work

KEYS = Keys()
NEVER: Final = 1 << 62  # ns


@dataclass
class Job:
    """What Redis holds of a job."""

    job_id: str
    work: Work
    control: dict[bytes, bytes]
    events: list[Event]
    crcs: list[int]  # of each event, as Redis holds it
    sent: int = 0  # ns: when the submit was sent that was acknowledged
    cancelled: bool = False  # whether its producer meant to cancel it
    consumers: list[dict[str, Any]] = field(default_factory=list)

    @property
    def state(self) -> str:
        """Its state, or '' if Redis does not know the job."""
        return self.control.get(b"st", b"").decode()

    @property
    def lane(self) -> str:
        return self.control.get(b"q", b"").decode().rpartition(":")[2]

    @property
    def token_ids(self) -> list[int]:
        """Of all choices, as they came."""
        return [t for e in self.events for c in e.choices for t in c.token_ids]

    @property
    def usage(self) -> Usage | None:
        return next((event.usage for event in self.events if event.usage), None)

    def committed(self, attempt: int) -> int:
        """Tokens that this attempt wrote."""
        deltas = (c for e in self.events if e.attempt == attempt for c in e.choices)
        return sum(len(c.token_ids) for c in deltas)


def read_job(client: redis.Redis, job_id: str, work: Work) -> Job:
    with client.pipeline(transaction=True) as pipe:
        pipe.hgetall(KEYS.job(job_id))
        pipe.xrange(KEYS.events(job_id))
        control, entries = pipe.execute()
    told = payloads(entries)
    crcs = [crc_of(payload) for payload in told]
    return Job(job_id, work, control, [events.decode(payload) for payload in told], crcs)


class Audit:
    """Collects violations, each under its kind.

    Where Redis forgot something (`forgettings`), a job may be gone that it did not know any more,
    a consumer may have had a reset, and what was acknowledged before proves nothing.
    """

    def __init__(self, forgettings: Sequence[Forgetting] = ()) -> None:
        self._forgettings = forgettings
        self.violations: list[tuple[str, str, str]] = []  # kind, job id or '', what

    def find(self, wrong: object, kind: str, job_id: str, what: str) -> None:
        if wrong:
            self.add(kind, job_id, what)

    def add(self, kind: str, job_id: str, what: str) -> None:
        self.violations.append((kind, job_id, what))

    def job(self, job: Job) -> None:
        """One job's control hash, stream, result and consumers."""
        state = job.state
        for consumer in job.consumers:
            self._consumer(job, consumer)
        if not state and self._is_forgotten(job):
            return
        if state in {"", "queued", "running"}:
            self.add("lost", job.job_id, f"state {state!r} at the end")
            return
        why = job.control.get(b"msg", b"").decode()
        ends = {"finished", "cancelled"} if job.cancelled else {"finished"}
        self.find(state not in ends, "wrong end", job.job_id, f"{state}: {why}")
        self._sequence(job)
        self._attempts(job)
        if state == "finished":
            self._answer(job)

    def _is_forgotten(self, job: Job) -> bool:
        """Whether Redis once did not know the job any more that it had acknowledged."""
        return any(
            job.sent <= each.opened and job.job_id not in each.kept for each in self._forgettings
        )

    def _sequence(self, job: Job) -> None:
        seqs = [event.seq for event in job.events]
        self.find(seqs != list(range(1, len(seqs) + 1)), "gap or order", job.job_id, f"{seqs}")
        committed = int(job.control.get(b"seq", 0))
        self.find(len(seqs) != committed, "gap or order", job.job_id,
                  f"{len(seqs)} events, control hash says {committed}")  # fmt: skip
        ends = [event.seq for event in job.events if event.type == "end"]
        self.find(ends != seqs[-1:], "gap or order", job.job_id, f"end events at {ends}")

    def _attempts(self, job: Job) -> None:
        """Each attempt opens with its event, under a higher number; no older one writes after."""
        current, owner = 0, ""
        for event in job.events:
            if event.type == "attempt":
                self.find(event.attempt <= current, "zombie", job.job_id,
                          f"attempt {event.attempt} opened after {current}")  # fmt: skip
                self.find(event.start_seq != event.seq, "gap or order", job.job_id,
                          f"attempt opens at {event.start_seq}, is {event.seq}")  # fmt: skip
                current, owner = event.attempt, event.worker or ""
            elif event.attempt != current and not _is_by_script(job, event):
                what = f"seq {event.seq} of attempt {event.attempt} during {current}"
                self.add("zombie", job.job_id, what)
        if job.state == "cancelled":  # perhaps by a script, before an attempt began
            return
        ended_by = (job.control.get(b"ep", b"").decode(), job.control.get(b"ow", b"").decode())
        self.find(ended_by != (str(current), owner), "zombie", job.job_id,
                  f"ended by {ended_by}, last attempt is {current} of {owner}")  # fmt: skip

    def _answer(self, job: Job) -> None:
        result = results.decode_result(job.control[b"res"])
        told = answers.told(result.choices)
        self.find(what := answers.difference(told, job.work.answer), "wrong tokens", job.job_id,
                  f"{job.work.kind}: {what}")  # fmt: skip
        self.find(what := answers.wrong(job.work, told), "wrong answer", job.job_id,
                  f"{job.work.kind}: {what}")  # fmt: skip
        streamed = results.assemble(job.job_id, job.events).choices
        self.find(streamed != result.choices, "wrong answer", job.job_id,
                  "the result is not the stream's")  # fmt: skip
        usage = result.usage
        self.find(usage is None or usage.completion_tokens != len(job.token_ids), "wrong answer",
                  job.job_id, f"usage {usage}")  # fmt: skip

    def _consumer(self, job: Job, consumer: dict[str, Any]) -> None:
        for problem in consumer["problems"]:
            self.add("consumer", job.job_id, problem)
        if consumer["problems"]:
            return
        forgot = since(self._forgettings, job.sent, NEVER)
        self.find(consumer["resets"] and not forgot, "consumer", job.job_id, "a reset, for nothing")
        if consumer["unknown"]:
            wrong = job.state or not self._is_forgotten(job)
            self.find(wrong, "consumer", job.job_id, "told that there is no such job")
        # It may have been told all of an end that Redis forgot.
        elif not forgot:
            self.find(consumer["digest"] != digest([seen(e) for e in job.events]), "consumer",
                      job.job_id, "it saw other events than the stream holds")  # fmt: skip

    def view(self, client: redis.Redis, jobs: list[Job]) -> None:
        """RQ's hashes and registries say what the control hashes say; nothing is left over."""
        for job in jobs:
            if job.state != "finished":
                continue
            queue = job.control.get(b"q", b"").decode()
            status = client.hget(KEYS.rq_job(job.job_id), "status")
            self.find(status != b"finished", "view", job.job_id, f"RQ's status {status!r}")
            score = client.zscore(f"rq:finished:{queue}", job.job_id)
            self.find(score is None, "view", job.job_id, "not in RQ's finished registry")
            kept = client.xlen(f"rq:results:{job.job_id}")
            self.find(kept != 1, "view", job.job_id, f"{kept} RQ results")
        for pattern in ("rq:wip:*", "rq:execution*", "rq:worker:*:executions", "rq:queue:*",
                        "mlxs:open:*", "mlxs:leases:*", "mlxs:deadlines"):  # fmt: skip
            for key in client.scan_iter(pattern, count=1000):
                self.add("left over", "", key.decode())
        # Names of killed workers go when another one registers after their hash has expired.
        leaks = [key for key in leaked_keys(client) if not key.startswith("rq:workers")]
        self.find(leaks, "left over", "", f"keys without a TTL: {leaks[:5]}")

    def odd_keys(self, client: redis.Redis, gone: set[str]) -> None:
        """What a hand planted and somebody moved is noted."""
        noted = {moved.key for moved in read_quarantined(client, KEYS)}
        self.find(gone - noted, "not reported", "", f"odd keys: {sorted(gone - noted)}")

    def fences(self, traces: list[Trace]) -> None:
        """No row was accepted that was sent after a later attempt had been given the job."""
        taken: defaultdict[str, list[Claim]] = defaultdict(list)
        for trace in traces:
            for claim in trace.claimed:
                taken[claim.job_id].append(claim)
        for trace in traces:
            for c in trace.commits:
                if c.status == "OK" and self._is_taken_over(c, taken[c.job_id]):
                    what = f"seq {c.seq} of {trace.worker}'s attempt {c.epoch} accepted"
                    self.add("zombie", c.job_id, what)

    def _is_taken_over(self, row: Commit, claims: list[Claim]) -> bool:
        own = max((c.replied for c in claims if c.nonce == row.nonce), default=NEVER)
        return any(
            c.nonce != row.nonce
            and c.replied < row.sent
            and (c.epoch > row.epoch or c.sent > own)
            and not since(self._forgettings, c.sent, row.replied)
            for c in claims
        )

    def kept(self, traces: list[Trace], jobs: dict[str, Job]) -> None:
        """Every row that its worker was told to be written stands in the stream, word for word."""
        for trace in traces:
            for c in trace.commits:
                job = jobs.get(c.job_id)
                if c.status not in {"OK", "DUP"} or job is None or not job.state:
                    continue
                stands = c.seq <= len(job.crcs) and job.crcs[c.seq - 1] == c.crc
                if not stands and not since(self._forgettings, c.sent, NEVER):
                    what = f"seq {c.seq} of {trace.worker}: {c.status}, yet it is not there"
                    self.add("row not kept", c.job_id, what)


def _is_by_script(job: Job, event: Event) -> bool:
    """Whether a script wrote the end: nobody ran the job that was cancelled."""
    return job.state == "cancelled" and event.type == "end"
