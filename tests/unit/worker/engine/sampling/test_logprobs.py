"""Log probabilities are those of the model's own distribution."""

import math
import random

import mlx.core as mx
import pytest

from mlx_serving.worker.engine.interface import SamplingParams, TokenLogprobs
from mlx_serving.worker.engine.sampling.logprobs import read_logprobs
from mlx_serving.worker.engine.sampling.noise import token_words
from mlx_serving.worker.engine.sampling.parameters import RowSampling
from mlx_serving.worker.engine.sampling.sampler import BatchSampler, MakeDraw
from tests.support.sampling_support import IMPLEMENTATIONS, ints

VOCAB = 70

pytestmark = pytest.mark.parametrize("make", IMPLEMENTATIONS)


def log_softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    total = math.log(sum(math.exp(value - top) for value in logits))
    return [value - top - total for value in logits]


def report(
    make: MakeDraw, rows: list[SamplingParams], logits: list[list[float]]
) -> list[TokenLogprobs]:
    """What each row that asks gets."""
    sampling = [RowSampling(params, 0, 0, [1, 2, 3], 3) for params in rows]
    sampler = BatchSampler(sampling, token_words(len(logits[0])), make)
    tokens = mx.full(len(rows), 3, dtype=mx.int32)
    draws = sampler.sample(mx.array(logits), tokens)
    assert draws.logprobs is not None
    drawn = ints(draws.tokens)
    asked = [
        (index, drawn[index], params.logprobs)
        for index, params in enumerate(rows)
        if params.logprobs is not None
    ]
    return read_logprobs(draws.logprobs, asked)


def test_they_equal_log_softmax_whatever_else_is_asked(make: MakeDraw) -> None:
    chance = random.Random(0)
    logits = [[chance.gauss(0.0, 3.0) for _ in range(VOCAB)] for _ in range(5)]
    rows = [
        SamplingParams(logprobs=0),
        SamplingParams(temperature=2.0, top_p=0.5, seed=1, logprobs=5),
        SamplingParams(),
        SamplingParams(temperature=1.0, seed=2, logit_bias=((7, 50.0),), logprobs=20),
        SamplingParams(repetition_penalty=2.0, frequency_penalty=1.0, logprobs=VOCAB + 3),
    ]
    found = report(make, rows, logits)
    for one, row, count in zip(found, (0, 1, 3, 4), (0, 5, 20, VOCAB), strict=True):
        expected = log_softmax(logits[row])
        assert one.logprob == pytest.approx(expected[one.token_id], abs=1e-4)
        likeliest = sorted(range(VOCAB), key=lambda token: -expected[token])[:count]
        assert [token for token, _ in one.top] == likeliest
        values = [expected[token] for token in likeliest]
        assert [value for _, value in one.top] == pytest.approx(values, abs=1e-4)
    assert found[2].token_id == 7


def test_of_equals_the_lowest_id_comes_first(make: MakeDraw) -> None:
    [one] = report(make, [SamplingParams(logprobs=4)], [[1.0, 2.0, 1.0, 2.0, 1.0, 0.0]])
    assert [token for token, _ in one.top] == [1, 3, 0, 2]


def test_what_has_no_probability_is_left_out(make: MakeDraw) -> None:
    logits = [-math.inf, 1.0, -math.inf, 0.0, -math.inf]
    [one] = report(make, [SamplingParams(logprobs=4)], [logits])
    assert [token for token, _ in one.top] == [1, 3]
    assert all(math.isfinite(value) for _, value in one.top)
