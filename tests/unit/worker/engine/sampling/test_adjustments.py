"""Penalties, bias and masks against their definitions, written out in plain Python."""

import math
import random

import mlx.core as mx
import pytest

from mlx_serving.worker.engine.interface import INVALID_TOKEN, SamplingParams
from mlx_serving.worker.engine.sampling.noise import token_words
from mlx_serving.worker.engine.sampling.parameters import RowSampling
from mlx_serving.worker.engine.sampling.sampler import RECENT_TOKENS, BatchSampler, MakeDraw
from tests.support.sampling_support import IMPLEMENTATIONS, bits_of, greedy, ints, sample

VOCAB = 61
PROMPT = [5, 5, 9, 2, 60]

pytestmark = pytest.mark.parametrize("make", IMPLEMENTATIONS)


def adjusted(logits: list[float], params: SamplingParams, prompt: list[int], completion: list[int]
) -> list[float]:  # fmt: skip
    """`SamplingParams`' docstring in plain Python."""
    result = list(logits)
    for token in set(prompt) | set(completion):
        penalty = params.repetition_penalty
        result[token] = result[token] / penalty if result[token] > 0 else result[token] * penalty
    for token in set(completion):
        result[token] -= params.presence_penalty
        result[token] -= params.frequency_penalty * completion.count(token)
    for token, value in params.logit_bias:
        result[token] += value
    return result


def some_logits(seed: int) -> list[float]:
    chance = random.Random(seed)
    return [chance.gauss(0.0, 1.0) for _ in range(VOCAB)]


def greedy_by_definition(params: SamplingParams, steps: int) -> list[int]:
    completion: list[int] = []
    for step in range(steps):
        final = adjusted(some_logits(step), params, PROMPT, completion)
        completion.append(max(range(VOCAB), key=final.__getitem__))
    return completion


def decode(
    make: MakeDraw,
    params: SamplingParams,
    steps: int,
    committed: list[int] | None = None,
    mates: tuple[SamplingParams, ...] = (),
    rebuild_every: int = RECENT_TOKENS,
) -> list[int]:
    """A row's completion, the last row of its batch; logits depend on the position only."""
    words = token_words(VOCAB)
    first = len(committed or [])
    history = PROMPT + list(committed or [])
    inputs = history[-1]
    sampler = None
    for step in range(first, steps):
        if sampler is None or (step - first) % rebuild_every == 0:
            # As the engine does: the input of the next step is not in the history yet.
            row = RowSampling(params, 0, step, history, len(PROMPT))
            others = [RowSampling(mate, 1, step, history, len(PROMPT)) for mate in mates]
            sampler = BatchSampler([*others, row], words, make)
        logits = mx.array([some_logits(step)] * (len(mates) + 1))
        tokens = mx.array([inputs] * (len(mates) + 1), dtype=mx.int32)
        inputs = ints(sampler.sample(logits, tokens).tokens)[-1]
        history = [*history, inputs]
    return history[len(PROMPT) + first :]


PENALTIES = [
    {"repetition_penalty": 1.5},
    {"repetition_penalty": 0.7},
    {"presence_penalty": 1.5},
    {"frequency_penalty": 0.9},
    {"frequency_penalty": -0.4},
    {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.3},
]


@pytest.mark.parametrize("penalties", PENALTIES, ids=str)
def test_penalties_follow_their_definition(make: MakeDraw, penalties: dict[str, float]) -> None:
    bias = ((7, 0.5), (3, -2.0))
    params = SamplingParams(**penalties, logit_bias=bias)  # type: ignore[arg-type]
    expected = greedy_by_definition(params, 40)
    assert expected != greedy_by_definition(SamplingParams(logit_bias=bias), 40)
    assert decode(make, params, 40) == expected
    assert decode(make, params, 40, rebuild_every=3) == expected


