"""A job that this worker holds: what was committed, what waits to be, and how it ends."""

from __future__ import annotations

import time
from math import inf
from typing import TYPE_CHECKING, Final

from msgspec import Struct, field

from mlx_serving.common import events
from mlx_serving.common.errors import EngineError
from mlx_serving.common.events import ErrorInfo, Usage
from mlx_serving.common.protocol.calls import ClaimedJob, CommitRow, JobEnd, Returned
from mlx_serving.common.queues import lane_of
from mlx_serving.common.results import GenerationResult, Timings, encode_result
from mlx_serving.common.states import JobState
from mlx_serving.worker.delivery.choice import Choice
from mlx_serving.worker.delivery.token_text import Spell, unspelled
from mlx_serving.worker.engine.interface import FINISH_ERROR, ModelInfo
from mlx_serving.worker.rq_worker import rq_failure, rq_success

if TYPE_CHECKING:
    from mlx_serving.common.queues import Lane
    from mlx_serving.worker.delivery.choice import Committed
    from mlx_serving.worker.engine.interface import Output

PROVEN_SECONDS: Final = 2.0
PROVEN_TOKENS: Final = 32
"""An attempt is proven once each of its rows has decoded for so long and so many tokens. It is then
past the place at which an earlier attempt crashed, since that one had fewer tokens uncommitted."""

EVENT_TOKENS: Final = 4
"""A choice with so many pending tokens is written at once: a fast row's events stay small."""

CANCEL_STATES = {
    "deadline_exceeded": JobState.EXPIRED,
    "timeout": JobState.EXPIRED,
    "abandoned": JobState.EXPIRED,
}
"""State that a cancel reason leads to; any other leads to `cancelled`. As in the scripts."""


class Ending(Struct, frozen=True):
    """How a job ends, before its last event is written."""

    state: JobState
    error: ErrorInfo | None = None


