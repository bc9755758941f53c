"""The paged cache's self-check: what passes it, and that it catches a wrong kernel."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models import gemma2, gemma3_text, lfm2

from benchmarks.lib.synthetic import TINY, build_model
from mlx_serving.worker.engine.kv import choice as cache_choice
from mlx_serving.worker.engine.kv.choice import CacheChoice, choose_cache, paged_choice
from mlx_serving.worker.engine.kv.padded_cache import PaddedCache
from mlx_serving.worker.engine.kv.paged import dispatch
from mlx_serving.worker.engine.kv.paged.cache import PagedCache
from mlx_serving.worker.engine.kv.paged.layers import (
    PagedLayer,
    StepPlan,
    StoreEntry,
)
from mlx_serving.worker.engine.kv.paged.reference import ReferenceOps
from tests.support.engine_support import HYBRID, SLIDING, other_model


class WrongAttention(ReferenceOps):
    def attend(self, *args: Any) -> mx.array:
        return super().attend(*args) * 1.01


class ForgetsTheNewToken(ReferenceOps):
    def attend(
        self,
        layer: PagedLayer,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scale: float,
        plan: StepPlan,
    ) -> mx.array:
        kept = layer.keys + 0, layer.values + 0
        out = super().attend(layer, queries, keys, values, scale, plan)
        layer.keys, layer.values = kept
        return out


class StoresTooFewTokens(ReferenceOps):
    def store(
        self,
        layer: PagedLayer,
        keys: mx.array,
        values: mx.array,
        entries: Sequence[StoreEntry],
        after: mx.array,
    ) -> mx.array:
        return super().store(layer, keys, values, entries[:-1], after)


class GivesNan(ReferenceOps):
    def attend(self, *args: Any) -> mx.array:
        return super().attend(*args) * mx.nan


class Raises(ReferenceOps):
    def attend(self, *_: Any) -> mx.array:
        message = "no such kernel"
        raise RuntimeError(message)


def reason_of(choice: CacheChoice) -> str:
    """Why mlx-lm's caches are used."""
    assert choice.report is not None
    assert choice.report.implementation == "twin"
    return choice.report.reason


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
def test_the_reference_passes(dtype: mx.Dtype) -> None:
    choice = paged_choice(build_model(dtype=dtype), ReferenceOps())
    assert isinstance(choice.make(), PagedCache)
    assert str(choice.report) == "paged KV cache: native (self-check passed)"


@pytest.mark.parametrize(
    ("ops", "words"),
    [
        (WrongAttention(), "its attention is 0.01 off the reference's"),
        (GivesNan(), "its attention is nan off the reference's"),
        (ForgetsTheNewToken(), "the keys and values it stores differ"),
        (StoresTooFewTokens(), "what it stores differs"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_a_wrong_kernel_is_not_used(ops: ReferenceOps, words: str) -> None:
    choice = paged_choice(build_model(), ops)
    assert isinstance(choice.make(), PaddedCache)
    assert words in reason_of(choice)


def test_a_kernel_that_raises_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_choice, "dialect", lambda: "cuda")
    monkeypatch.setattr(cache_choice, "KernelOps", lambda _: Raises())
    choice = choose_cache(build_model())
    assert isinstance(choice.make(), PaddedCache)
    assert reason_of(choice) == "RuntimeError: no such kernel"


def test_the_cpu_backend_keeps_mlx_lms_caches_and_has_no_choice_to_report() -> None:
    choice = choose_cache(build_model())
    assert isinstance(choice.make(), PaddedCache)
    assert choice.report is None


def test_the_settings_switch_the_kernels_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_choice, "dialect", lambda: "cuda")
    choice = choose_cache(build_model(), prefer_native=False)
    assert isinstance(choice.make(), PaddedCache)
    assert reason_of(choice) == "switched off by the settings"


@pytest.mark.parametrize(
    ("module", "config"), [(gemma3_text, SLIDING), (lfm2, HYBRID)], ids=["sliding", "hybrid"]
)
def test_other_caches_stay_with_mlx_lm(module: Any, config: dict[str, Any]) -> None:
    choice = paged_choice(other_model(module, config), ReferenceOps())
    assert isinstance(choice.make(), PaddedCache)
    assert "another cache" in reason_of(choice)


def test_a_model_with_attention_of_its_own_stays_with_mlx_lm() -> None:
    """Gemma 2 caps attention's logits itself and calls no shared function."""
    config = TINY | {"query_pre_attn_scalar": 16}
    choice = paged_choice(other_model(gemma2, config), ReferenceOps())
    assert isinstance(choice.make(), PaddedCache)
    assert reason_of(choice) == "the model does not use mlx-lm's attention"


def test_attention_of_other_caches_is_mlx_lms_own() -> None:
    model = build_model()
    assert dispatch.install(model)
    assert dispatch.install(model), "a second time changes nothing"
    query = mx.random.normal((1, 2, 3, 4))
    got = dispatch.attention(query, query, query, None, 0.5, "causal")
    expected = mx.fast.scaled_dot_product_attention(query, query, query, scale=0.5, mask="causal")
    assert mx.array_equal(got, expected).item()


def test_a_paged_cache_refuses_what_it_can_not_do() -> None:
    pool = mx.zeros((1, 1, 32, 4))
    layer = PagedLayer(ReferenceOps(), pool, pool)
    query = mx.zeros((1, 1, 1, 4))
    with pytest.raises(ValueError, match="masks"):
        dispatch.attention(query, query, query, layer, 1.0, mx.array([True]))
    with pytest.raises(ValueError, match="one token a row"):
        layer.make_mask(2)
    with pytest.raises(ValueError, match="window"):
        layer.make_mask(1, window_size=4)
