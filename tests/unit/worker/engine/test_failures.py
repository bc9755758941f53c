"""A failing row fails alone; an aborted one leaves no trace."""

from typing import Any, cast

import pytest
from msgspec.structs import replace

from benchmarks.lib.synthetic import TINY, build_model
from mlx_serving.common.queues import Lane
from mlx_serving.worker.engine.engine import Engine
from mlx_serving.worker.engine.interface import (
    Request,
    RequestChoice,
    RequestRefusedError,
    SamplingParams,
)
from mlx_serving.worker.engine.kv.paged import cache as cache_module
from mlx_serving.worker.engine.kv.paged.step import plain_step
from mlx_serving.worker.engine.row import Phase
from mlx_serving.worker.engine.sampling.sampler import BatchSampler
from tests.support.engine_support import (
    GREEDY,
    POISON,
    PoisonedModel,
    drive,
    greedy_by_mlx_lm,
    tiny_engine,
)

GOOD = [Request(f"good{n}", (n + 1, 5, 9), GREEDY, 12) for n in range(4)]


def assert_good_rows_are_right(collected: dict[str, Any], model: Any) -> None:
    for request in GOOD:
        expected = greedy_by_mlx_lm(model, request.prompt, request.max_tokens)
        assert collected[request.id].token_ids == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(1.0, top_p=0.9, seed=1)], ids=str)
def test_logits_that_are_not_finite_end_their_row_alone(
    value: float, sampling: SamplingParams
) -> None:
    model = PoisonedModel(value=value)
    poisoned = Request("bad", (3, 4, POISON), sampling, 12)
    collected = drive(tiny_engine(model), [*GOOD[:2], poisoned, *GOOD[2:]])
    assert collected["bad"].finish_reason == "error"
    assert collected["bad"].error_code == "nan_logits"
    assert collected["bad"].token_ids == []
    assert_good_rows_are_right(collected, model.model)


def test_an_exception_in_one_prompt_of_a_shared_prefill_ends_that_row_alone() -> None:
    model = PoisonedModel(raises=True)
    poisoned = Request("bad", (3, POISON, 4), GREEDY, 12)
    engine = tiny_engine(model)
    collected = drive(engine, [*GOOD[:2], poisoned, *GOOD[2:]])
    assert collected["bad"].error_code == "prefill_failed"
    assert_good_rows_are_right(collected, model.model)


@pytest.mark.parametrize("lane", ["interactive", "bulk"])
def test_an_exception_in_one_prompt_ends_no_row_of_another_lane_in_its_chunk(lane: Lane) -> None:
    model = PoisonedModel(raises=True)
    engine = tiny_engine(model, chunk=512)
    first = [replace(request, lane="interactive") for request in GOOD[:2]]
    riding = [replace(request, lane="bulk") for request in GOOD[2:4]]
    seen = watch_prefills(engine)
    poisoned = Request("bad", (3, POISON, 4), GREEDY, 12, lane=lane)
    collected = drive(engine, [*first, poisoned, *riding, *GOOD[4:]])
    assert collected["bad"].error_code == "prefill_failed"
    assert {"bad", *(request.id for request in (*first, *riding))} in seen, "one chunk for both"
    assert_good_rows_are_right(collected, model.model)


@pytest.mark.parametrize("first", [True, False], ids=["nothing decodes", "rows decode"])
def test_an_exception_in_one_prompt_of_a_decode_step_ends_that_row_alone(first: bool) -> None:  # noqa: FBT001 - parametrized
    model = PoisonedModel()
    engine = tiny_engine(cast("Any", model.model), paged=True)
    model.raises = True
    cache = cast("Any", engine._runner)._cache
    cast("Any", engine._runner)._model = cache._model = model
    cache._step = plain_step(cast("Any", model))
    seen = watch_prefills(engine)
    poisoned = Request("bad", (3, POISON, 4), GREEDY, 12)
    before = [] if first else GOOD[:2]
    for request in before:
        engine.add(request)
    for _ in range(3 if before else 0):
        assert all(output.error is None for output in engine.step())
    late = [request for request in GOOD if request not in before]
    collected = drive(engine, [late[0], poisoned, *late[1:]])
    assert {"bad", *(request.id for request in late)} in seen, "all in one step"
    assert collected["bad"].error_code == "prefill_failed"
    for request in late:
        expected = greedy_by_mlx_lm(model.model, request.prompt, request.max_tokens)
        assert collected[request.id].token_ids == expected


def test_a_step_that_can_not_be_planned_with_new_prompts_computes_them_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was to be computed of them is not computed into the rows that follow in their place."""
    engine = tiny_engine(paged=True)
    plan, failed = cast("Any", cache_module).make_plan, list[int]()

    def failing(batch: Any, contexts: Any, after: Any) -> Any:
        if contexts and not failed:
            failed.append(len(contexts))
            raise ValueError
        return plan(batch, contexts, after)

    monkeypatch.setattr(cache_module, "make_plan", failing)
    collected = drive(engine, GOOD)
    assert failed == [len(GOOD)]
    assert_good_rows_are_right(collected, cast("Any", engine._runner)._model)


@pytest.mark.parametrize("what", ["sample", "launch"])
def test_an_error_after_a_step_was_built_is_no_prompts_fault(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows have moved on by then: only a new attempt of each gives the right tokens."""
    engine = tiny_engine(paged=True)
    engine.add(GOOD[0])
    for _ in range(3):
        engine.step()
    engine.add(GOOD[1])

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    if what == "sample":
        monkeypatch.setattr(BatchSampler, "sample", fail)
    else:
        engine.on_launch = fail
    with pytest.raises(ZeroDivisionError):
        engine.step()


