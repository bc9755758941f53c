"""A job that this worker holds: what was committed, what waits to be, and how it ends."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING, Final

from mlx_serving.common import events
from mlx_serving.common.calls import CommitRow
from mlx_serving.common.events import ChoiceDelta, ErrorInfo, Usage
from mlx_serving.common.results import ChoiceResult, GenerationResult, Timings, encode_result
from mlx_serving.common.states import JobState
from mlx_serving.worker.rq_worker import rq_failure, rq_success

if TYPE_CHECKING:
    from mlx_serving.common.calls import ClaimedJob
    from mlx_serving.worker.engine.sequence import ModelInfo, Output

PROVEN_SECONDS: Final = 2.0
PROVEN_TOKENS: Final = 32
"""A row that decoded so long and so much in this attempt is past where an earlier one crashed:
what that one had not committed was less."""

CANCEL_STATES = {
    "deadline_exceeded": JobState.EXPIRED,
    "timeout": JobState.EXPIRED,
    "abandoned": JobState.EXPIRED,
}
"""Where a cancel reason leads; any other leads to `cancelled`. The scripts hold the same table."""


@dataclass(frozen=True, slots=True)
class Ending:
    """How a job ends, before its last event is written."""

    state: JobState
    error: ErrorInfo | None = None


@dataclass(frozen=True, slots=True)
class Committed:
    """What earlier attempts committed of choice 0, since the last reset."""

    token_ids: tuple[int, ...] = ()
    text: str = ""
    model_revision: str | None = None
    tokenizer_hash: str | None = None
    finish_reason: str | None = None


@dataclass(slots=True, eq=False)
class HeldJob:
    """One claimed job. The publisher alone changes it, under its lock."""

    claimed: ClaimedJob
    claimed_at: float = field(default_factory=time.monotonic)
    expires_at: float = inf  # monotonic seconds
    expiry_reason: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    model: ModelInfo | None = None  # set: the attempt event goes with the first output
    model_name: str = ""
    token_ids: list[int] = field(default_factory=list)  # every one decoded, all attempts
    text: list[str] = field(default_factory=list)
    finish_reason: str | None = None
    finish_committed: bool = False  # an earlier attempt wrote the finish reason, but no end
    reset: bool = False  # the attempt event is followed by one that takes earlier tokens back
    ending: Ending | None = None
    pending_tokens: list[int] = field(default_factory=list)
    pending_text: list[str] = field(default_factory=list)
    seq: int = 0  # last one handed to Redis, committed or in flight
    first_token_ms: int = 0
    committed_at: float = 0.0  # monotonic seconds of the last commit
    proven: bool = False  # the engine has survived this attempt for a while
    resumed_at: int = 0  # how many tokens earlier attempts decoded
    running_since: float = 0.0  # monotonic seconds of this attempt's first token
    token_at: float = 0.0  # monotonic seconds of its last one so far
    trace_id: str = ""  # of the job's traceparent, once that is read

    def __post_init__(self) -> None:
        """Start at what is committed, and fix when the job's time is over."""
        self.seq = self.claimed.seq
        self.first_token_ms = self.claimed.first_token_ms
        self.committed_at = self.claimed_at
        self._limit(self.claimed.deadline_ms, "deadline_exceeded")
        if self.claimed.timeout_ms:
            self._limit(self.claimed.started_ms + self.claimed.timeout_ms, "timeout")

    def _limit(self, at_ms: int, reason: str) -> None:
        """Redis's time of an end, as this process's monotonic clock will reach it."""
        at = self.claimed_at + (at_ms - self.claimed.now_ms) / 1000
        if at_ms and at < self.expires_at:
            self.expires_at, self.expiry_reason = at, reason

    @property
    def job_id(self) -> str:
        """The job's id."""
        return self.claimed.job_id

    @property
    def request_id(self) -> str:
        """Its row in the engine."""
        return self.claimed.request_id

    @property
    def pending(self) -> bool:
        """Whether there is anything that Redis has not been sent."""
        return bool(self.pending_tokens or self.pending_text or self.ending)

    @property
    def age_ms(self) -> int:
        """Time since the enqueue."""
        return max(0, self.now_ms() - self.claimed.enqueued_ms)

    def names(self) -> dict[str, object]:
        """What every log record on this attempt carries."""
        trace = {"trace_id": self.trace_id} if self.trace_id else {}
        return {"job_id": self.job_id, "attempt": self.claimed.epoch, **trace}

    def report(self) -> dict[str, object]:
        """Counts and times for the log: no text. The times are since the enqueue, in ms."""
        claimed = self.claimed
        first = self.first_token_ms - claimed.enqueued_ms if self.first_token_ms else None
        return {
            "queue": claimed.queue, "prompt_tokens": self.prompt_tokens,
            "completion_tokens": len(self.token_ids), "resumed_tokens": self.resumed_at,
            "started_after_ms": claimed.started_ms - claimed.enqueued_ms,
            "first_token_after_ms": first, "ended_after_ms": self.age_ms,
            "attempt_ms": int((time.monotonic() - self.claimed_at) * 1000),
        }  # fmt: skip

    def now_ms(self) -> int:
        """Redis TIME as far as this process knows it."""
        return self.claimed.now_ms + int((time.monotonic() - self.claimed_at) * 1000)

    def resume(self, committed: Committed) -> None:
        """Take over what earlier attempts committed."""
        self.token_ids.extend(committed.token_ids)
        self.resumed_at = len(self.token_ids)
        if committed.text:
            self.text.append(committed.text)
        self.finish_reason = committed.finish_reason
        self.finish_committed = committed.finish_reason is not None

    def restart(self) -> None:
        """Take back what earlier attempts committed: decoding begins anew."""
        self.token_ids.clear()
        self.text.clear()
        self.reset = True

    def add(self, output: Output) -> bool:
        """Take a step's output; True where a consumer should not wait for it."""
        first = not self.first_token_ms and bool(output.token_ids)
        if first:
            self.first_token_ms = self.now_ms()
        self.pending_tokens += output.token_ids
        self.token_ids += output.token_ids
        if output.text:
            self.pending_text.append(output.text)
            self.text.append(output.text)
        self.prompt_tokens = output.prompt_tokens or self.prompt_tokens
        self.cached_tokens = output.cached_tokens or self.cached_tokens
        if output.finish_reason:
            self.finish_reason = output.finish_reason
            error = ErrorInfo(output.error.code, output.error.message) if output.error else None
            self.end(JobState.FAILED if error else JobState.FINISHED, error)
        return first or bool(output.finish_reason)

    def proves(self, now: float) -> bool:
        """Say, once, that this attempt has run long enough to be above suspicion."""
        if self.proven or len(self.token_ids) - self.resumed_at < PROVEN_TOKENS:
            self.running_since = self.running_since or now
            return False
        self.proven = now - self.running_since >= PROVEN_SECONDS
        return self.proven

    def end(self, state: JobState, error: ErrorInfo | None = None) -> None:
        """Decide how the job ends; the first decision stands."""
        if self.ending is None:
            self.ending = Ending(state, error)

    def cancel(self, reason: str) -> None:
        """End it as the cancel reason says."""
        state = CANCEL_STATES.get(reason, JobState.CANCELLED)
        code = reason if state is JobState.EXPIRED else "cancelled"
        self.end(state, ErrorInfo(code, reason))

    def rows(self, worker: str) -> list[CommitRow]:
        """Take what is pending as rows to commit, in order of seq."""
        rows = []
        if self.model is not None:
            rows.append(self._row(self._attempt_event(worker, self.model)))
            self.model = None
        if self.reset:
            event = events.reset_event(attempt=self.claimed.epoch, seq=self._next_seq())
            rows.append(self._row(event))
            self.reset = False
        finishes = self.finish_reason and self.ending and not self.finish_committed
        if self.pending_tokens or self.pending_text or finishes:
            rows.append(self._row(self._tokens_event()))
        if self.ending is not None:
            rows.append(self._end_row(self.ending, worker))
        return rows

    def _row(self, event: events.Event) -> CommitRow:
        return CommitRow(
            self.job_id, self.claimed.epoch, event.seq, events.encode(event), self.claimed.stream
        )

    def _next_seq(self) -> int:
        self.seq += 1
        return self.seq

    def _attempt_event(self, worker: str, model: ModelInfo) -> events.Event:
        return events.attempt_event(
            attempt=self.claimed.epoch, seq=self._next_seq(), worker=worker, model=self.model_name,
            model_revision=model.revision, tokenizer_hash=model.tokenizer_hash,
        )  # fmt: skip

    def _tokens_event(self) -> events.Event:
        delta = ChoiceDelta(
            index=0,
            text="".join(self.pending_text),
            token_ids=self.pending_tokens,
            finish_reason=self.finish_reason,
        )
        self.pending_tokens, self.pending_text = [], []
        return events.tokens_event(
            attempt=self.claimed.epoch, seq=self._next_seq(), choices=[delta]
        )

    def _usage(self) -> Usage:
        return Usage.of(self.prompt_tokens, len(self.token_ids), self.cached_tokens)

    def _end_row(self, ending: Ending, worker: str) -> CommitRow:
        usage = self._usage()
        event = events.end_event(
            attempt=self.claimed.epoch, seq=self._next_seq(), state=ending.state, usage=usage,
            error=ending.error,
        )  # fmt: skip
        result = encode_result(self._result(ending, usage, worker))
        error = ending.error
        summary = f"{error.code}: {error.message}" if error else ""
        finished = ending.state is JobState.FINISHED
        return CommitRow(
            self.job_id, self.claimed.epoch, event.seq, events.encode(event), self.claimed.stream,
            state=ending.state, result=result,
            rq_result=rq_success(result) if finished else rq_failure(summary),
            error_code=error.code if error else "", message=error.message if error else "",
        )  # fmt: skip

    def _result(self, ending: Ending, usage: Usage, worker: str) -> GenerationResult:
        choice = ChoiceResult(
            index=0, text="".join(self.text), token_ids=self.token_ids,
            finish_reason=self.finish_reason,
        )  # fmt: skip
        timings = Timings(
            enqueued_ms=self.claimed.enqueued_ms, started_ms=self.claimed.started_ms,
            first_token_ms=self.first_token_ms or None, finished_ms=self.now_ms(),
        )  # fmt: skip
        return GenerationResult(
            id=self.job_id, state=ending.state, choices=[choice], usage=usage,
            error=ending.error, attempts=self.claimed.epoch, worker=worker, timings=timings,
        )  # fmt: skip
