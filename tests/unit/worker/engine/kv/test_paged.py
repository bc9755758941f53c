"""The engine on the paged cache's reference: right tokens, no leaks, never over budget."""

import random
from collections.abc import Iterator
from typing import Any, cast

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from benchmarks.lib.synthetic import build_model
from mlx_serving.worker.engine.engine import Engine
from mlx_serving.worker.engine.interface import Request, RequestChoice, SamplingParams
from mlx_serving.worker.engine.kv.paged.cache import BLOCK_TOKENS, PagedCache
from mlx_serving.worker.engine.kv.paged.step import plain_step
from tests.support.engine_support import (
    GREEDY,
    POISON,
    PoisonedModel,
    drive,
    greedy_by_mlx_lm,
    random_requests,
    tiny_engine,
)

SAMPLED = SamplingParams(1.0, top_p=0.95, seed=77)


def cache_of(engine: Engine) -> PagedCache:
    cache = cast("Any", engine._runner)._cache
    assert isinstance(cache, PagedCache)
    return cache


@pytest.fixture
def engine() -> Iterator[Engine]:
    """An engine that must give all of its blocks back."""
    made = tiny_engine(eos=(), paged=True)
    yield made
    assert not made.has_work
    assert cache_of(made).allocator.used == 0
    assert cache_of(made).blocks == 0


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_greedy_equals_mlx_lm_alone_and_in_a_churning_batch(architecture: str) -> None:
    model = build_model(architecture=architecture)
    requests = random_requests(18, seed=1)
    collected = drive(tiny_engine(model, rows=8, paged=True), requests[:9], every=3)
    collected |= drive(tiny_engine(model, paged=True), requests[9:16])
    for request in requests[16:]:
        collected |= drive(tiny_engine(model, paged=True), [request])
    for request in requests:
        expected = greedy_by_mlx_lm(model, request.prompt, request.max_tokens)
        assert collected[request.id].token_ids == expected


def test_a_long_row_among_short_ones_that_grow_over_many_blocks(engine: Engine) -> None:
    requests = [
        Request("long", tuple(n % 251 for n in range(700)), SAMPLED, 90),
        *[Request(f"s{n}", (n, n + 1), SAMPLED, 70 + n) for n in range(5)],
    ]
    collected = drive(engine, requests, every=4)
    expected = drive(tiny_engine(eos=()), requests, every=4)
    assert collected == expected


def test_chunks_of_any_length(engine: Engine) -> None:
    """Also where a chunk that is followed by another is rounded up."""
    requests = [Request(str(n), tuple(range(n)), GREEDY, 6) for n in (3, 51, 150, 170)]
    odd = drive(tiny_engine(eos=(), chunk=50, paged=True), requests)
    assert odd == drive(engine, requests) == drive(tiny_engine(eos=()), requests)


def test_a_prompt_that_fills_its_blocks_exactly(engine: Engine) -> None:
    requests = [
        Request(str(n), tuple(range(n)), GREEDY, BLOCK_TOKENS * 2)
        for n in (1, BLOCK_TOKENS, BLOCK_TOKENS + 1, 2 * BLOCK_TOKENS + 1)
    ]
    assert drive(engine, requests) == drive(tiny_engine(eos=()), requests)


@pytest.mark.parametrize("length", [1, 40, 33, 150])
def test_choices_share_the_full_blocks_of_their_prompt(engine: Engine, length: int) -> None:
    prompt = tuple(range(length))
    request = Request("n", prompt, SAMPLED, 12, choices=tuple(map(RequestChoice, range(4))))
    engine.add(request)
    tokens: list[list[int]] = [[] for _ in request.choices]
    most = 0
    while engine.has_work:
        for output in engine.step():
            tokens[output.choice] += output.token_ids
        most = max(most, cache_of(engine).allocator.used)
    full = (length - 1) // BLOCK_TOKENS
    assert full + 4 <= most - 1 <= full + 8  # and the padding block
    alone = []
    for choice in request.choices:
        plain = tiny_engine(eos=())
        plain.add(replace(request, choices=(choice,)))
        row: list[int] = []
        while plain.has_work:
            row += [token for output in plain.step() for token in output.token_ids]
        alone.append(row)
    assert tokens == alone


