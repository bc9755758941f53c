"""The result record of a job, in one form for every end; the errors of jobs that did not finish."""

from __future__ import annotations

# ruff: noqa: N818 -- the errors are named as what happened, as in `errors`
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import msgspec

from mlx_serving.common.errors import CorruptJob, MlxServingError
from mlx_serving.common.events import (
    END,
    RESET,
    ChoiceDelta,
    ChoiceLogprobs,
    ErrorInfo,
    Event,
    ToolCallDelta,
    Usage,
    event_version,
)
from mlx_serving.common.states import JobState

if TYPE_CHECKING:
    from collections.abc import Iterable


class FunctionResult(msgspec.Struct, frozen=True):
    """The function that a call names, and its arguments as JSON text."""

    name: str
    arguments: str


class ToolCallResult(msgspec.Struct, frozen=True):
    """A tool call in full, as the next turn's assistant message takes it."""

    id: str
    type: str
    function: FunctionResult


class ChoiceResult(msgspec.Struct, omit_defaults=True, kw_only=True):
    """One choice in full; `finish_reason` is None if it was cut short."""

    index: int
    text: str = msgspec.field(default_factory=str)
    token_ids: list[int] = []
    finish_reason: str | None = None
    logprobs: ChoiceLogprobs | None = None
    tool_calls: list[ToolCallResult] | None = None
    reasoning: str | None = None


