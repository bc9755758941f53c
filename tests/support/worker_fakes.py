"""A protocol and claims without Redis, for unit tests of the worker's threads."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from mlx_serving.common import events
from mlx_serving.common.attempts import Attempt
from mlx_serving.common.protocol.calls import Call, ClaimedJob, RowReply, WireRow
from mlx_serving.common.protocol.fields import EntryField
from mlx_serving.common.protocol.stored_events import payloads
from mlx_serving.worker.delivery.held import HeldJob
from mlx_serving.worker.engine.interface import ModelInfo, Output

if TYPE_CHECKING:
    from collections.abc import Sequence

    import redis

    from mlx_serving.worker.status.conditions import Pressure

MODEL = ModelInfo("m", "r1", "h1", 100, frozenset({0}))


def claim_of(job_id: str = "a", **fields: Any) -> ClaimedJob:
    given: dict[str, Any] = {
        "attempt": Attempt(job_id, fields.pop("epoch", 1), fields.pop("nonce", "0f")),
        "queue": "tally:default", "seq": 0, "data": b"", "deadline_ms": 0, "timeout_ms": 0,
        "stream": True, "result_ttl": 60, "enqueued_ms": 1, "started_ms": 2, "first_token_ms": 0,
        "now_ms": 2,
    }  # fmt: skip
    return ClaimedJob(**(given | fields))


def held(job_id: str = "a", choices: int = 1, **fields: Any) -> HeldJob:
    """Return a job that is prepared: its attempt event goes with the first output."""
    job = HeldJob(claim_of(job_id, **fields))
    job.expect(choices)
    job.model, job.model_name = MODEL, "tally"
    return job


def output(
    job: HeldJob,
    tokens: Sequence[int],
    text: str = "",
    reason: str | None = None,
    choice: int = 0,
) -> Output:
    return Output(job.request_id, choice, list(tokens), text, reason, prompt_tokens=3)


def commit_rows(call: Call[Any]) -> list[WireRow]:
    """The rows of a commit, as its script gets them."""
    return msgspec.msgpack.decode(call.arguments[3], type=list[WireRow])  # type: ignore[arg-type]


def payload_of(row: WireRow) -> bytes:
    """The event that a row writes, as consumers read it."""
    tag = Attempt(row.job_id, int(row.epoch), row.nonce).tag
    entry = {EntryField.WRITER: f"{row.epoch}-{tag}", row.form: row.body}
    fields = {name.encode(): text.encode() for name, text in entry.items()}
    return payloads([(b"%d-0" % row.seq, fields)])[0]


class FakeProtocol:
    """Answers each row by `row_answers` (job id, seq), else by `answers` (job id), else with OK.

    It remembers the rows as events.
    """

    def __init__(self) -> None:
        self.commits: list[list[tuple[str, events.Event, bool]]] = []
        self.sent: list[list[WireRow]] = []
        self.renewals: list[list[str]] = []
        self.faults: list[Exception] = []
        self.answers: dict[str, RowReply] = {}
        self.row_answers: dict[tuple[str, int], RowReply] = {}
        self.renew_answers: dict[str, RowReply] = {}
        self.renew_faults: list[redis.RedisError] = []
        self.gate = threading.Event()
        self.gate.set()

    def run(self, call: Call[Any]) -> Any:
        self.gate.wait(10)
        if call.script == "renew":
            return self._renew(call.arguments[2:])
        assert call.script == "commit"
        rows = commit_rows(call)
        self.sent.append(rows)
        if self.faults:
            raise self.faults.pop(0)
        decoded = [(r.job_id, events.decode(payload_of(r)), r.publish) for r in rows]
        self.commits.append(decoded)
        return [self._answer(job_id, event.seq) for job_id, event, _ in decoded]

    def _answer(self, job_id: str, seq: int) -> RowReply:
        answer = self.answers.get(job_id, RowReply("OK"))
        return self.row_answers.get((job_id, seq), answer)

    def _renew(self, held: list[Any]) -> list[RowReply]:
        ids = [str(job_id) for job_id in held[::3]]
        if self.renew_faults:
            raise self.renew_faults.pop(0)
        self.renewals.append(ids)
        return [self.renew_answers.get(job_id, RowReply("OK")) for job_id in ids]

    @property
    def events(self) -> list[events.Event]:
        return [event for commit in self.commits for _, event, _ in commit]


@dataclass
class FakeProbe:
    """A Mac as the test wants it; None: it can't tell."""

    idle: float | None = 3600.0
    pressure: Pressure | None = "nominal"
    battery: bool | None = False

    def idle_seconds(self) -> float | None:
        return self.idle

    def thermal_pressure(self) -> Pressure | None:
        return self.pressure

    def on_battery(self) -> bool | None:
        return self.battery