@pytest.mark.parametrize("steps", range(6))
@pytest.mark.parametrize("length", [3, 190])
def test_abort_in_every_phase_gives_the_blocks_back(
    engine: Engine, steps: int, length: int
) -> None:
    good = [Request(f"good{n}", (n + 1, 5, 9), GREEDY, 12) for n in range(4)]
    victim = Request("victim", (7,) * length, GREEDY, 40)

    def abort(step: int) -> None:
        if step == steps:
            engine.abort("victim")

    collected = drive(engine, [good[0], victim, *good[1:]], on_step=abort)
    for request in good:
        expected = drive(tiny_engine(eos=()), [request])[request.id]
        assert collected[request.id] == expected


def test_rows_that_fail_give_their_blocks_back() -> None:
    model = PoisonedModel()
    engine = tiny_engine(cast("Any", model.model), paged=True)
    cache_of(engine)._step = plain_step(cast("Any", model))
    good = [Request(f"good{n}", (n + 1, 5, 9), GREEDY, 12) for n in range(4)]
    bad = Request("bad", (*range(100), POISON), GREEDY, 12)
    collected = drive(engine, [*good[:2], bad, *good[2:]])
    assert collected["bad"].error_code == "nan_logits"
    assert cache_of(engine).allocator.used == 0
    for request in good:
        expected = greedy_by_mlx_lm(model.model, request.prompt, request.max_tokens)
        assert collected[request.id].token_ids == expected


def test_admission_is_the_sum_of_the_rows_blocks() -> None:
    engine = tiny_engine(kv_budget_bytes=512 * 1000, paged=True)
    engine.add(Request("wide", (1,) * 600, GREEDY, 50))  # 650 + 8 in blocks of 32
    assert engine.kv_tokens_used == 672
    for n in range(5):
        assert engine.can_add(Request(str(n), (1,), GREEDY, 23))
        engine.add(Request(str(n), (1,) * 10, GREEDY, 40))  # 50 + 8
    assert engine.kv_tokens_used == 672 + 5 * 64
    assert not engine.can_add(Request("next", (1,), GREEDY, 4))


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 150), st.integers(1, 50), st.integers(1, 3)), max_size=10),
    st.integers(0, 3),
    st.randoms(use_true_random=False),
)
def test_blocks_never_exceed_the_budget_and_none_is_lost(
    jobs: list[tuple[int, int, int]], every: int, chance: random.Random
) -> None:
    engine = tiny_engine(kv_budget_bytes=512 * 640, eos=(), paged=True)
    cache = cache_of(engine)
    assert cache.allocator.limit == 640 // BLOCK_TOKENS + 1
    pending = [
        Request(
            f"r{n}", (1,) * prompt, GREEDY, most, choices=tuple(map(RequestChoice, range(choices)))
        )
        for n, (prompt, most, choices) in enumerate(jobs)
    ]
    pending = [request for request in pending if engine.fits(request)]
    step = 0
    while pending or engine.has_work:
        while pending and engine.can_add(pending[0]) and (not every or step % every == 0):
            engine.add(pending.pop(0))
        if chance.random() < 0.05:
            engine.abort(f"r{chance.randrange(10)}")
        engine.step()
        assert cache.allocator.used <= cache.allocator.limit
        assert cache.blocks <= cache.allocator.limit
        step += 1
    assert cache.allocator.used == 0


def test_what_a_row_holds_is_not_touched_by_others_that_come_and_go() -> None:
    """A row's blocks keep their place: nothing of it is copied when the batch changes."""
    engine = tiny_engine(eos=(), paged=True)
    engine.add(Request("stays", tuple(range(100)), GREEDY, 60))
    for _ in range(6):
        engine.step()
    cache = cache_of(engine)
    blocks = list(cache._rows[0])
    before = mx.array(cache.layers[0].keys[mx.array(blocks[:3])])
    for n in range(6):
        engine.add(Request(f"x{n}", (n,) * 40, GREEDY, 3))
        for _ in range(3):
            engine.step()
    assert cache._rows[0][: len(blocks)] == blocks
    assert mx.array_equal(cache.layers[0].keys[mx.array(blocks[:3])], before).item()


def test_pools_shrink_when_a_long_row_leaves_and_the_others_go_on(engine: Engine) -> None:
    requests = [
        Request("long", tuple(n % 251 for n in range(5000)), GREEDY, 4),
        *[Request(f"s{n}", (n, n + 1, n + 2), SAMPLED, 60) for n in range(3)],
    ]
    seen: list[int] = []
    collected = drive(engine, requests, on_step=lambda _: seen.append(cache_of(engine).blocks))
    assert max(seen) >= 5000 // BLOCK_TOKENS
    assert seen[-1] < 80, "short rows alone"
    assert collected == drive(tiny_engine(eos=()), requests)
