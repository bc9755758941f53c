"""A held job: its rows in order of seq, its ends, and its time by Redis's clock."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from mlx_serving.common import events, results
from mlx_serving.common.states import JobState
from mlx_serving.worker.engine.sequence import Output, RowError
from mlx_serving.worker.held import Committed, HeldJob
from tests.worker_fakes import claim_of, held, output

if TYPE_CHECKING:
    from mlx_serving.common.calls import CommitRow


def decoded(rows: list[CommitRow]) -> list[events.Event]:
    return [events.decode(row.event) for row in rows]


def result(row: CommitRow) -> results.GenerationResult:
    return results.decode_result(row.result)


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
    job.resume(Committed((1, 2), "1 2"))
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
    assert (rows[-1].state, rows[-1].error_code, rows[-1].message) == (state, code, reason)
    assert result(rows[-1]).text == "1"
    assert decoded(rows)[-2].choices[0].finish_reason is None


def test_the_first_decision_stands() -> None:
    job = held()
    job.add(output(job, [1], "1", "stop"))
    job.cancel("too late")
    assert job.rows("w1")[-1].state is JobState.FINISHED


def test_a_failed_row_is_a_failed_job_with_its_code() -> None:
    job = held()
    failed = Output(job.request_id, 0, [], "", "error", RowError("nan_logits", "not finite"))
    assert job.add(failed)
    end = job.rows("w1")[-1]
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
