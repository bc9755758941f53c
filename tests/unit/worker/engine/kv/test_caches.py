"""Every kind of cache that mlx-lm can batch gives what mlx-lm gives alone; others are refused."""

import random
from typing import Any, cast

import mlx.core as mx
import pytest
from mlx_lm.models import gemma3_text, lfm2, mamba
from mlx_lm.models.cache import BatchKVCache, ChunkedKVCache, KVCache

from benchmarks.lib.synthetic import TINY, build_model
from mlx_serving.worker.engine.interface import Request
from mlx_serving.worker.engine.kv import padded
from tests.support.engine_support import (
    GREEDY,
    HYBRID,
    RECURRENT,
    SLIDING,
    drive,
    greedy_by_mlx_lm,
    other_model,
    tiny_engine,
)


@pytest.mark.parametrize(
    ("module", "config"),
    [(gemma3_text, SLIDING), (lfm2, HYBRID), (mamba, RECURRENT)],
    ids=["sliding window", "hybrid", "recurrent"],
)
def test_greedy_equals_mlx_lm_with_other_caches(module: Any, config: dict[str, Any]) -> None:
    model = other_model(module, config)
    chance = random.Random(1)
    requests = [
        Request(
            f"r{n}",
            tuple(chance.randrange(256) for _ in range(chance.choice([1, 5, 20, 30, 90]))),
            GREEDY,
            chance.randrange(3, 30),
        )
        for n in range(9)
    ]
    collected = drive(tiny_engine(model, rows=5), requests, every=2)
    assert len({tuple(row.token_ids) for row in collected.values()}) > 4
    for request in requests:
        expected = greedy_by_mlx_lm(model, request.prompt, request.max_tokens)
        assert collected[request.id].token_ids == expected, request.id


def test_a_model_whose_cache_can_not_be_batched_is_refused_by_name() -> None:
    class Chunked:
        layers = build_model().layers  # type: ignore[attr-defined]

        def make_cache(self) -> list[Any]:
            return [KVCache(), ChunkedKVCache(64)]

        def __call__(self, inputs: mx.array, cache: list[Any]) -> mx.array:
            for layer in cache:
                block = mx.zeros((1, 2, inputs.shape[1], 16))
                layer.update_and_fetch(block, block)
            return mx.zeros((*inputs.shape, 300))

    with pytest.raises(padded.UnsupportedModelError, match="layer 1 keeps a ChunkedKVCache"):
        tiny_engine(Chunked())


def test_cost_is_measured_from_the_models_own_cache() -> None:
    cost = padded.measure(build_model())
    # 2 layers x (keys + values) x 2 heads x 16 x 4 bytes
    assert cost == padded.CacheCost(512, 0, TINY["vocab_size"])
    assert cost.overhead_tokens == 256
    half = padded.measure(build_model(dtype=mx.bfloat16))
    assert half.bytes_per_token == 256


def test_fixed_states_count_as_overhead() -> None:
    cost = padded.measure(other_model(lfm2, HYBRID))
    assert cost.fixed_bytes > 0
    assert cost.overhead_tokens > 256


def test_the_kv_budget_bounds_admission_in_bytes() -> None:
    engine = tiny_engine(kv_budget_bytes=512 * 1000)
    assert engine.kv_tokens_capacity == 1000
    request = Request("a", (1,) * 200, GREEDY, 44)  # 244 + one block of 256 = 500 tokens
    engine.add(request)
    assert engine.kv_tokens_used == 500
    assert engine.can_add(Request("b", (1,), GREEDY, 243))
    assert not engine.can_add(Request("b", (1,) * 200, GREEDY, 45))


@pytest.mark.parametrize("kept", [[0, 1, 2, 3], [1], [3, 0], [0, 2]])
def test_rows_are_kept_as_mlx_lm_keeps_them(kept: list[int]) -> None:
    lengths = [5, 9, 2, 7]
    ours, theirs = (BatchKVCache.merge([filled(n) for n in lengths]) for _ in range(2))
    padded.keep_rows([ours], kept, max(lengths[index] for index in kept))
    theirs.filter(kept)
    assert ours.size() == theirs.size()
    for a, b in zip(cast("Any", ours.state[:4]), cast("Any", theirs.state[:4]), strict=True):
        assert mx.array_equal(a, b).item()


def filled(tokens: int) -> KVCache:
    cache = KVCache()
    block = mx.random.normal((1, 2, tokens, 4), key=mx.random.key(tokens))
    cache.update_and_fetch(block, -block)
    return cache
