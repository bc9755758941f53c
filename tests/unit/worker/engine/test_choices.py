"""Choices of one request: one prefill, and the same tokens as where each is added alone."""

from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models import gemma3_text, lfm2
from msgspec.structs import replace

from benchmarks.lib.synthetic import build_model
from mlx_serving.worker.engine.engine import Engine
from mlx_serving.worker.engine.interface import (
    Request,
    RequestChoice,
    RequestRefusedError,
    SamplingParams,
)
from tests.support.engine_support import GREEDY, HYBRID, SLIDING, drive, other_model, tiny_engine

SAMPLED = SamplingParams(1.0, top_p=0.95, seed=77)
PROMPT = tuple(range(40))


def choices_of(
    count: int,
    prompt: tuple[int, ...] = PROMPT,
    committed: dict[int, tuple[int, ...]] | None = None,
) -> Request:
    tails = committed or {}
    choices = tuple(RequestChoice(index, tails.get(index, ())) for index in range(count))
    return Request("n", prompt, SAMPLED, 12, choices=choices)


def each(request: Request) -> list[Request]:
    """A request a choice."""
    return [replace(request, choices=(choice,)) for choice in request.choices]


def tokens_of(engine: Engine, choices: int) -> list[list[int]]:
    tokens: list[list[int]] = [[] for _ in range(choices)]
    while engine.has_work:
        for output in engine.step():
            if output.request_id == "n":
                tokens[output.choice] += output.token_ids
    return tokens


def alone(request: Request, model: Any = None) -> list[int]:
    engine = tiny_engine(model, eos=())
    engine.add(request)
    tokens: list[int] = []
    while engine.has_work:
        for output in engine.step():
            tokens += output.token_ids
    return tokens


class Counting:
    """Counts the tokens that prompts cost, padding included."""

    def __init__(self) -> None:
        self.model = build_model()
        self.layers = self.model.layers  # type: ignore[attr-defined]
        self.prompt_tokens = 0

    def __call__(self, inputs: mx.array, cache: list[Any]) -> mx.array:
        if inputs.shape[1] > 1:
            self.prompt_tokens += inputs.size
        return self.model(inputs, cache=cache)


@pytest.mark.parametrize("prompt", [PROMPT, tuple(range(150)), (7,)], ids=len)
def test_choices_get_the_tokens_that_they_get_alone(prompt: tuple[int, ...]) -> None:
    asked = choices_of(4, prompt)
    engine = tiny_engine(eos=())
    engine.add(asked)
    tokens = tokens_of(engine, 4)
    assert tokens == [alone(request) for request in each(asked)]
    assert len({tuple(row) for row in tokens}) == 4


@pytest.mark.parametrize("length", [40, 150])
def test_the_prompt_is_computed_once(length: int) -> None:
    model = Counting()
    engine = tiny_engine(model, eos=())
    model.prompt_tokens = 0
    engine.add(choices_of(8, tuple(range(length))))
    tokens_of(engine, 8)
    assert model.prompt_tokens == length - 1


@pytest.mark.parametrize(
    ("module", "config"), [(gemma3_text, SLIDING), (lfm2, HYBRID)], ids=["sliding", "hybrid"]
)
def test_other_caches_are_copied_too(module: Any, config: dict[str, Any]) -> None:
    model = other_model(module, config)
    asked = choices_of(3)
    engine = tiny_engine(model, eos=())
    engine.add(asked)
    assert tokens_of(engine, 3) == [alone(request, model) for request in each(asked)]


def test_choices_share_a_chunk_with_other_prompts() -> None:
    asked = choices_of(3, (5, 6, 7))
    engine = tiny_engine(eos=())
    engine.add(Request("before", (1, 2), GREEDY, 5))
    engine.add(asked)
    engine.add(Request("after", (3, 4, 5, 6, 7, 8), GREEDY, 5))
    assert tokens_of(engine, 3) == [alone(request) for request in each(asked)]


def test_choices_join_a_batch_that_decodes() -> None:
    asked = choices_of(3)
    engine = tiny_engine(eos=())
    engine.add(Request("before", (1, 2), GREEDY, 30))
    for _ in range(5):
        engine.step()
    engine.add(asked)
    assert tokens_of(engine, 3) == [alone(request) for request in each(asked)]


def test_choices_that_resume_go_on_each_from_its_own_tokens() -> None:
    whole = [alone(request) for request in each(choices_of(4))]
    committed = {0: tuple(whole[0][:5]), 2: tuple(whole[2][:1])}
    engine = tiny_engine(eos=())
    engine.add(choices_of(4, committed=committed))
    rest = tokens_of(engine, 4)
    assert [list(committed.get(n, ())) + row for n, row in enumerate(rest)] == whole


def test_all_choices_are_admitted_or_none() -> None:
    engine = tiny_engine(rows=3)
    four = choices_of(4)
    assert not engine.fits(four)
    assert not engine.can_add(four)
    with pytest.raises(RequestRefusedError, match="needs 4 rows") as refusal:
        engine.add(four)
    assert refusal.value.code == "too_large"
    assert not engine.has_work
    engine.add(Request("other", (1,), GREEDY, 4))
    with pytest.raises(RequestRefusedError) as refusal:
        engine.add(choices_of(3))
    assert refusal.value.code == "no_room"
    assert engine.waiting == 1
    assert engine.can_add(choices_of(2))


def test_a_bad_stop_string_admits_no_choice() -> None:
    engine = tiny_engine()
    bad = Request(
        "n", PROMPT, GREEDY, 4, stop=("\ud800",), choices=(RequestChoice(0), RequestChoice(1))
    )
    with pytest.raises(RequestRefusedError, match="stop: "):
        engine.add(bad)
    assert not engine.has_work
    drive(engine, [Request("next", PROMPT, GREEDY, 4)])


def test_a_choice_that_a_request_names_twice_is_refused() -> None:
    engine = tiny_engine()
    with pytest.raises(RequestRefusedError, match="choice 0 of request n") as refusal:
        engine.add(Request("n", (1, 2), GREEDY, 4, choices=(RequestChoice(0), RequestChoice(0))))
    assert refusal.value.code == "duplicate_request"
    assert not engine.has_work


@pytest.mark.parametrize("steps", [0, 1, 2, 4])
def test_abort_takes_a_group_in_every_phase(steps: int) -> None:
    engine = tiny_engine(eos=())
    engine.add(choices_of(4, tuple(range(150))))
    for _ in range(steps):
        engine.step()
    engine.abort("n")
    assert not engine.has_work
    collected = drive(engine, [Request("next", PROMPT, GREEDY, 12)])
    assert collected["next"].token_ids == alone(Request("next", PROMPT, GREEDY, 12))


def test_a_prompt_that_fails_ends_every_choice_of_it_and_no_other() -> None:
    from tests.support.engine_support import POISON, PoisonedModel

    engine = tiny_engine(PoisonedModel(raises=True))
    engine.add(choices_of(3, (3, POISON, 4)))
    engine.add(Request("good", (1, 2), GREEDY, 5))
    codes: list[tuple[str, int, str]] = []
    finished = set()
    while engine.has_work:
        for output in engine.step():
            if output.error:
                codes.append((output.request_id, output.choice, output.error.code))
            elif output.finish_reason:
                finished.add(output.request_id)
    assert codes == [("n", choice, "prefill_failed") for choice in range(3)]
    assert finished == {"good"}
