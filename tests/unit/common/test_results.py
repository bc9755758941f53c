"""The result record: put together from events, and turned into errors."""

from __future__ import annotations

import pytest

from mlx_serving.common.errors import CorruptJob, EngineError
from mlx_serving.common.events import (
    ChoiceDelta,
    ErrorInfo,
    Usage,
    attempt_event,
    end_event,
    tokens_event,
)
from mlx_serving.common.results import (
    ChoiceResult,
    GenerationResult,
    JobCancelled,
    JobDead,
    JobExpired,
    JobFailed,
    Timings,
    UnsuccessfulJob,
    assemble,
    decode_result,
    encode_result,
    error_info,
)
from mlx_serving.common.states import JobState


def opened(attempt: int, seq: int, worker: str) -> object:
    return attempt_event(
        attempt=attempt, seq=seq, worker=worker, model="m", model_revision="r", tokenizer_hash="h"
    )


EVENTS = [
    opened(1, 1, "first"),
    tokens_event(attempt=1, seq=2, choices=[ChoiceDelta(0, "3 ", [7]), ChoiceDelta(1, "x", [1])]),
    opened(2, 3, "second"),
    tokens_event(attempt=2, seq=4, choices=[ChoiceDelta(0, "4", [8, 2], finish_reason="stop")]),
    end_event(attempt=2, seq=5, state="finished", usage=Usage.of(5, 4)),
]


def test_events_of_all_attempts_and_choices_are_put_together() -> None:
    result = assemble("job", EVENTS, timings=Timings(enqueued_ms=1))  # type: ignore[arg-type]
    assert result.choices == [
        ChoiceResult(index=0, text="3 4", token_ids=[7, 8, 2], finish_reason="stop"),
        ChoiceResult(index=1, text="x", token_ids=[1]),
    ]
    assert (result.state, result.attempts, result.worker) == (JobState.FINISHED, 2, "second")
    assert (result.text, result.token_ids, result.finish_reason) == ("3 4", [7, 8, 2], "stop")
    assert result.usage == Usage.of(5, 4)
    assert result.timings.enqueued_ms == 1


def test_a_job_that_never_ran_has_an_empty_result() -> None:
    result = assemble("job", [], state=JobState.CANCELLED, error=ErrorInfo("cancelled", "by user"))
    assert (result.text, result.token_ids, result.finish_reason) == ("", [], None)
    assert (result.attempts, result.worker, result.error) == (
        0,
        None,
        ErrorInfo("cancelled", "by user"),
    )


def test_what_is_encoded_is_decoded_equal() -> None:
    result = assemble("job", EVENTS)  # type: ignore[arg-type]
    assert decode_result(encode_result(result)) == result


def test_unknown_fields_of_a_result_are_ignored() -> None:
    assert decode_result('{"id":"a","state":"dead","news":1}').state is JobState.DEAD


@pytest.mark.parametrize("data", [b"", b"{}", b'{"id":"a","state":"odd"}', b"\xff", "[" * 100_000])
def test_what_is_no_result_is_corrupt(data: bytes | str) -> None:
    with pytest.raises(CorruptJob):
        decode_result(data)


@pytest.mark.parametrize(
    ("state", "kind"),
    [
        (JobState.FAILED, JobFailed),
        (JobState.DEAD, JobDead),
        (JobState.CANCELLED, JobCancelled),
        (JobState.EXPIRED, JobExpired),
        (JobState.RUNNING, UnsuccessfulJob),
    ],
)
def test_other_ends_raise_their_error_with_the_result(
    state: JobState, kind: type[UnsuccessfulJob]
) -> None:
    result = GenerationResult(id="job", state=state, error=ErrorInfo("some_code", "a reason"))
    with pytest.raises(UnsuccessfulJob, match="some_code: a reason") as raised:
        result.raise_for_state()
    assert type(raised.value) is kind
    assert raised.value.result is result


def test_a_finished_result_is_returned() -> None:
    result = GenerationResult(id="job", state=JobState.FINISHED)
    assert result.raise_for_state() is result


def test_errors_are_named_by_code_and_foreign_ones_not_quoted() -> None:
    assert error_info(EngineError("oops")) == ErrorInfo("engine_error", "oops", retryable=True)
    named = error_info(KeyError("a prompt"))
    assert named == ErrorInfo("internal_error", "KeyError", retryable=True)


@pytest.mark.parametrize(
    ("state", "code", "reason", "said"),
    [
        (JobState.CANCELLED, "cancelled", "cancelled_by_client", "cancelled: cancelled_by_client"),
        (JobState.EXPIRED, "deadline", "deadline", "expired: deadline"),
        (JobState.FAILED, "engine_error", "it broke", "failed: engine_error: it broke"),
    ],
)
def test_why_a_job_ended_is_said_without_a_word_twice(
    state: JobState, code: str, reason: str, said: str
) -> None:
    result = GenerationResult(id="a", state=state, error=ErrorInfo(code, reason))
    with pytest.raises(UnsuccessfulJob, match=f"^job a is {said}$"):
        result.raise_for_state()
