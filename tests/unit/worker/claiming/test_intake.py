"""From a claim to a request: what earlier attempts committed, and who may not continue it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from mlx_serving.common import events, limits
from mlx_serving.common.errors import CorruptEvent, StreamGap
from mlx_serving.common.events import ChoiceDelta, ChoiceLogprobs, TokenLogprob
from mlx_serving.common.job.schema import GenerationJob
from mlx_serving.worker.claiming.intake import (
    JobRefusedError,
    build_request,
    can_continue,
    fit_context,
    open_payload,
    read_committed,
)
from mlx_serving.worker.delivery.choice import Committed, CommittedChoice
from mlx_serving.worker.engine.interface import ModelInfo, RequestChoice, SamplingParams
from tests.support.worker_fakes import MODEL, claim_of


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
    assert read_committed(stream(), 4) == Committed(
        {0: CommittedChoice((1, 2, 3), "a")}, "r1", "h1"
    )


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
    assert committed.of(0).finish_reason == "stop"
    assert can_continue(committed, ModelInfo("m", "r2", "h2", 9, frozenset()), job())


def other_model(*tail: events.Event) -> Committed:
    opened = events.attempt_event(
        attempt=4, seq=5, worker="w", model="m", model_revision="r2", tokenizer_hash="h1"
    )
    payloads = [*stream(), *map(events.encode, (opened, *tail))]
    return read_committed(payloads, len(payloads))


def test_tokens_before_a_reset_do_not_count() -> None:
    reset = events.reset_event(attempt=4, seq=6)
    assert other_model(reset) == Committed({}, "r1", "h1")
    anew = events.tokens_event(attempt=4, seq=7, choices=[ChoiceDelta(0, "b", [9])])
    assert other_model(reset, anew) == Committed({0: CommittedChoice((9,), "b")}, "r2", "h1")


def test_tokens_belong_to_the_model_that_wrote_them_not_to_the_attempt_opened_last() -> None:
    assert other_model() == Committed({0: CommittedChoice((1, 2, 3), "a")}, "r1", "h1")


@pytest.mark.parametrize(
    ("problem", "field"),
    [
        ("forbidden_field", "webhooks"),
        ("payload_too_large", "data"),
        ("corrupt_job", "data"),
        ("from_the_future", "x"),
    ],
)
def test_what_the_claim_found_wrong_is_refused_with_its_field(problem: str, field: str) -> None:
    with pytest.raises(JobRefusedError) as caught:
        open_payload(claim_of(problem=problem, problem_field=field), 100)
    assert caught.value.code == problem
    assert caught.value.message.startswith(f"{field}: ")


def test_a_request_carries_the_parameters_and_names_the_attempt() -> None:
    job = GenerationJob.build(
        model="tally", prompt="x", temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, seed=11,
        max_tokens=9, stop=["a", "b"],
    )  # fmt: skip
    committed = Committed({0: CommittedChoice((5, 6))})
    request = build_request(claim_of(epoch=4), job, committed, lambda _: (1, 2), MODEL)
    assert request.id == "a:4:0f"
    assert (request.prompt, request.choices[0].committed, request.max_tokens) == ((1, 2), (5, 6), 9)
    assert request.stop == ("a", "b")
    sampling = request.sampling
    assert sampling == SamplingParams(0.5, 0.9, 7, 0.1, 11)


@pytest.mark.parametrize(("tenant", "salt"), [(None, ""), ("acme", "acme")])
def test_a_request_shares_prefixes_with_its_own_tenant(tenant: str | None, salt: str) -> None:
    job = GenerationJob.build(model="tally", prompt="x", tenant=tenant)
    request = build_request(claim_of(), job, Committed(), lambda _: (1,), MODEL)
    assert request.salt == salt


def test_an_unresolved_seed_is_the_same_for_every_attempt() -> None:
    job = GenerationJob.build(model="tally", prompt="x")
    seeds = {
        build_request(claim_of(epoch=n), job, Committed(), lambda _: (1,), MODEL).sampling.seed
        for n in range(3)
    }
    other = build_request(claim_of("b"), job, Committed(), lambda _: (1,), MODEL)
    assert len(seeds) == 1
    assert other.sampling.seed not in seeds


def test_a_template_that_raises_fails_the_job_without_its_words() -> None:
    def encode(job: GenerationJob) -> tuple[int, ...]:
        raise KeyError(f"secret of {job.prompt}")

    job = GenerationJob.build(model="tally", prompt="x")
    with pytest.raises(JobRefusedError, match="KeyError") as caught:
        build_request(claim_of(), job, Committed(), encode, MODEL)
    assert "secret" not in str(caught.value)


# -- choices ----------------------------------------------------------------------------


def several() -> list[bytes]:
    """Three choices: 0 ended, 1 in the middle, 2 silent."""
    opened = {"worker": "w", "model": "m", "model_revision": "r1", "tokenizer_hash": "h1"}
    scored = ChoiceLogprobs([TokenLogprob("b", -1.0)])
    last = ChoiceDelta(0, "", [0], finish_reason="stop")
    told = [
        events.attempt_event(attempt=1, seq=1, **opened),
        events.tokens_event(
            attempt=1, seq=2,
            choices=[ChoiceDelta(0, "a", [1]), ChoiceDelta(1, "b", [2], logprobs=scored)],
        ),
        events.tokens_event(attempt=1, seq=3, choices=[last]),
    ]  # fmt: skip
    return [events.encode(event) for event in told]


def test_each_choice_is_read_by_itself() -> None:
    committed = read_committed(several(), 3)
    assert committed == Committed(
        {
            0: CommittedChoice((1, 0), "a", "stop"),
            1: CommittedChoice((2,), "b", None, (TokenLogprob("b", -1.0),)),
        },
        "r1",
        "h1",
    )
    assert committed.of(2) == CommittedChoice()
    assert (committed.ends(1), committed.ends(2), committed.has_tokens) == (True, False, True)


def test_a_model_that_changed_matters_while_any_choice_goes_on() -> None:
    committed = read_committed(several(), 3)
    changed = ModelInfo("m", "r2", "h1", 9, frozenset())
    assert can_continue(committed, changed, job(n=1))
    with pytest.raises(JobRefusedError):
        can_continue(committed, changed, job(n=2))


@pytest.mark.parametrize("index", [-1, limits.CHOICES, 10**9])
def test_a_choice_that_no_job_has_is_refused(index: int) -> None:
    told = events.tokens_event(attempt=1, seq=1, choices=[ChoiceDelta(index, "a", [1])])
    with pytest.raises(CorruptEvent, match="choice"):
        read_committed([events.encode(told)], 1)


def test_one_request_has_the_prompt_and_each_choice_its_own_tokens() -> None:
    committed = read_committed(several(), 3)
    request = build_request(claim_of(), job(n=3), committed, lambda _: (7, 8), MODEL)
    assert (request.id, request.prompt) == ("a:1:0f", (7, 8))
    assert request.choices == (RequestChoice(0, (1, 0)), RequestChoice(1, (2,)), RequestChoice(2))


def test_a_request_carries_penalties_biases_and_log_probabilities() -> None:
    asked = job(
        repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=-0.25, seed=1,
        logit_bias={"3": -100, "99": 2}, logprobs=True, top_logprobs=4,
    )  # fmt: skip
    request = build_request(claim_of(), asked, Committed(), lambda _: (1,), MODEL)
    assert request.sampling == SamplingParams(
        temperature=1.0, seed=1, repetition_penalty=1.5, presence_penalty=0.5,
        frequency_penalty=-0.25, logit_bias=((3, -100.0), (99, 2.0)), logprobs=4,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "asked"), [({}, None), ({"logprobs": True}, 0), ({"logprobs": False}, None)]
)
def test_log_probabilities_without_alternatives_are_the_chosen_tokens(
    fields: dict[str, Any], asked: int | None
) -> None:
    request = build_request(claim_of(), job(**fields), Committed(), lambda _: (1,), MODEL)
    assert request.sampling.logprobs == asked


def test_a_bias_on_a_token_that_the_model_lacks_is_refused_by_its_path() -> None:
    asked = job(logit_bias={"5": 1, "100": 1})
    with pytest.raises(JobRefusedError) as caught:
        build_request(claim_of(), asked, Committed(), lambda _: (1,), MODEL)
    assert caught.value.code == "token_out_of_vocabulary"
    assert caught.value.message.startswith("logit_bias.100: ")


# -- context length ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt_tokens", "asked", "expected"),
    [(10, 90, 90), (99, 1, 1), (10, None, 90), (99, None, 1)],
    ids=["fits", "to the last token", "what is left", "one is left"],
)
def test_an_answer_fits_the_context(prompt_tokens: int, asked: int | None, expected: int) -> None:
    assert fit_context(job(max_tokens=asked), prompt_tokens, 100) == expected


@pytest.mark.parametrize(
    ("prompt_tokens", "asked", "reason"),
    [
        (100, None, "prompt: is 100 tokens long, and the model's context has 100"),
        (9500, 20, "prompt: is 9500 tokens long, and the model's context has 100"),
        (11, 90, ("max_tokens: the prompt's 11 tokens and 90 for the answer are 101, "
                  "and the model's context has 100")),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_context_is_refused_with_both_numbers(
    prompt_tokens: int, asked: int | None, reason: str
) -> None:
    model = dataclasses.replace(MODEL, context_length=100)
    with pytest.raises(JobRefusedError) as caught:
        build_request(claim_of(), job(max_tokens=asked), Committed(),
                      lambda _: (1,) * prompt_tokens, model)  # fmt: skip
    assert (caught.value.code, caught.value.message) == ("context_length_exceeded", reason)


def test_a_conversation_that_is_too_long_is_named() -> None:
    asked = GenerationJob.build(model="m", messages=[{"role": "user", "content": "x"}])
    with pytest.raises(JobRefusedError, match=r"^messages: is 7 tokens long"):
        fit_context(asked, 7, 5)


def test_a_model_that_names_no_context_has_no_limit() -> None:
    assert fit_context(job(max_tokens=20_000), 1_000_000, None) == 20_000