@pytest.mark.parametrize("penalties", PENALTIES, ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_resume_and_batch_mates_change_nothing(
    make: MakeDraw, penalties: dict[str, float], temperature: float
) -> None:
    params = SamplingParams(temperature, 0.9, seed=11, **penalties)  # type: ignore[arg-type]
    mates = (SamplingParams(1.0, seed=3), greedy(frequency_penalty=2.0))
    alone = decode(make, params, 20)
    assert decode(make, params, 20, committed=alone[:8]) == alone[8:]
    assert decode(make, params, 20, mates=mates) == alone


def test_the_prompt_counts_for_repetition_alone(make: MakeDraw) -> None:
    logits = [0.0] * VOCAB
    logits[PROMPT[-1]], logits[1] = 2.0, 1.5
    table = mx.array([logits])
    tokens = mx.array([PROMPT[-1]], dtype=mx.int32)

    def first(**penalties: float) -> int:
        row = RowSampling(greedy(**penalties), 0, 0, PROMPT, len(PROMPT))
        return sample(make, [row], table, tokens=tokens)[0]

    assert first(presence_penalty=2.0, frequency_penalty=2.0) == PROMPT[-1]
    assert first(repetition_penalty=2.0) == 1


def test_bias_forces_and_forbids(make: MakeDraw) -> None:
    table = mx.array([some_logits(1)] * 3)
    likeliest = max(range(VOCAB), key=some_logits(1).__getitem__)
    rows = [
        RowSampling(greedy(), 0, 0),
        RowSampling(greedy(logit_bias=((44, 100.0),)), 0, 0),
        RowSampling(greedy(logit_bias=((likeliest, -100.0),)), 0, 0),
    ]
    plain, forced, forbidden = sample(make, rows, table)
    assert (plain, forced) == (likeliest, 44)
    assert forbidden == sorted(range(VOCAB), key=some_logits(1).__getitem__)[-2]


def test_a_mask_allows_its_tokens_only(make: MakeDraw) -> None:
    allowed = [[0, 31, 32], [60], list(range(VOCAB)), []]
    rows = [
        RowSampling(SamplingParams(1.0, seed=1), 0, position, masked=True) for position in range(3)
    ]
    rows.append(RowSampling(SamplingParams(1.0, seed=1), 0, 3))  # reads no mask
    mask = mx.array([bits_of(tokens, VOCAB) for tokens in allowed], dtype=mx.int32)
    for seed in range(20):
        logits = mx.array([some_logits(seed)] * 4)
        drawn = sample(make, rows, logits, mask=mask)
        assert drawn[0] in allowed[0]
        assert drawn[1] == 60
        unmasked = [RowSampling(row.params, 0, row.position) for row in rows]
        assert drawn[2:] == sample(make, unmasked, logits)[2:]


def test_a_mask_that_allows_nothing_fails_its_row_alone(make: MakeDraw) -> None:
    rows = [RowSampling(greedy(), 0, 0, masked=True) for _ in range(2)]
    mask = mx.array([bits_of([], VOCAB), bits_of([3], VOCAB)], dtype=mx.int32)
    drawn = sample(make, rows, mx.array([some_logits(0)] * 2), mask=mask)
    assert drawn == [INVALID_TOKEN, 3]


def test_a_mask_does_not_hide_a_broken_row(make: MakeDraw) -> None:
    logits = some_logits(0)
    logits[10] = math.nan
    mask = mx.array([bits_of([3], VOCAB)], dtype=mx.int32)
    row = RowSampling(greedy(), 0, 0, masked=True)
    assert sample(make, [row], mx.array([logits]), mask=mask) == [INVALID_TOKEN]


def test_an_invalid_token_taken_in_is_not_counted(make: MakeDraw) -> None:
    """The row of a broken mate keeps its place for one step more."""
    row = RowSampling(greedy(frequency_penalty=1.0), 0, 3, [*PROMPT, 1, 2], len(PROMPT))
    taken = mx.array([INVALID_TOKEN, 3], dtype=mx.int32)
    drawn = sample(make, [row, row], mx.array([some_logits(0)] * 2), tokens=taken)
    expected = adjusted(some_logits(0), row.params, PROMPT, [1, 2])
    assert drawn[0] == max(range(VOCAB), key=expected.__getitem__)


def test_missing_inputs_are_named(make: MakeDraw) -> None:
    logits = mx.array([some_logits(0)])
    penalised = RowSampling(greedy(presence_penalty=1.0), 0, 0, PROMPT, len(PROMPT))
    with pytest.raises(ValueError, match="tokens: a row has penalties"):
        sample(make, [penalised], logits)
    with pytest.raises(ValueError, match="mask: a row is masked"):
        sample(make, [RowSampling(greedy(), 0, 0, masked=True)], logits)


def test_a_full_sampler_says_so(make: MakeDraw) -> None:
    row = RowSampling(greedy(presence_penalty=1.0), 0, 0, PROMPT, len(PROMPT))
    sampler = BatchSampler([row], token_words(VOCAB), make)
    tokens = mx.array([1], dtype=mx.int32)
    for _ in range(RECENT_TOKENS):
        assert not sampler.needs_rebuild
        sampler.sample(mx.array([some_logits(0)]), tokens)
    assert sampler.needs_rebuild
    with pytest.raises(ValueError, match="as many tokens as it can"):
        sampler.sample(mx.array([some_logits(0)]), tokens)
