"""The result record of a job: one form for finished, failed, cancelled and expired alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

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
    Usage,
    event_version,
)
from mlx_serving.common.states import JobState

if TYPE_CHECKING:
    from collections.abc import Iterable


class ChoiceResult(msgspec.Struct, omit_defaults=True, kw_only=True):
    """One choice in full; `finish_reason` is absent where it was cut short."""

    index: int
    text: str = msgspec.field(default_factory=str)
    token_ids: list[int] = []
    finish_reason: str | None = None
    logprobs: ChoiceLogprobs | None = None


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
        """Why choice 0 ended: "stop", "length", "error", or None where it was cut short."""
        return next((choice.finish_reason for choice in self.choices if choice.index == 0), None)

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
    forms = [d.logprobs for d in deltas if isinstance(d.logprobs, ChoiceLogprobs)]
    content = [entry for form in forms for entry in form.content]
    return ChoiceResult(
        index=index,
        text="".join(delta.text for delta in deltas),
        token_ids=[token for delta in deltas for token in delta.token_ids],
        finish_reason=next((d.finish_reason for d in reversed(deltas) if d.finish_reason), None),
        logprobs=ChoiceLogprobs(content) if content else None,
    )


def error_info(error: BaseException) -> ErrorInfo:
    """Name an error in a result: one of ours by its code, any other as `internal_error`.

    The text of a foreign exception may hold a prompt or an address, so it stays out.
    """
    if isinstance(error, MlxServingError):
        return ErrorInfo(error.code, str(error), error.retryable)
    return ErrorInfo("internal_error", type(error).__name__, retryable=True)