def watch_prefills(engine: Engine) -> list[set[str]]:
    """Requests of each chunk, as the engine tells of them."""
    seen: list[set[str]] = []
    engine.on_prefill = lambda names: seen.append(set(names))
    return seen


def test_an_exception_in_a_long_prompt_ends_that_row_alone() -> None:
    model = PoisonedModel(raises=True)
    poisoned = Request("bad", (3,) * 150 + (POISON, 4), GREEDY, 12)
    engine = tiny_engine(model)
    collected = drive(engine, [*GOOD[:2], poisoned, *GOOD[2:]])
    assert collected["bad"].error_code == "prefill_failed"
    assert_good_rows_are_right(collected, model.model)


def test_an_error_does_not_repeat_the_exceptions_words() -> None:
    engine = tiny_engine(PoisonedModel(raises=True))
    engine.add(Request("bad", (POISON, 4), GREEDY, 12))
    (output,) = engine.step()
    assert output.error is not None
    assert output.error.message == "prefill raised RuntimeError"


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 6])
def test_abort_in_every_phase_leaves_the_others_untouched(steps: int, *, long: bool) -> None:
    model = build_model()
    engine = tiny_engine(model)
    victim = Request("victim", (7,) * (190 if long else 3), GREEDY, 40)

    def abort(step: int) -> None:
        if step == steps:
            engine.abort("victim")
            engine.abort("victim")

    collected = drive(engine, [GOOD[0], victim, *GOOD[1:]], on_step=abort)
    assert collected["victim"].finish_reason is None
    assert_good_rows_are_right(collected, model)


def test_abort_while_a_long_prompt_is_prefilled_starts_the_next_one_cleanly() -> None:
    model = build_model()
    engine = tiny_engine(model)
    engine.add(Request("victim", (7,) * 190, GREEDY, 40))
    engine.add(GOOD[0])
    engine.step()
    assert [row.phase for row in engine._scheduler.find("victim")] == [Phase.PREFILLING]
    engine.abort("victim")
    tokens: list[int] = []
    while engine.has_work:
        for output in engine.step():
            tokens += output.token_ids
    assert tokens == greedy_by_mlx_lm(model, GOOD[0].prompt, GOOD[0].max_tokens)


def test_abort_takes_every_choice() -> None:
    engine = tiny_engine()
    for choice in range(3):
        engine.add(Request("n", (1, 2), GREEDY, 9, choices=(RequestChoice(choice),)))
    engine.step()
    engine.abort("n")
    assert not engine.has_work
    assert engine.step() == []


VOCAB = TINY["vocab_size"]


@pytest.mark.parametrize(
    ("request_", "code", "field"),
    [
        (Request("a", (), GREEDY, 4), "invalid_parameter", "prompt"),
        (Request("a", (1, VOCAB), GREEDY, 4), "token_out_of_vocabulary", "prompt"),
        (Request("a", (-1, 2), GREEDY, 4), "token_out_of_vocabulary", "prompt"),
        (
            Request("a", (1,), GREEDY, 4, choices=(RequestChoice(0, (VOCAB,)),)),
            "token_out_of_vocabulary",
            "committed",
        ),
        (Request("a", (1,), GREEDY, 0), "invalid_parameter", "max_tokens"),
        (Request("a", (1,), GREEDY, 4, stop=("",)), "invalid_parameter", "stop"),
        (Request("a", (1,), GREEDY, 4, stop=("\ud800",)), "invalid_parameter", "stop"),
        (Request("a", (1,), SamplingParams(-1.0), 4), "invalid_parameter", "temperature"),
        (Request("a", (1,), SamplingParams(float("nan")), 4), "invalid_parameter", "temperature"),
        (Request("a", (1,), SamplingParams(1.0, top_p=0.0), 4), "invalid_parameter", "top_p"),
        (Request("a", (1,), SamplingParams(1.0, top_k=-1), 4), "invalid_parameter", "top_k"),
        (Request("a", (1,), SamplingParams(1.0, min_p=1.5), 4), "invalid_parameter", "min_p"),
        (Request("a", (1,), SamplingParams(1.0, seed=2**64), 4), "invalid_parameter", "seed"),
        *(
            (Request("a", (1,), replace(GREEDY, **{name: cast("Any", value)}), 4), code, name)
            for name, value, code in (
                ("repetition_penalty", 0.0, "invalid_parameter"),
                ("repetition_penalty", float("inf"), "invalid_parameter"),
                ("repetition_penalty", float("nan"), "invalid_parameter"),
                ("presence_penalty", 2.5, "invalid_parameter"),
                ("frequency_penalty", float("nan"), "invalid_parameter"),
                ("logit_bias", ((1, 2.0), (1, 3.0)), "invalid_parameter"),
                ("logit_bias", ((1, 101.0),), "invalid_parameter"),
                ("logit_bias", ((1, float("nan")),), "invalid_parameter"),
                ("logit_bias", ((VOCAB, 1.0),), "token_out_of_vocabulary"),
                ("logit_bias", ((-1, 1.0),), "token_out_of_vocabulary"),
                ("logprobs", -1, "invalid_parameter"),
                ("logprobs", 21, "invalid_parameter"),
            )
        ),
        (Request("a", (1,) * 10_000_000, GREEDY, 4), "too_large", "max_tokens"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_request_that_can_not_run_is_refused_by_name(
    request_: Request, code: str, field: str
) -> None:
    engine = tiny_engine()
    with pytest.raises(RequestRefusedError, match=f"^{field}: ") as refusal:
        engine.add(request_)
    assert refusal.value.code == code
    assert not engine.has_work
