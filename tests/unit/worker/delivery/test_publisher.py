"""The publisher with a protocol without Redis: what is sent when, and what an answer leads to."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest
import redis

from mlx_serving.common.protocol.calls import RowReply
from mlx_serving.worker.delivery.holdings import BULK_SECONDS
from mlx_serving.worker.engine.interface import Output, RowError
from tests.support.helpers import wait_until
from tests.support.publisher_bench import FLUSH, Bench
from tests.support.worker_fakes import held, output

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def bench() -> Iterator[Bench]:
    with Bench() as bench:
        yield bench


def test_the_first_token_goes_at_once_and_the_next_ones_together(bench: Bench) -> None:
    job = held()
    bench.hold(job)
    started = time.monotonic()
    bench.publisher.push([output(job, [1], "1")])
    bench.wait_for("attempt", "tokens")
    assert time.monotonic() - started < FLUSH
    for token in range(2, 5):
        bench.publisher.push([output(job, [token], f" {token}")])
    bench.wait_for("attempt", "tokens", "tokens")
    last = bench.protocol.events[-1].choices[0]
    assert (last.token_ids, last.text) == ([2, 3, 4], " 2 3 4")
    assert [event.seq for event in bench.protocol.events] == [1, 2, 3]


def test_all_rows_of_a_step_are_one_call(bench: Bench) -> None:
    jobs = [held(f"j{n}") for n in range(64)]
    bench.hold(*jobs)
    bench.publisher.push([output(job, [1], "1") for job in jobs])
    wait_until(lambda: len(bench.protocol.events) == 128)
    assert len(bench.protocol.sent) == 1


def test_choices_share_an_event_and_the_last_one_ends_the_job(bench: Bench) -> None:
    job = held(choices=3)
    bench.hold(job)
    bench.publisher.push([output(job, [1], "1", None, n) for n in range(3)])
    bench.wait_for("attempt", "tokens")
    assert [c.index for c in bench.protocol.events[1].choices] == [0, 1, 2]
    bench.publisher.push([output(job, [0], "", "stop", 1)])
    bench.wait_for("attempt", "tokens", "tokens")
    assert bench.gone == []
    bench.publisher.push([output(job, [2], " 2", "length", n) for n in (0, 2)])
    bench.wait_for("attempt", "tokens", "tokens", "tokens", "end")
    wait_until(lambda: not bench.publisher.held())
    assert (bench.gone, bench.publisher.backlog) == ([], 0)  # the engine ended its rows itself


def test_a_choice_that_fails_ends_the_job_and_stops_the_others_at_once(bench: Bench) -> None:
    job = held(choices=2)
    bench.hold(job)
    bench.protocol.gate.clear()  # also while Redis does not answer
    failed = Output(job.request_id, 1, [], "", "error", RowError("nan_logits", "not finite"))
    bench.publisher.push([output(job, [1], "1"), failed])
    assert bench.gone == [job.request_id]
    bench.publisher.push([output(job, [2], " 2")])
    bench.protocol.gate.set()
    bench.wait_for("attempt", "tokens", "end")
    end = bench.protocol.events[-1]
    assert end.error is not None
    assert (end.state, end.error.code) == ("failed", "nan_logits")


def test_an_end_goes_at_once_after_its_last_tokens(bench: Bench) -> None:
    job = held()
    bench.hold(job)
    bench.publisher.push([output(job, [1, 2], "1 2", "stop")])
    bench.wait_for("attempt", "tokens", "end")
    tokens, end = bench.protocol.events[1:]
    assert tokens.choices[0].finish_reason == "stop"
    assert end.usage is not None
    assert (end.state, end.usage.completion_tokens) == ("finished", 2)
    wait_until(lambda: not bench.publisher.held())
    assert (bench.gone, bench.publisher.backlog) == ([], 0)


def test_a_job_without_stream_waits_for_16_tokens_and_publishes_only_its_begin(
    bench: Bench,
) -> None:
    job = held(stream=False)
    bench.hold(job)
    bench.publisher.push([output(job, [0])])
    bench.wait_for("attempt", "tokens")
    for token in range(1, 16):
        bench.publisher.push([output(job, [token])])
    time.sleep(2 * FLUSH)  # nothing may happen: it has 15 tokens
    assert len(bench.protocol.commits) == 1
    bench.publisher.push([output(job, [16])])
    bench.wait_for("attempt", "tokens", "tokens")
    assert len(bench.protocol.events[-1].choices[0].token_ids) == 16
    published = [e.type for commit in bench.protocol.commits for _, e, publish in commit if publish]
    assert published == ["attempt"]


def test_a_job_without_stream_waits_for_16_tokens_a_choice(bench: Bench) -> None:
    job = held(stream=False, choices=2)
    bench.hold(job)
    bench.publisher.push([output(job, [0])])
    bench.wait_for("attempt", "tokens")
    started = time.monotonic()
    for token in range(31):
        bench.publisher.push([output(job, [token], choice=token % 2)])
    time.sleep(1.5 * FLUSH)
    assert len(bench.protocol.commits) == 1 or time.monotonic() - started > BULK_SECONDS
    bench.publisher.push([output(job, [31], choice=1)])
    bench.wait_for("attempt", "tokens", "tokens")
    assert [len(c.token_ids) for c in bench.protocol.events[-1].choices] == [16, 16]


@pytest.mark.quiet
def test_a_job_without_stream_waits_no_longer_than_half_a_second(bench: Bench) -> None:
    job = held(stream=False)
    bench.hold(job)
    bench.publisher.push([output(job, [0])])
    bench.wait_for("attempt", "tokens")
    first = time.monotonic()
    bench.publisher.push([output(job, [1])])
    bench.wait_for("attempt", "tokens", "tokens")
    assert BULK_SECONDS - 0.05 <= time.monotonic() - first < BULK_SECONDS + 0.3


def test_a_fault_sends_the_very_same_rows_again(bench: Bench) -> None:
    job = held()
    bench.hold(job)
    bench.protocol.faults = [redis.ConnectionError("lost"), redis.TimeoutError("lost")]
    bench.publisher.push([output(job, [1], "1")])
    wait_until(lambda: bench.publisher.failing)
    bench.publisher.push([output(job, [2], " 2")])
    bench.wait_for("attempt", "tokens", "tokens")
    assert bench.protocol.sent[0] == bench.protocol.sent[1] == bench.protocol.sent[2]
    assert [e.choices[0].token_ids for e in bench.protocol.events[1:]] == [[1], [2]]
    assert not bench.publisher.failing


def test_a_resend_that_is_answered_dup_goes_on(bench: Bench) -> None:
    job = held()
    bench.hold(job)
    bench.protocol.answers["a"] = RowReply("DUP")
    bench.publisher.push([output(job, [1], "1", "stop")])
    wait_until(lambda: not bench.publisher.held())
    assert bench.publisher.fenced == 0


def test_a_full_redis_is_waited_for(bench: Bench) -> None:
    job, other = held(), held("b")
    bench.hold(job, other)
    bench.protocol.answers["a"] = RowReply("ERROR", "OOM command not allowed")
    bench.publisher.push([output(job, [1], "1"), output(other, [1], "1")])
    wait_until(lambda: len(bench.protocol.sent) >= 3)
    assert {row.job_id for row in bench.protocol.sent[-1]} == {"a"}
    bench.protocol.answers.clear()
    wait_until(lambda: not bench.publisher.failing)
    assert (bench.gone, bench.publisher.fenced) == ([], 0)


def test_the_gap_after_a_refused_row_is_no_loss(bench: Bench) -> None:
    job = held()
    bench.hold(job)
    full = RowReply("ERROR", "OOM command not allowed")
    bench.protocol.row_answers = {("a", 1): full, ("a", 2): RowReply("GAP")}
    bench.publisher.push([output(job, [1], "1")])
    wait_until(lambda: len(bench.protocol.sent) >= 3)
    assert bench.protocol.sent[0] == bench.protocol.sent[1]
    assert [row.seq for row in bench.protocol.sent[0]] == [1, 2]
    bench.protocol.row_answers = {}
    wait_until(lambda: not bench.publisher.failing)
    assert ([held.job_id for held in bench.publisher.held()], bench.gone) == (["a"], [])
    assert bench.publisher.fenced == 0


@pytest.mark.parametrize("status", ["FENCED", "GAP", "ERROR"])
def test_a_lost_job_is_dropped_and_aborted_and_its_batch_mate_goes_on(
    bench: Bench, status: str
) -> None:
    job, mate = held(), held("b")
    bench.hold(job, mate)
    bench.protocol.answers["a"] = RowReply(status, "WRONGTYPE")  # type: ignore[arg-type]
    bench.publisher.push([output(job, [1], "1"), output(mate, [1], "1")])
    wait_until(lambda: bench.gone == [job.request_id])
    before = len(bench.protocol.sent)
    bench.publisher.push([output(job, [2], "2"), output(mate, [2], "2", "stop")])
    wait_until(lambda: not bench.publisher.held())
    assert bench.gone == [job.request_id]
    assert {row.job_id for sent in bench.protocol.sent[before:] for row in sent} == {"b"}
    assert (bench.publisher.fenced, bench.publisher.backlog) == (1, 0)


@pytest.mark.parametrize("again", [{"epoch": 2}, {"nonce": "1f"}])
def test_the_answer_to_an_old_attempt_does_not_touch_the_new_one(
    bench: Bench, again: dict[str, Any]
) -> None:
    old, new = held(), held(**again)
    bench.hold(old)
    bench.protocol.gate.clear()
    bench.protocol.answers["a"] = RowReply("FENCED")
    bench.publisher.push([output(old, [1], "1")])
    wait_until(lambda: not bench.publisher.pending)
    bench.hold(new)
    bench.protocol.gate.set()
    wait_until(lambda: len(bench.protocol.sent) >= 1 and bench.gone)
    bench.protocol.answers.clear()
    bench.publisher.push([output(old, [2], "2"), output(new, [1], "1", "stop")])
    wait_until(lambda: not bench.publisher.held())
    assert bench.gone == [old.request_id]
    nonce = new.claimed.attempt.nonce
    (rows,) = [sent for sent in bench.protocol.sent if sent[0].nonce == nonce][-1:]
    assert {row[:3] for row in rows} == {("a", str(new.claimed.epoch), nonce)}
    tokens = [e for _, e, _ in bench.protocol.commits[-1] if e.type == "tokens"]
    assert [e.choices[0].token_ids for e in tokens] == [[1]]


@pytest.mark.parametrize(
    ("reason", "state"),
    [("because", "cancelled"), ("timeout", "expired"), ("abandoned", "expired")],
)
def test_a_reason_in_an_answer_ends_the_job(bench: Bench, reason: str, state: str) -> None:
    job = held()
    bench.hold(job)
    bench.protocol.answers["a"] = RowReply("OK", reason)
    bench.publisher.push([output(job, [1], "1")])
    bench.wait_for("attempt", "tokens", "end")
    end = bench.protocol.events[-1]
    assert end.error is not None
    assert (end.state, end.error.message) == (state, reason)
    assert bench.gone[0] == job.request_id


def test_a_job_over_its_time_ends_by_this_process_clock(bench: Bench) -> None:
    bench.hold(held(timeout_ms=30))
    wait_until(lambda: bench.types()[-1:] == ["end"])
    assert bench.protocol.events[-1].state == "expired"


def test_each_job_ends_when_its_own_time_is_over(bench: Bench) -> None:
    bench.hold(held("late", timeout_ms=120), held("never"))
    bench.hold(held("soon", timeout_ms=30))
    wait_until(lambda: [job.job_id for job in bench.publisher.held()] == ["never"])
    assert [e.state for e in bench.protocol.events if e.type == "end"] == ["expired"] * 2
    bench.hold(held("last", timeout_ms=10))
    wait_until(lambda: [job.job_id for job in bench.publisher.held()] == ["never"])


def test_the_backlog_counts_what_no_flush_took(bench: Bench) -> None:
    job = held()
    bench.hold(job)
    bench.protocol.gate.clear()
    bench.publisher.push([output(job, [1], "1")])
    wait_until(lambda: bench.publisher.backlog == 0)
    for token in range(2, 12):
        bench.publisher.push([output(job, [token], "x")])
    assert bench.publisher.backlog == 10
    bench.protocol.gate.set()
    wait_until(lambda: bench.publisher.backlog == 0)


def test_a_job_that_is_let_go_leaves_the_backlog(bench: Bench) -> None:
    job, other = held(stream=False), held("b", stream=False)
    bench.hold(job, other)
    bench.publisher.push([output(job, [0]), output(other, [0])])
    bench.wait_for("attempt", "tokens", "attempt", "tokens")
    bench.protocol.gate.clear()
    bench.publisher.push([output(job, [1, 2, 3]), output(other, [1, 2])])
    assert len(bench.publisher.held()) == 2  # they have their tokens now
    bench.publisher.let_go([job])
    assert bench.publisher.backlog == 2
    bench.publisher.push([output(job, [4])])  # of a step that was under way
    bench.publisher.held()
    assert bench.publisher.backlog == 2


def test_push_never_waits_for_redis(bench: Bench) -> None:
    job = held()
    bench.hold(job)
    bench.protocol.gate.clear()
    bench.publisher.push([output(job, [1], "1")])
    wait_until(lambda: bench.publisher.backlog == 0)
    started = time.monotonic()
    for token in range(1000):
        bench.publisher.push([output(job, [token], "x")])
    assert time.monotonic() - started < 0.5


def test_a_drain_writes_what_waits(bench: Bench) -> None:
    job = held(stream=False)
    bench.hold(job)
    bench.publisher.push([output(job, [0])])
    bench.wait_for("attempt", "tokens")
    bench.publisher.push([output(job, [1])])
    assert bench.publisher.drain(2)
    assert bench.protocol.events[-1].choices[0].token_ids == [1]
    bench.publisher.let_go([job])
    assert bench.publisher.held() == []
