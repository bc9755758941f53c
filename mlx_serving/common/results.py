"""The result record of a job: one form for finished, failed, cancelled and expired alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec

from mlx_serving.common.errors import (
    CorruptJob,
    JobCancelled,
    JobDead,
    JobExpired,
    JobFailed,
    MlxServingError,
    UnsuccessfulJob,
)
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
    """Which function a call names, and its arguments as a JSON text."""

    name: str
    arguments: str


class ToolCallResult(msgspec.Struct, frozen=True):
    """A tool call in full, as the next turn's assistant message takes it."""

    id: str
    type: str
    function: FunctionResult


class ChoiceResult(msgspec.Struct, omit_defaults=True, kw_only=True):
    """One choice in full; `finish_reason` is absent where it was cut short."""

    index: int
    text: str = msgspec.field(default_factory=str)
    token_ids: list[int] = []
    finish_reason: str | None = None
    logprobs: ChoiceLogprobs | None = None
    tool_calls: list[ToolCallResult] | None = None
    reasoning: str | None = None


class Timings(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """Milliseconds since the epoch by Redis `TIME`; None where that never came."""

    enqueued_ms: int | None = None
    started_ms: int | None = None
    first_token_ms: int | None = None
    finished_ms: int | None = None


class GenerationResult(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What a job ended with; whatever was generated is kept in every state."""

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
        """Text of choice 0, empty where nothing was generated."""
        return next((choice.text for choice in self.choices if choice.index == 0), "")

    @property
    def token_ids(self) -> list[int]:
        """Token ids of choice 0, every decoded one."""
        return next((choice.token_ids for choice in self.choices if choice.index == 0), [])

    @property
    def finish_reason(self) -> str | None:
        """Why choice 0 ended: "stop", "length", "tool_calls", "error"; None where cut short."""
        return next((choice.finish_reason for choice in self.choices if choice.index == 0), None)

    @property
    def tool_calls(self) -> list[ToolCallResult]:
        """Tool calls of choice 0."""
        return next((c.tool_calls or [] for c in self.choices if c.index == 0), [])

    @property
    def message(self) -> dict[str, Any]:
        """Choice 0 as the assistant message of a next turn, its tool calls included."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.tool_calls:
            message["tool_calls"] = msgspec.to_builtins(self.tool_calls)
        return message

    def raise_for_state(self) -> GenerationResult:
        """Return itself where the job finished.

        Raises JobFailed, JobDead, JobCancelled or JobExpired, each with this result.
        """
        if self.state is JobState.FINISHED:
            return self
        reason = f": {self.error.code}: {self.error.message}" if self.error else ""
        kind = ERROR_OF_STATE.get(self.state, UnsuccessfulJob)
        message = f"job {self.id} is {self.state.value}{reason}"
        raise kind(message, result=self)


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
    """Put a job's events, in order of seq, together to its result; a reset drops what was before.

    The `end` event gives state, usage and error; the arguments stand in where there is none
    (cancelled while queued, or the worker builds the record that the end event goes with).
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
    """One choice from all that it gained."""
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
    """Tool calls from their parts, in order of index; None without any."""
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