class Timings(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """Milliseconds since the epoch by Redis `TIME`; None for what never happened."""

    enqueued_ms: int | None = None
    started_ms: int | None = None
    first_token_ms: int | None = None
    finished_ms: int | None = None


class GenerationResult(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What a job ended with; the text generated so far is kept in every state."""

    v: int = msgspec.field(default_factory=event_version)
    id: str
    state: JobState
    choices: list[ChoiceResult] = msgspec.field(default_factory=list)
    usage: Usage | None = None
    error: ErrorInfo | None = None
    attempts: int = msgspec.field(default_factory=int)
    worker: str | None = None
    timings: Timings = msgspec.field(default_factory=Timings)

    @property
    def text(self) -> str:
        """Text of choice 0; empty if nothing was generated."""
        return next((choice.text for choice in self.choices if choice.index == 0), "")

    @property
    def token_ids(self) -> list[int]:
        """Token ids of choice 0, every decoded one."""
        return next((choice.token_ids for choice in self.choices if choice.index == 0), [])

    @property
    def finish_reason(self) -> str | None:
        """Why choice 0 ended: "stop", "length", "tool_calls", "error"; None if it was cut short."""
        return next((choice.finish_reason for choice in self.choices if choice.index == 0), None)

    @property
    def tool_calls(self) -> list[ToolCallResult]:
        """Tool calls of choice 0."""
        return next((c.tool_calls or [] for c in self.choices if c.index == 0), [])

    @property
    def message(self) -> dict[str, Any]:
        """Choice 0, with its tool calls, as the assistant message of the next turn."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.tool_calls:
            message["tool_calls"] = msgspec.to_builtins(self.tool_calls)
        return message

    def raise_for_state(self) -> GenerationResult:
        """Return itself if the job finished.

        Raises JobFailed, JobDead, JobCancelled or JobExpired, each with this result.
        """
        if self.state is JobState.FINISHED:
            return self
        kind = ERROR_OF_STATE.get(self.state, UnsuccessfulJob)
        why = (self.error.code, self.error.message) if self.error else ()
        # Each word once: the code of a cancelled job is its state, that of an expired one its why.
        said = ": ".join(dict.fromkeys((self.state.value, *why)))
        message = f"job {self.id} is {said}"
        raise kind(message, result=self)


class _WithResult(Exception):
    """Base of errors that carry the job's result record, None if there is none."""

    message: str

    def __init__(
        self, message: str | None = None, *, result: GenerationResult | None = None
    ) -> None:
        self.result = result
        super().__init__(message)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle with the result, which `Exception` would leave out."""
        return partial(type(self), self.message, result=self.result), ()


class UnsuccessfulJob(_WithResult, MlxServingError):
    """The job ended without finishing; `.result` keeps the text generated so far."""

    code = "job_unsuccessful"


class JobFailed(UnsuccessfulJob):
    """The job failed."""

    code = "job_failed"


class JobDead(JobFailed):
    """The job was given up, because it crashes the engine or used up its attempts."""

    code = "job_dead"


class JobCancelled(UnsuccessfulJob):
    """The job was cancelled."""

    code = "job_cancelled"


class JobExpired(UnsuccessfulJob):
    """The job passed its deadline, its timeout, or the time that somebody listened."""

    code = "job_expired"


class EventsGone(_WithResult, MlxServingError):
    """The job ended so long ago that its events are gone; `.result` has all of the output."""

    code = "events_gone"


ERROR_OF_STATE: Final[dict[JobState, type[UnsuccessfulJob]]] = {
    JobState.FAILED: JobFailed,
    JobState.DEAD: JobDead,
    JobState.CANCELLED: JobCancelled,
    JobState.EXPIRED: JobExpired,
}

_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(GenerationResult)


def encode_result(result: GenerationResult) -> bytes:
    """Compact JSON of a result, absent fields omitted."""
    return _encoder.encode(result)


def decode_result(data: bytes | str) -> GenerationResult:
    """Parse a result; fields that are not known are ignored. Raises CorruptJob."""
    try:
        return _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise CorruptJob("the job's result record can't be read") from None


def assemble(
    job_id: str,
    events: Iterable[Event],
    *,
    state: JobState | None = None,
    usage: Usage | None = None,
    error: ErrorInfo | None = None,
    timings: Timings | None = None,
) -> GenerationResult:
    """Build a job's result from its events, in order of seq; a reset drops what came before it.

    State, usage and error come from the `end` event. The arguments are for jobs without one: a
    job cancelled while queued, or a job whose end the worker is just about to write.
    """
    deltas: dict[int, list[ChoiceDelta]] = {}
    attempts, worker = 0, None
    for event in events:
        attempts, worker = max(attempts, event.attempt), event.worker or worker
        if event.type == RESET:
            deltas.clear()
        for delta in event.choices:
            deltas.setdefault(delta.index, []).append(delta)
        if event.type == END:
            state = JobState(event.state) if event.state else state
            usage, error = event.usage or usage, event.error or error
    return GenerationResult(
        id=job_id,
        state=state or JobState.RUNNING,
        choices=[_joined(index, deltas[index]) for index in sorted(deltas)],
        usage=usage,
        error=error,
        attempts=attempts,
        worker=worker,
        timings=timings or Timings(),
    )


def _joined(index: int, deltas: list[ChoiceDelta]) -> ChoiceResult:
    """Build one choice from its deltas."""
    forms = [d.logprobs for d in deltas if d.logprobs is not None]
    content = [entry for form in forms for entry in form.content]
    return ChoiceResult(
        index=index,
        text="".join(delta.text for delta in deltas),
        token_ids=[token for delta in deltas for token in delta.token_ids],
        finish_reason=next((d.finish_reason for d in reversed(deltas) if d.finish_reason), None),
        logprobs=ChoiceLogprobs(content) if content else None,
        tool_calls=joined_calls([part for delta in deltas for part in delta.tool_calls or ()]),
        reasoning="".join(delta.reasoning or "" for delta in deltas) or None,
    )


def joined_calls(parts: Iterable[ToolCallDelta]) -> list[ToolCallResult] | None:
    """Build tool calls from their parts, in order of index; None if there are none."""
    calls: dict[int, list[ToolCallDelta]] = {}
    for part in parts:
        calls.setdefault(part.index, []).append(part)
    return [_joined_call(calls[index]) for index in sorted(calls)] or None


def _joined_call(parts: list[ToolCallDelta]) -> ToolCallResult:
    functions = [part.function for part in parts if part.function is not None]
    return ToolCallResult(
        id=next((part.id for part in parts if part.id), ""),
        type=next((part.type for part in parts if part.type), "function"),
        function=FunctionResult(
            next((function.name for function in functions if function.name), ""),
            "".join(function.arguments for function in functions),
        ),
    )


def error_info(error: BaseException) -> ErrorInfo:
    """Name an error in a result: one of ours by its code, any other as `internal_error`.

    The text of a foreign exception may hold a prompt or an address, so it stays out.
    """
    if isinstance(error, MlxServingError):
        return ErrorInfo(error.code, str(error), error.retryable)
    return ErrorInfo("internal_error", type(error).__name__, retryable=True)
