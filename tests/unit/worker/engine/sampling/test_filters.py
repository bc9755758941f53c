"""What each filter keeps, and that draws follow exactly the filtered probabilities."""

import math
from collections import Counter

import mlx.core as mx
import pytest

from mlx_serving.worker.engine.interface import INVALID_TOKEN, SamplingParams
from mlx_serving.worker.engine.sampling.noise import token_words
from mlx_serving.worker.engine.sampling.parameters import RowSampling
from mlx_serving.worker.engine.sampling.sampler import BatchSampler, MakeDraw
from tests.support.sampling_support import FAST_IMPLEMENTATIONS

pytestmark = pytest.mark.parametrize("make", FAST_IMPLEMENTATIONS)

INF = math.inf
# Upper chi-square critical values at alpha = 1e-4, by degrees of freedom.
CRITICAL = {1: 15.14, 2: 18.42, 3: 21.11, 4: 23.51, 5: 25.74, 6: 27.86, 7: 29.88, 9: 33.72}

PLAIN = [2.0, 1.0, 0.5, 0.0, -1.0, -2.0, 1.5, 0.2]
TIES = [1.0, 1.0, 1.0, 0.0, 0.0, -1.0]
FLAT = [0.0] * 10
ONE_HOT = [0.0, 50.0, 0.0, 0.0]
MASKED = [-INF, 0.3, -INF, 0.1, 0.9]


def filtered_probabilities(logits: list[float], params: SamplingParams) -> list[float]:
    """The definition, in double precision: temperature, top-k, top-p, min-p, ties kept."""
    top = max(logits)
    scaled = [(value - top) / params.temperature for value in logits]
    kept = set(range(len(logits)))
    if params.top_k:
        kth = sorted(scaled, reverse=True)[min(params.top_k, len(logits)) - 1]
        kept = {i for i in kept if scaled[i] >= kth}
    if params.top_p < 1.0:
        total = sum(math.exp(scaled[i]) for i in kept)
        above, last = 0.0, INF
        for value in sorted((scaled[i] for i in kept), reverse=True):
            if above >= params.top_p * total:
                break
            above, last = above + math.exp(value), value
        kept = {i for i in kept if scaled[i] >= last}
    if params.min_p:
        kept = {i for i in kept if scaled[i] >= math.log(params.min_p)}
    masses = [math.exp(scaled[i]) if i in kept else 0.0 for i in range(len(logits))]
    return [mass / sum(masses) for mass in masses]


def draw(
    make: MakeDraw,
    logits: list[float],
    params: SamplingParams,
    count: int,
    dtype: mx.Dtype = mx.float32,
) -> list[int]:
    """`count` draws at once: rows that differ in nothing but the position."""
    rows = [RowSampling(params, 0, position) for position in range(count)]
    sampler = BatchSampler(rows, token_words(len(logits)), make)
    table = mx.array([logits] * count).astype(dtype)
    return [int(str(t)) for t in sampler(table).tolist()]  # type: ignore[union-attr]


def params(temperature: float = 1.0, **filters: float) -> SamplingParams:
    top_k = int(filters.pop("top_k", 0))
    return SamplingParams(temperature=temperature, top_k=top_k, seed=1234, **filters)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "sampling",
    [
        params(),
        params(0.5),
        params(5.0),
        params(top_k=3),
        params(top_k=1),
        params(top_k=8),
        params(top_k=100),
        params(top_p=0.8),
        params(top_p=0.999999),
        params(top_p=1e-6),
        params(min_p=0.2),
        params(min_p=1.0),
        params(0.7, top_k=5, top_p=0.9, min_p=0.1),
        params(1.3, top_k=2, top_p=0.5),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "logits",
    [PLAIN, TIES, FLAT, ONE_HOT, MASKED],
    ids=["plain", "ties", "flat", "onehot", "masked"],
)
def test_draws_follow_the_filtered_probabilities(
    make: MakeDraw, logits: list[float], sampling: SamplingParams
) -> None:
    count = 6000
    probabilities = filtered_probabilities(logits, sampling)
    assert_distributed(Counter(draw(make, logits, sampling, count)), probabilities, count)


def assert_distributed(observed: Counter[int], probabilities: list[float], count: int) -> None:
    """Chi-square against the probabilities; what is filtered out never comes."""
    for token, probability in enumerate(probabilities):
        if probability == 0.0:
            assert observed[token] == 0, f"token {token} is filtered out"
    # Tokens too rare for the statistic are pooled with the most likely one.
    tested = [(t, p) for t, p in enumerate(probabilities) if p * count >= 5]
    statistic = sum((observed[t] - p * count) ** 2 / (p * count) for t, p in tested)
    if len(tested) > 1:
        assert statistic < CRITICAL[len(tested) - 1]
    else:
        assert observed[tested[0][0]] >= 0.99 * count


