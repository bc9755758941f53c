"""The engine over tiny random models in memory: right tokens, whoever shares the batch."""

import pytest
from msgspec.structs import replace

from benchmarks.lib.synthetic import build_model, build_tokenizer
from mlx_serving.worker.engine.interface import Request, RequestChoice, SamplingParams
from tests.support.engine_support import (
    EOS,
    GREEDY,
    Collected,
    drive,
    greedy_by_mlx_lm,
    random_requests,
    tiny_engine,
)

ARCHITECTURES = ["qwen3", "llama"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_equals_mlx_lm_in_a_churning_batch(architecture: str) -> None:
    model = build_model(architecture=architecture)
    requests = random_requests(16, seed=1)
    collected = drive(tiny_engine(model, rows=8), requests[:8], every=3)
    collected |= drive(tiny_engine(model), requests[8:])
    for request in requests:
        expected = greedy_by_mlx_lm(model, request.prompt, request.max_tokens)
        assert collected[request.id].token_ids == expected


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_equals_mlx_lm_alone(architecture: str) -> None:
    model = build_model(architecture=architecture)
    for request in random_requests(4, seed=2):
        collected = drive(tiny_engine(model), [request])[request.id]
        assert collected.token_ids == greedy_by_mlx_lm(model, request.prompt, request.max_tokens)


def test_outputs_differ_between_prompts() -> None:
    """Guards the tests above: a model that says one thing to everybody would prove nothing."""
    collected = drive(tiny_engine(), random_requests(8, seed=3))
    assert len({tuple(row.token_ids[:6]) for row in collected.values()}) > 4


MEASURED = Request(
    "measured", tuple(range(40)), SamplingParams(1.0, top_p=0.95, top_k=50, seed=77), 32
)


@pytest.fixture(scope="module")
def alone() -> Collected:
    return drive(tiny_engine(eos=()), [MEASURED])["measured"]


def with_mates(position: int) -> list[Request]:
    settings = [GREEDY, SamplingParams(0.7, seed=1), SamplingParams(1.3, min_p=0.05, seed=2)]
    mates = [
        Request(r.id, r.prompt, settings[i % 3], r.max_tokens)
        for i, r in enumerate(random_requests(31, seed=4))
    ]
    return [*mates[:position], MEASURED, *mates[position:]]


@pytest.mark.parametrize("position", [0, 17, 31])
def test_sampled_tokens_are_the_same_in_a_batch_of_32(alone: Collected, position: int) -> None:
    collected = drive(tiny_engine(eos=()), with_mates(position))["measured"]
    assert collected.token_ids == alone.token_ids
    assert collected.text == alone.text


def test_sampled_tokens_are_the_same_in_a_churning_batch(alone: Collected) -> None:
    collected = drive(tiny_engine(eos=(), rows=6), with_mates(9)[:20], every=7)["measured"]
    assert collected.token_ids == alone.token_ids


@pytest.mark.parametrize("cut", [1, 5, 31])
def test_a_resumed_row_goes_on_where_it_stood(alone: Collected, cut: int) -> None:
    committed = tuple(alone.token_ids[:cut])
    resumed = Request(
        "m", MEASURED.prompt, MEASURED.sampling, 32, choices=(RequestChoice(0, committed),)
    )
    rest = drive(tiny_engine(eos=()), [resumed, *random_requests(3, seed=5)])["m"]
    assert rest.token_ids == alone.token_ids[cut:]
    assert rest.finish_reason == "length"


def test_resumed_text_joins_without_a_seam(alone: Collected) -> None:
    """Also where the cut is inside a character: text of the first part + text of the second."""
    engine = tiny_engine(eos=())
    engine.add(MEASURED)
    tokens: list[int] = []
    text = ""
    while len(tokens) < 13:
        for output in engine.step():
            tokens += output.token_ids
            text += output.text
    resumed = replace(MEASURED, choices=(RequestChoice(0, tuple(tokens)),))
    rest = drive(tiny_engine(eos=()), [resumed])["m"]
    assert text + rest.text == alone.text


def test_choices_of_one_request_differ_and_stay_apart() -> None:
    engine = tiny_engine(eos=())
    for choice in range(3):
        engine.add(
            Request("n", MEASURED.prompt, MEASURED.sampling, 12, choices=(RequestChoice(choice),))
        )
    tokens: dict[int, list[int]] = {0: [], 1: [], 2: []}
    while engine.has_work:
        for output in engine.step():
            tokens[output.choice] += output.token_ids
    assert {len(row) for row in tokens.values()} == {12}
    assert len({tuple(row) for row in tokens.values()}) == 3


def test_text_equals_the_tokenizers_decode() -> None:
    tokenizer = build_tokenizer()
    sampling = SamplingParams(temperature=2.0, seed=3)
    requests = [
        Request(str(n), (n + 1,), SamplingParams(2.0, seed=n), max_tokens=60) for n in range(6)
    ]
    assert sampling.seed == 3
    for row in drive(tiny_engine(), requests).values():
        assert row.text == tokenizer.decode(row.token_ids, skip_special_tokens=True)


def test_the_end_of_sequence_token_is_named_and_not_spelled() -> None:
    greedy = drive(tiny_engine(eos=()), [Request("a", (9, 8, 7), GREEDY, 12)])["a"]
    end = greedy.token_ids[5]
    first = greedy.token_ids.index(end)
    stopped = drive(tiny_engine(eos=(end,)), [Request("a", (9, 8, 7), GREEDY, 12)])["a"]
    assert stopped.token_ids == greedy.token_ids[: first + 1]
    assert stopped.finish_reason == "stop"
    assert stopped.text == build_tokenizer().decode(stopped.token_ids[:-1])
    assert EOS not in stopped.token_ids


def test_an_engine_moves_to_another_thread() -> None:
    """A worker loads the model on one thread and decodes on another."""
    import threading

    engine = tiny_engine(eos=())
    collected: list[dict[str, Collected]] = []
    thread = threading.Thread(target=lambda: collected.append(drive(engine, [MEASURED])))
    thread.start()
    thread.join()
    assert collected[0]["measured"].finish_reason == "length"


def test_a_steps_work_is_one_forward_pass_of_decode() -> None:
    """Even with rows that join and leave, the model never runs twice for one token."""
    model = build_model()
    calls: list[tuple[int, ...]] = []

    class Counting:
        layers = model.layers  # type: ignore[attr-defined]

        def __call__(self, inputs: object, cache: list[object]) -> object:
            calls.append(tuple(inputs.shape))  # type: ignore[attr-defined]
            return model(inputs, cache=cache)  # type: ignore[arg-type]

    engine = tiny_engine(Counting(), eos=())  # type: ignore[arg-type]
    calls.clear()
    drive(engine, [Request("a", (1, 2, 3), GREEDY, 5), Request("b", (4, 5, 6), GREEDY, 3)])
    assert calls[0] == (2, 2)  # both prompts but their last tokens, in one pass
    # Three tokens of both, the one of both that b did not need, then a alone.
    assert calls[1:] == [(2, 1)] * 4 + [(1, 1)] * 1