class HeldJob(Struct, eq=False):
    """One claimed job. The publisher alone changes it, under its lock.

    It ends when all its choices have, or as soon as one fails: the job then failed, as a call of
    the OpenAI API does, and what the others have so far is kept.
    """

    claimed: ClaimedJob
    job_id: str = ""
    request_id: str = ""  # the attempt's name in the engine, which knows no attempts
    claimed_at: float = field(default_factory=time.monotonic)
    expires_at: float = inf  # monotonic seconds
    expiry_reason: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    model: ModelInfo | None = None  # set: the attempt event goes with the first output
    model_name: str = ""
    choices: list[Choice] = field(default_factory=lambda: [Choice(0)])
    reset: bool = False  # the attempt event is followed by one that takes earlier tokens back
    placed: bool = False  # the engine was given its rows
    ending: Ending | None = None
    seq: int = 0  # last one handed to Redis, committed or in flight
    first_token_ms: int = 0
    committed_at: float = 0.0  # monotonic seconds of the last commit
    proven: bool = False  # the engine has survived this attempt for a while
    resumed_at: int = 0  # how many tokens earlier attempts decoded
    decoded: int = 0  # how many this one did
    unsent: int = 0  # how many of them no flush has taken
    began: bool = False  # whether its first one was counted
    running_since: float = 0.0  # monotonic seconds of this attempt's first token
    trace_id: str = ""  # of the job's traceparent, once it is read
    spell: Spell = unspelled  # of its model

    def __post_init__(self) -> None:
        """Start at what is committed, and fix when the job's time is over."""
        self.job_id, self.request_id = self.claimed.job_id, self.claimed.attempt.name
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
    def tag(self) -> str:
        """What its events carry, see `Attempt.tag`."""
        return self.claimed.attempt.tag

    @property
    def lane(self) -> Lane:
        """Lane that it was claimed from."""
        return lane_of(self.claimed.queue)

    @property
    def over(self) -> bool:
        """Whether it is decided how the job ends."""
        return self.ending is not None

    @property
    def pending(self) -> bool:
        """Whether there is anything that Redis has not been sent."""
        return self.over or any(choice.pending for choice in self.choices)

    @property
    def completion_tokens(self) -> int:
        """Tokens decoded over all choices and attempts."""
        return sum(len(choice.token_ids) for choice in self.choices)

    @property
    def kept_tokens(self) -> int:
        """Tokens of earlier attempts that this one goes on after."""
        return 0 if self.reset else self.resumed_at

    @property
    def finish_reason(self) -> str | None:
        """Why choice 0 ended."""
        return self.choices[0].finish_reason

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
            "completion_tokens": self.completion_tokens, "resumed_tokens": self.resumed_at,
            "started_after_ms": claimed.started_ms - claimed.enqueued_ms,
            "first_token_after_ms": first, "ended_after_ms": self.age_ms,
            "attempt_ms": int((time.monotonic() - self.claimed_at) * 1000),
        }  # fmt: skip

    def returned(self, kv_tokens: int = 0, rows: int = 0) -> Returned:
        """Its row of a release, with what it needs if that is too much for this worker."""
        return Returned(self.claimed.attempt, kv_tokens, rows)

    def now_ms(self) -> int:
        """Redis TIME as far as this process knows it."""
        return self.claimed.now_ms + int((time.monotonic() - self.claimed_at) * 1000)

    def resume(self, committed: Committed) -> None:
        """Take over what earlier attempts committed."""
        self.expect(max(committed.choices, default=0) + 1)
        for index, choice in committed.choices.items():
            self.choices[index].resume(choice)
        self.resumed_at = self.completion_tokens

    def expect(self, count: int) -> None:
        """Have so many choices at least."""
        if len(self.choices) < count:
            self.choices += map(Choice, range(len(self.choices), count))

    def restart(self) -> None:
        """Take back what earlier attempts committed: decoding begins anew."""
        self.choices = [Choice(choice.index) for choice in self.choices]
        self.reset = True

    def conclude(self) -> bool:
        """End it if nothing is left to decode, because earlier attempts wrote all but the end.

        Returns whether that is so.
        """
        reasons = [choice.finish_reason for choice in self.choices]
        if FINISH_ERROR in reasons:
            message = "the row failed in an earlier attempt"
            self.end(JobState.FAILED, ErrorInfo(EngineError.code, message))
        elif all(reasons):
            self.end(JobState.FINISHED)
        return self.over

    def add(self, output: Output) -> bool:
        """Take a step's output; True if a consumer should not wait for it."""
        self.choices[output.choice].add(output)
        count = len(output.token_ids)
        self.decoded += count
        self.unsent += count
        self.prompt_tokens = output.prompt_tokens or self.prompt_tokens
        self.cached_tokens = output.cached_tokens or self.cached_tokens
        first = not self.first_token_ms and count > 0
        if first:
            self.first_token_ms = self.now_ms()
        if not output.finish_reason:
            much = self.unsent >= EVENT_TOKENS * len(self.choices) and self.claimed.stream
            return first or much
        if output.error is not None:
            self.end(JobState.FAILED, ErrorInfo(output.error.code, output.error.message))
        elif all(choice.finish_reason for choice in self.choices):
            self.end(JobState.FINISHED)
        return True

    def proves(self, now: float) -> bool:
        """Whether the attempt becomes proven now; True once. `now` is monotonic seconds."""
        if self.proven or self.decoded < PROVEN_TOKENS * len(self.choices):
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

    def rows(self, worker: str, *, rq_results: bool = False) -> list[CommitRow]:
        """Take what is pending as rows to commit, in order of seq.

        `rq_results`: a result is written a second time, for RQ.
        """
        rows = []
        if self.model is not None:
            rows.append(self._row(self._attempt_event(worker, self.model)))
            self.model = None
        if self.reset:
            event = events.reset_event(
                attempt=self.claimed.epoch, tag=self.tag, seq=self._next_seq()
            )
            rows.append(self._row(event))
            self.reset = False
        deltas = [choice.delta(self.spell) for choice in self.choices if choice.pending]
        self.unsent = 0
        if deltas:
            event = events.tokens_event(
                attempt=self.claimed.epoch, tag=self.tag, seq=self._next_seq(), choices=deltas
            )
            rows.append(self._row(event))
        if self.ending is not None:
            rows.append(self._end_row(self.ending, worker, rq_results=rq_results))
        return rows

    def _row(self, event: events.Event) -> CommitRow:
        claimed = self.claimed
        return CommitRow.of(claimed.attempt, event, publish=claimed.stream)

    def _next_seq(self) -> int:
        self.seq += 1
        return self.seq

    def _attempt_event(self, worker: str, model: ModelInfo) -> events.Event:
        return events.attempt_event(
            attempt=self.claimed.epoch, tag=self.tag, seq=self._next_seq(), worker=worker,
            model=self.model_name, model_revision=model.revision,
            tokenizer_hash=model.tokenizer_hash,
        )  # fmt: skip

    def _usage(self) -> Usage:
        return Usage.of(self.prompt_tokens, self.completion_tokens, self.cached_tokens)

    def _end_row(self, ending: Ending, worker: str, *, rq_results: bool) -> CommitRow:
        usage = self._usage()
        event = events.end_event(
            attempt=self.claimed.epoch, tag=self.tag, seq=self._next_seq(), state=ending.state,
            usage=usage, error=ending.error,
        )  # fmt: skip
        result = encode_result(self._result(ending, usage, worker))
        error = ending.error
        summary = f"{error.code}: {error.message}" if error else ""
        if ending.state is not JobState.FINISHED:  # for whoever looks with RQ's tools; it is short
            shown = rq_failure(summary)
        else:
            shown = rq_success(result) if rq_results else b""
        end = JobEnd(
            ending.state, result, shown,
            error.code if error else "", error.message if error else "",
        )  # fmt: skip
        return CommitRow.of(self.claimed.attempt, event, publish=self.claimed.stream, end=end)

    def _result(self, ending: Ending, usage: Usage, worker: str) -> GenerationResult:
        choices = [choice.result() for choice in self.choices]
        timings = Timings(
            enqueued_ms=self.claimed.enqueued_ms, started_ms=self.claimed.started_ms,
            first_token_ms=self.first_token_ms or None, finished_ms=self.now_ms(),
        )  # fmt: skip
        return GenerationResult(
            id=self.job_id, state=ending.state, choices=choices, usage=usage,
            error=ending.error, attempts=self.claimed.epoch, worker=worker, timings=timings,
        )  # fmt: skip