@pytest.mark.parametrize("sampling", [params(), params(2.0, top_p=0.9), params(top_k=40)], ids=str)
def test_bfloat16_draws_follow_the_filtered_probabilities(
    make: MakeDraw, sampling: SamplingParams
) -> None:
    """Bfloat16 rounds 60 logits to many ties, at the thresholds too."""
    table = mx.array([3.0 * math.sin(token) for token in range(60)]).astype(mx.bfloat16)
    logits = [float(str(value)) for value in table.astype(mx.float32).tolist()]  # type: ignore[union-attr]
    count = 6000
    observed = Counter(draw(make, logits, sampling, count, mx.bfloat16))
    probabilities = filtered_probabilities(logits, sampling)
    kept = [(t, p) for t, p in enumerate(probabilities) if p * count >= 5]
    assert not [t for t, p in enumerate(probabilities) if p == 0.0 and observed[t]]
    statistic = sum((observed[t] - p * count) ** 2 / (p * count) for t, p in kept)
    freedom = len(kept) - 1
    assert statistic < freedom + 4.5 * math.sqrt(2 * freedom)  # normal approximation, 1e-5


def test_digits_are_uniform(make: MakeDraw) -> None:
    """`dice`: 30,000 draws of ten equal digits, 9 degrees of freedom."""
    observed = Counter(draw(make, FLAT, params(), 30_000))
    statistic = sum((observed[digit] - 3000) ** 2 / 3000 for digit in range(10))
    assert statistic < CRITICAL[9]


def test_pairs_of_digits_are_uniform(make: MakeDraw) -> None:
    """Consecutive positions are independent: 99 degrees of freedom, alpha = 1e-4: 157.8."""
    digits = draw(make, FLAT, params(), 40_000)
    pairs = Counter(zip(digits[::2], digits[1::2], strict=True))
    assert sum((pairs[a, b] - 200) ** 2 / 200 for a in range(10) for b in range(10)) < 157.8


@pytest.mark.parametrize("temperature", [0.0, 1e-6, 1e-5, 1e-4])
def test_tiny_temperatures_take_the_largest(make: MakeDraw, temperature: float) -> None:
    assert set(draw(make, PLAIN, params(temperature, top_p=0.9, min_p=0.1), 100)) == {0}


def test_huge_temperature_flattens(make: MakeDraw) -> None:
    observed = Counter(draw(make, PLAIN, params(1e6), 8000))
    assert sum((observed[t] - 1000) ** 2 / 1000 for t in range(8)) < CRITICAL[7]


def test_greedy_takes_the_first_of_equals(make: MakeDraw) -> None:
    assert set(draw(make, TIES, params(0.0), 4)) == {0}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("filters", [{}, {"top_p": 0.5}, {"top_k": 2}, {"min_p": 0.3}], ids=str)
@pytest.mark.parametrize(
    "broken",
    [[math.nan, 0.0, 1.0, 2.0], [0.0, 1.0, math.nan, 2.0], [INF, 0.0, 1.0, 2.0], [-INF] * 4],
    ids=["nan first", "nan inside", "inf", "all masked"],
)
def test_a_broken_row_is_named_and_harms_no_other(
    make: MakeDraw, broken: list[float], filters: dict[str, float], temperature: float
) -> None:
    sampling = params(temperature, **filters)
    good = [0.0, 3.0, 1.0, 2.0]
    rows = [RowSampling(sampling, 0, position) for position in range(3)]

    def sample(middle: list[float]) -> list[int]:
        sampler = BatchSampler(rows, token_words(4), make)
        return [int(str(t)) for t in sampler(mx.array([good, middle, good])).tolist()]  # type: ignore[union-attr]

    first, invalid, last = sample(broken)
    assert invalid == INVALID_TOKEN
    assert [first, last] == sample(good)[::2]


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_logits_are_filtered_alike(make: MakeDraw, dtype: mx.Dtype) -> None:
    """Halves are sorted as they are, scaled in float32: exact values give exact thresholds."""
    sampling = params(0.5, top_k=3, top_p=0.9)
    rows = [RowSampling(sampling, 0, position) for position in range(200)]
    logits = mx.array([[2.0, 1.0, 0.5, 0.25, -1.0]] * 200)
    single = BatchSampler(rows, token_words(5), make)(logits).tolist()
    half = BatchSampler(rows, token_words(5), make)(logits.astype(dtype)).tolist()
    assert single == half
