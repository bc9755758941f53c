"""A held job: its rows in order of seq, its ends, and its time by Redis's clock."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from mlx_serving.common import events, results
from mlx_serving.common.events import TokenLogprob
from mlx_serving.common.protocol import calls
from mlx_serving.common.states import JobState
from mlx_serving.worker.delivery.choice import Committed, CommittedChoice
from mlx_serving.worker.delivery.held import HeldJob
from mlx_serving.worker.engine.interface import Output, RowError, TokenLogprobs
from tests.support.worker_fakes import claim_of, commit_rows, held, output, payload_of

if TYPE_CHECKING:
    from mlx_serving.common.protocol.calls import CommitRow


def decoded(rows: list[CommitRow]) -> list[events.Event]:
    sent = commit_rows(calls.commit("w1", rows, lease_ms=1))
    return [events.decode(payload_of(row)) for row in sent]


def end_of(row: CommitRow) -> calls.JobEnd:
    assert row.end is not None
    return row.end


def result(row: CommitRow) -> results.GenerationResult:
    return results.decode_result(end_of(row).result)


def test_rows_are_attempt_tokens_end_in_order_of_seq() -> None:
    job = held()
    assert job.add(output(job, [1], "1"))
    assert not job.add(output(job, [2], " 2"))
    first = job.rows("w1")
    assert job.add(output(job, [0], "", "stop"))
    rows = [*first, *job.rows("w1")]
    told = decoded(rows)
    assert [(e.seq, e.type) for e in told] == [
        (1, "attempt"),
        (2, "tokens"),
        (3, "tokens"),
        (4, "end"),
    ]
    assert (told[0].start_seq, told[0].worker, told[0].model_revision) == (1, "w1", "r1")
    assert told[1].choices[0].token_ids == [1, 2]
    assert (told[2].choices[0].finish_reason, told[2].choices[0].token_ids) == ("stop", [0])
    whole = result(rows[-1])
    assert (whole.text, whole.token_ids, whole.finish_reason) == ("1 2", [1, 2, 0], "stop")
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (3, 3)


def test_nothing_pending_gives_no_rows() -> None:
    job = held()
    job.add(output(job, [1], "1"))
    job.rows("w1")
    assert (job.rows("w1"), job.pending) == ([], False)


def test_a_resumed_job_goes_on_at_seq_and_its_result_holds_everything() -> None:
    job = held(seq=4, epoch=2, first_token_ms=1)
    job.resume(Committed({0: CommittedChoice((1, 2), "1 2")}))
    assert not job.add(output(job, [3], " 3"))  # not the first token of the job
    job.add(output(job, [4], " 4", "length"))
    rows = job.rows("w2")
    assert [e.seq for e in decoded(rows)] == [5, 6, 7]
    assert decoded(rows)[1].choices[0].token_ids == [3, 4]
    whole = result(rows[-1])
    assert (whole.text, whole.token_ids, whole.attempts) == ("1 2 3 4", [1, 2, 3, 4], 2)


@pytest.mark.parametrize(
    ("reason", "state", "code"),
    [
        ("anything", JobState.CANCELLED, "cancelled"),
        ("deleted", JobState.CANCELLED, "cancelled"),
        ("deadline_exceeded", JobState.EXPIRED, "deadline_exceeded"),
        ("timeout", JobState.EXPIRED, "timeout"),
        ("abandoned", JobState.EXPIRED, "abandoned"),
    ],
)
def test_a_cancel_keeps_the_text_and_says_why(reason: str, state: JobState, code: str) -> None:
    job = held()
    job.add(output(job, [1], "1"))
    job.cancel(reason)
    rows = job.rows("w1")
    end = end_of(rows[-1])
    assert (end.state, end.error_code, end.message) == (state, code, reason)
    assert result(rows[-1]).text == "1"
    assert decoded(rows)[-2].choices[0].finish_reason is None


def test_the_first_decision_stands() -> None:
    job = held()
    job.add(output(job, [1], "1", "stop"))
    job.cancel("too late")
    assert end_of(job.rows("w1")[-1]).state is JobState.FINISHED


def test_a_failed_row_is_a_failed_job_with_its_code() -> None:
    job = held()
    failed = Output(job.request_id, 0, [], "", "error", RowError("nan_logits", "not finite"))
    assert job.add(failed)
    end = end_of(job.rows("w1")[-1])
    assert (end.state, end.error_code, end.message) == (JobState.FAILED, "nan_logits", "not finite")


@pytest.mark.parametrize(
    ("fields", "seconds", "reason"),
    [
        ({"deadline_ms": 5_000}, 3.0, "deadline_exceeded"),
        ({"timeout_ms": 4_000, "started_ms": 1_500}, 3.5, "timeout"),
        (
            {"timeout_ms": 4_000, "started_ms": 1_500, "deadline_ms": 3_000},
            1.0,
            "deadline_exceeded",
        ),
        ({"deadline_ms": 1_000}, -1.0, "deadline_exceeded"),
    ],
)
def test_its_time_ends_by_redis_time(fields: dict[str, Any], seconds: float, reason: str) -> None:
    job = HeldJob(claim_of(now_ms=2_000, **fields))
    assert job.expires_at - job.claimed_at == pytest.approx(seconds)
    assert job.expiry_reason == reason


def test_a_job_without_limits_has_all_time() -> None:
    assert HeldJob(claim_of()).expires_at == float("inf")


# -- choices ----------------------------------------------------------------------------


def test_a_job_ends_with_its_last_choice() -> None:
    job = held(choices=3)
    assert job.add(output(job, [1], "a", choice=2))
    assert not job.add(output(job, [2], "b"))
    told = decoded(job.rows("w1"))
    assert [(c.index, c.text) for c in told[1].choices] == [(0, "b"), (2, "a")]
    assert job.add(output(job, [0], "", "stop", 0))
    (told_end,) = decoded(job.rows("w1"))
    assert [(c.index, c.finish_reason) for c in told_end.choices] == [(0, "stop")]
    assert job.ending is None
    job.add(output(job, [3], "c", "length", 1))
    job.add(output(job, [4], "", "stop", 2))
    rows = job.rows("w1")
    assert [e.seq for e in decoded(rows)] == [4, 5]
    assert [c.index for c in decoded(rows)[0].choices] == [1, 2]  # choice 0 is not told again
    whole = result(rows[-1])
    assert [(c.text, c.token_ids, c.finish_reason) for c in whole.choices] == [
        ("b", [2, 0], "stop"),
        ("c", [3], "length"),
        ("a", [1, 4], "stop"),
    ]
    assert whole.state is JobState.FINISHED
    assert whole.usage == events.Usage.of(3, 5)


def test_a_failing_choice_fails_the_job_and_keeps_what_the_others_have() -> None:
    job = held(choices=2)
    job.add(output(job, [1], "1"))
    failed = Output(job.request_id, 1, [], "", "error", RowError("nan_logits", "not finite"))
    assert job.add(failed)
    rows = job.rows("w1")
    whole = result(rows[-1])
    assert (whole.state, end_of(rows[-1]).error_code) == (JobState.FAILED, "nan_logits")
    assert [(c.text, c.finish_reason) for c in whole.choices] == [("1", None), ("", "error")]


def test_choices_resume_each_from_its_own_tokens() -> None:
    job = held(choices=3, seq=4, epoch=2, first_token_ms=1)
    job.resume(
        Committed(
            {0: CommittedChoice((1, 0), "1", "stop"), 2: CommittedChoice((5,), "5")}, "r", "h"
        )
    )
    assert (job.resumed_at, job.completion_tokens, job.pending) == (3, 3, False)
    job.add(output(job, [6], " 6", "length", 2))
    job.add(output(job, [7], "7", "length", 1))
    rows = job.rows("w2")
    assert [e.seq for e in decoded(rows)] == [5, 6, 7]
    assert [(c.index, c.token_ids) for c in decoded(rows)[1].choices] == [(1, [7]), (2, [6])]
    assert [c.token_ids for c in result(rows[-1]).choices] == [[1, 0], [7], [5, 6]]
    assert result(rows[-1]).usage == events.Usage.of(3, 5)


@pytest.mark.parametrize(
    ("reasons", "state"),
    [
        (["stop", "length"], JobState.FINISHED),
        (["stop", "error"], JobState.FAILED),
        ([None, "error"], JobState.FAILED),
        (["stop", None], None),
        ([None, None], None),
    ],
)
def test_what_earlier_attempts_left_to_do(
    reasons: list[str | None], state: JobState | None
) -> None:
    job = held(choices=2, seq=3, epoch=2)
    told = {n: CommittedChoice((1,), "a", reason) for n, reason in enumerate(reasons)}
    job.resume(Committed(told))
    assert job.conclude() is (state is not None)
    rows = job.rows("w1")
    assert [row.end.state for row in rows if row.end] == ([state] if state else [])
    assert all(event.type != "tokens" for event in decoded(rows))


def test_a_job_is_proven_by_what_each_of_its_choices_decoded() -> None:
    job = held(choices=2)
    for token in range(63):
        job.add(output(job, [token], choice=token % 2))
    assert not job.proves(100.0)
    job.add(output(job, [63], choice=1))
    assert not job.proves(101.0)
    assert job.proves(102.0)


# -- log probabilities ------------------------------------------------------------------


def spell(token_id: int) -> bytes:
    return {1: b"a", 2: " é".encode(), 3: b"\xf0\x9f"}[token_id]


def scored(job: HeldJob, tokens: list[int], reason: str | None = None) -> Output:
    entries = [TokenLogprobs(t, -0.5, ((t, -0.5), (2, -1.25))) for t in tokens]
    return Output(job.request_id, 0, tokens, "", reason, prompt_tokens=3, logprobs=entries)


def test_log_probabilities_go_with_their_tokens_and_into_the_result() -> None:
    job = held()
    job.spell = spell
    job.resume(Committed({0: CommittedChoice((9,), "x", None, (TokenLogprob("x", -2.0),))}))
    job.add(scored(job, [1, 3]))
    first = decoded(job.rows("w1"))[1].choices[0]
    assert first.logprobs is not None
    assert [entry.raw for entry in first.logprobs.content] == [b"a", b"\xf0\x9f"]
    assert [t.token for t in first.logprobs.content[1].top_logprobs] == ["\ufffd", " é"]
    job.add(scored(job, [2], "stop"))
    rows = job.rows("w1")
    (choice,) = result(rows[-1]).choices
    assert choice.logprobs is not None
    assert [entry.token for entry in choice.logprobs.content] == ["x", "a", "\ufffd", " é"]
    assert len(choice.logprobs.content) == len(choice.token_ids)


def test_without_log_probabilities_an_event_is_as_small_as_ever() -> None:
    job = held()
    job.add(output(job, [1], "a"))
    *_, row = job.rows("w1")
    assert b"logprobs" not in row.body
