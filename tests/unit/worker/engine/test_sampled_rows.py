"""The engine honours penalties, bias and log probabilities, whoever shares the batch."""

import random
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from msgspec.structs import replace

from benchmarks.lib.synthetic import build_model
from mlx_serving.worker.engine.interface import Request, RequestChoice, SamplingParams
from mlx_serving.worker.engine.kv.padded import LanguageModel, new_cache
from mlx_serving.worker.engine.sampling.sampler import RECENT_TOKENS
from mlx_serving.worker.engine.simulated import SimulatedEngine
from tests.support.engine_support import GREEDY, Collected, drive, tiny_engine

PROMPT = (7, 7, 30, 200, 11)
LENGTH = RECENT_TOKENS + 20  # the sampler is packed again on the way
PENALTIES: list[dict[str, Any]] = [
    {"repetition_penalty": 1.4},
    {"presence_penalty": 1.2},
    {"frequency_penalty": 0.6},
    {"repetition_penalty": 1.1, "frequency_penalty": -0.1, "logit_bias": ((40, 0.7), (41, -2.0))},
]


def log_softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    shifted = logits - logits.max()
    result: np.ndarray[Any, Any] = shifted - np.log(np.exp(shifted).sum())
    return result


def model_logits(model: LanguageModel, tokens: list[int]) -> np.ndarray[Any, Any]:
    """What the model says after `tokens`, by one forward pass over all of them: float64 [V]."""
    logits = model(mx.array([tokens]), cache=new_cache(model, 1))[0, -1]
    return np.array(logits.astype(mx.float32)).astype(np.float64)


def greedy_by_definition(model: LanguageModel, params: SamplingParams, length: int) -> list[int]:
    """Penalties and bias as `SamplingParams` words them, over plain forward passes."""
    completion: list[int] = []
    while len(completion) < length:
        logits = model_logits(model, [*PROMPT, *completion])
        for token in {*PROMPT, *completion}:
            penalty = params.repetition_penalty
            logits[token] *= 1 / penalty if logits[token] > 0 else penalty
        for token in set(completion):
            logits[token] -= params.presence_penalty
            logits[token] -= params.frequency_penalty * completion.count(token)
        for token, value in params.logit_bias:
            logits[token] += value
        completion.append(int(logits.argmax()))
    return completion


def mates(count: int) -> list[Request]:
    """Rows that come and go, some with penalties of their own."""
    chance = random.Random(2)
    settings = [GREEDY, SamplingParams(1.0, seed=4), SamplingParams(frequency_penalty=1.0)]
    return [
        Request(
            f"mate-{index}",
            tuple(chance.randrange(256) for _ in range(chance.choice([2, 20, 70]))),
            settings[index % 3],
            max_tokens=chance.randrange(2, 30),
        )
        for index in range(count)
    ]


@pytest.mark.parametrize("fields", PENALTIES, ids=str)
def test_penalties_and_bias_follow_their_definition(fields: dict[str, Any]) -> None:
    model = build_model()
    params = SamplingParams(**fields)
    request = Request("r", PROMPT, params, LENGTH)
    expected = greedy_by_definition(model, params, LENGTH)
    assert expected != greedy_by_definition(model, GREEDY, LENGTH)
    alone = drive(tiny_engine(model, eos=()), [request])["r"]
    assert alone.token_ids == expected
    churning = drive(tiny_engine(model, eos=(), rows=5), [request, *mates(20)], every=3)["r"]
    assert churning.token_ids == expected


@pytest.mark.parametrize("fields", PENALTIES, ids=str)
@pytest.mark.parametrize("cut", [1, 13, RECENT_TOKENS + 2])
def test_a_resumed_row_with_penalties_goes_on_where_it_stood(
    fields: dict[str, Any], cut: int
) -> None:
    params = SamplingParams(temperature=1.0, top_p=0.95, seed=5, **fields)
    request = Request("r", PROMPT, params, LENGTH)
    whole = drive(tiny_engine(eos=()), [request])["r"].token_ids
    resumed = replace(request, choices=(RequestChoice(0, tuple(whole[:cut])),))
    rest = drive(tiny_engine(eos=()), [*mates(3), resumed])["r"].token_ids
    assert rest == whole[cut:]


def collect_logprobs(request: Request, others: list[Request]) -> tuple[Collected, list[Any]]:
    model = build_model()
    found = []
    engine = tiny_engine(model, eos=(), rows=6)
    collected = Collected()
    pending = [*others[:4], request, *others[4:]]
    while pending or engine.has_work:
        if pending and engine.can_add(pending[0]):
            engine.add(pending.pop(0))
        for output in engine.step():
            if output.request_id == request.id:
                collected.add(output)
                assert len(output.logprobs) == len(output.token_ids)
                found += output.logprobs
            else:
                assert output.logprobs == []
    return collected, found


@pytest.mark.parametrize("count", [0, 3, 20])
@pytest.mark.parametrize(
    "params",
    [GREEDY, SamplingParams(1.3, top_p=0.8, seed=9, repetition_penalty=1.5)],
    ids=str,
)
def test_logprobs_are_those_of_the_models_own_distribution(
    params: SamplingParams, count: int
) -> None:
    model = build_model()
    request = Request("asks", PROMPT, replace(params, logprobs=count), 12)
    collected, found = collect_logprobs(request, mates(12))
    assert [one.token_id for one in found] == collected.token_ids
    for position, one in enumerate(found):
        expected = log_softmax(model_logits(model, [*PROMPT, *collected.token_ids[:position]]))
        assert one.logprob == pytest.approx(expected[one.token_id], abs=1e-3)
        ids = [token for token, _ in one.top]
        assert len(ids) == len(set(ids)) == count
        assert [value for _, value in one.top] == pytest.approx(expected[ids], abs=1e-3)
        assert [value for _, value in one.top] == pytest.approx(
            np.sort(expected)[::-1][:count], abs=1e-3
        )


def test_a_simulated_row_is_certain_of_its_tokens() -> None:
    engine = SimulatedEngine(sleep=lambda _: None)
    engine.add(Request("r", (1,), SamplingParams(logprobs=2), 3))
    outputs = [output for _ in range(4) for output in engine.step()]
    tokens = [token for output in outputs for token in output.token_ids]
    assert tokens == [1, 2, 3]
    found = [one for output in outputs for one in output.logprobs]
    assert [(one.token_id, one.logprob, one.top) for one in found] == [
        (token, 0.0, ((token, 0.0),)) for token in tokens
    ]
