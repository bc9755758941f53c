"""A row's tokens depend on its own seed, choice and positions: never on its batch-mates."""

import functools
import random

import mlx.core as mx
import pytest

from mlx_serving.worker.engine.interface import SamplingParams
from mlx_serving.worker.engine.sampling.noise import token_words
from mlx_serving.worker.engine.sampling.parameters import RowSampling
from mlx_serving.worker.engine.sampling.sampler import BatchSampler, MakeDraw
from tests.support.sampling_support import IMPLEMENTATIONS

pytestmark = pytest.mark.parametrize("make", IMPLEMENTATIONS)

VOCAB = 997
STEPS = 12
WORDS = token_words(VOCAB)


def some_params(seed: int) -> SamplingParams:
    chance = random.Random(seed)
    return SamplingParams(
        temperature=chance.choice([0.0, 0.3, 1.0, 2.0]),
        top_p=chance.choice([1.0, 0.95, 0.5]),
        top_k=chance.choice([0, 0, 3, 100]),
        min_p=chance.choice([0.0, 0.0, 0.05]),
        seed=chance.randrange(2**64),
    )


MIXED = [some_params(seed) for seed in range(31)]
ROWS = [
    SamplingParams(temperature=1.0, seed=99),
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.8, top_p=0.9, seed=2**63 + 5),
    SamplingParams(temperature=1.2, top_k=20, min_p=0.02, seed=7),
    SamplingParams(temperature=0.8, min_p=0.1, seed=7),
]


@functools.cache  # each is asked for by many batches
def logits_of(name: int, position: int) -> mx.array:
    """The logits that row `name` sees at a position, whoever is beside it."""
    return mx.random.normal((VOCAB,), key=mx.random.key(name * 1000 + position)) * 3.0


def decode(
    make: MakeDraw, names: list[int], rows: list[SamplingParams], first: int = 0
) -> list[list[int]]:
    """The tokens of each row, positions `first` to STEPS, all in one batch."""
    sampler = BatchSampler([RowSampling(row, 0, first) for row in rows], WORDS, make)
    columns = []
    for position in range(first, STEPS):
        logits = mx.stack([logits_of(name, position) for name in names])
        columns.append(mx.array(sampler(logits)).tolist())
    return [list(row) for row in zip(*columns, strict=True)]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_alone_in_a_batch_in_another_order_and_resumed(make: MakeDraw, row: SamplingParams) -> None:
    alone = decode(make, [0], [row])[0]
    others = list(range(1, 32))
    assert decode(make, [0, *others], [row, *MIXED])[0] == alone
    assert decode(make, [*others, 0], [*MIXED, row])[-1] == alone
    shuffled = list(zip([0, *others], [row, *MIXED], strict=True))
    random.Random(4).shuffle(shuffled)
    names = [name for name, _ in shuffled]
    assert decode(make, names, [params for _, params in shuffled])[names.index(0)] == alone
    assert decode(make, [0, 1], [row, MIXED[0]], first=5)[0] == alone[5:]


def test_greedy_mates_do_not_matter(make: MakeDraw) -> None:
    """The paths differ: an all-greedy batch takes an argmax, a mixed one samples."""
    greedy = SamplingParams()
    assert decode(make, [3], [greedy])[0] == decode(make, [3, 4], [greedy, ROWS[2]])[0]
    assert decode(make, [4], [ROWS[2]])[0] == decode(make, [3, 4], [greedy, ROWS[2]])[1]


def test_seed_choice_and_position_each_matter(make: MakeDraw) -> None:
    flat = mx.zeros((1, VOCAB))

    def token(seed: int, choice: int, position: int) -> object:
        row = RowSampling(SamplingParams(temperature=1.0, seed=seed), choice, position)
        return BatchSampler([row], WORDS, make)(flat).item()

    tokens = {token(*counters) for counters in [(1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1)]}
    assert len(tokens) == 4


def test_high_words_of_the_seed_matter(make: MakeDraw) -> None:
    low = SamplingParams(temperature=1.0, seed=1)
    high = SamplingParams(temperature=1.0, seed=1 + 2**40)
    assert decode(make, [0], [low]) != decode(make, [0], [high])
