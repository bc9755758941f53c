"""From a claim to a request: what earlier attempts committed, and who may not continue it."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_serving.common import events
from mlx_serving.common.errors import CorruptEvent, StreamGap
from mlx_serving.common.events import ChoiceDelta
from mlx_serving.common.jobs import GenerationJob
from mlx_serving.worker.engine.sequence import ModelInfo, SamplingParams
from mlx_serving.worker.held import Committed
from mlx_serving.worker.intake import (
    JobRefusedError,
    build_request,
    can_continue,
    open_payload,
    read_committed,
)
from tests.worker_fakes import MODEL, claim_of


def stream() -> list[bytes]:
    opened = {"worker": "w", "model": "m", "model_revision": "r1", "tokenizer_hash": "h1"}
    told = [
        events.attempt_event(attempt=1, seq=1, **opened),
        events.tokens_event(attempt=1, seq=2, choices=[ChoiceDelta(0, "a", [1, 2])]),
        events.attempt_event(attempt=3, seq=3, **opened),
        events.tokens_event(attempt=3, seq=4, choices=[ChoiceDelta(0, "", [3])]),
    ]
    return [events.encode(event) for event in told]


def test_tokens_of_all_attempts_are_put_together() -> None:
    assert read_committed(stream(), 4) == Committed((1, 2, 3), "a", "r1", "h1")


@pytest.mark.parametrize(
    "payloads", [stream()[:3], stream()[1:], [*stream()[:2], *stream()[1:3]], []]
)
def test_a_stream_with_a_gap_is_refused(payloads: list[bytes]) -> None:
    with pytest.raises(StreamGap):
        read_committed(payloads, 4)


def test_what_is_no_event_is_refused() -> None:
    with pytest.raises(CorruptEvent):
        read_committed([b"", *stream()[1:]], 4)


def job(**fields: Any) -> GenerationJob:
    return GenerationJob.build(model="tally", prompt="x", **fields)


@pytest.mark.parametrize(
    "changed",
    [ModelInfo("m", "r2", "h1", 9, frozenset()), ModelInfo("m", "r1", "h2", 9, frozenset())],
)
def test_another_revision_does_not_continue_its_tokens(changed: ModelInfo) -> None:
    committed = read_committed(stream(), 4)
    assert can_continue(committed, MODEL, job())
    with pytest.raises(JobRefusedError) as caught:
        can_continue(committed, changed, job())
    assert caught.value.code == "model_changed"
    assert can_continue(Committed(), changed, job())  # nothing to continue
    assert not can_continue(committed, changed, job(on_model_change="reset"))
    assert can_continue(committed, MODEL, job(on_model_change="reset"))


def test_where_only_the_end_is_missing_the_model_does_not_matter() -> None:
    last = events.tokens_event(attempt=3, seq=5, choices=[ChoiceDelta(0, finish_reason="stop")])
    committed = read_committed([*stream(), events.encode(last)], 5)
    assert committed.finish_reason == "stop"
    assert can_continue(committed, ModelInfo("m", "r2", "h2", 9, frozenset()), job())


def other_model(*tail: events.Event) -> Committed:
    opened = events.attempt_event(
        attempt=4, seq=5, worker="w", model="m", model_revision="r2", tokenizer_hash="h1"
    )
    payloads = [*stream(), *map(events.encode, (opened, *tail))]
    return read_committed(payloads, len(payloads))


def test_tokens_before_a_reset_do_not_count() -> None:
    reset = events.reset_event(attempt=4, seq=6)
    assert other_model(reset).token_ids == ()
    anew = events.tokens_event(attempt=4, seq=7, choices=[ChoiceDelta(0, "b", [9])])
    assert other_model(reset, anew) == Committed((9,), "b", "r2", "h1")


def test_tokens_belong_to_the_model_that_wrote_them_not_to_the_attempt_opened_last() -> None:
    assert other_model() == Committed((1, 2, 3), "a", "r1", "h1")


@pytest.mark.parametrize(
    ("problem", "code"),
    [
        ("forbidden_field:webhooks", "forbidden_field"),
        ("payload_too_large:data", "payload_too_large"),
        ("corrupt_job:data", "corrupt_job"),
        ("from_the_future:x", "from_the_future"),
    ],
)
def test_what_the_claim_found_wrong_is_refused_with_its_field(problem: str, code: str) -> None:
    with pytest.raises(JobRefusedError) as caught:
        open_payload(claim_of(problem=problem), 100)
    assert caught.value.code == code
    assert caught.value.message.startswith(problem.partition(":")[2] + ": ")


def test_a_request_carries_the_parameters_and_names_the_attempt() -> None:
    job = GenerationJob.build(
        model="tally", prompt="x", temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, seed=11,
        max_tokens=9, stop=["a", "b"],
    )  # fmt: skip
    request = build_request(claim_of(epoch=4), job, Committed((5, 6)), lambda _: (1, 2))
    assert request.id == "a:4"
    assert (request.prompt, request.committed, request.max_tokens) == ((1, 2), (5, 6), 9)
    assert request.stop == ("a", "b")
    sampling = request.sampling
    assert sampling == SamplingParams(0.5, 0.9, 7, 0.1, 11)


@pytest.mark.parametrize(("tenant", "salt"), [(None, ""), ("acme", "acme")])
def test_a_request_shares_prefixes_with_its_own_tenant(tenant: str | None, salt: str) -> None:
    job = GenerationJob.build(model="tally", prompt="x", tenant=tenant)
    assert build_request(claim_of(), job, Committed(), lambda _: (1,)).salt == salt


def test_an_unresolved_seed_is_the_same_for_every_attempt() -> None:
    job = GenerationJob.build(model="tally", prompt="x")
    seeds = {
        build_request(claim_of(epoch=n), job, Committed(), lambda _: (1,)).sampling.seed
        for n in range(3)
    }
    other = build_request(claim_of("b"), job, Committed(), lambda _: (1,)).sampling.seed
    assert len(seeds) == 1
    assert other not in seeds


def test_a_template_that_raises_fails_the_job_without_its_words() -> None:
    def encode(job: GenerationJob) -> tuple[int, ...]:
        raise KeyError(f"secret of {job.prompt}")

    job = GenerationJob.build(model="tally", prompt="x")
    with pytest.raises(JobRefusedError, match="KeyError") as caught:
        build_request(claim_of(), job, Committed(), encode)
    assert "secret" not in str(caught.value)
