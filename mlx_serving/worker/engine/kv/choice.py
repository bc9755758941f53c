"""Chooses the KV cache of the decode batch: paged if its kernels pass their check, else mlx-lm's.

The paged cache is used if every layer has a plain KV cache, the device has the kernels, the kernels
agree with their reference there, and the model gives the same logits with either cache. Otherwise
mlx-lm's batch caches are used, and the report says why.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from mlx_serving.worker.engine.kernels import dialect
from mlx_serving.worker.engine.kv import padded
from mlx_serving.worker.engine.kv.interface import DecodeCache
from mlx_serving.worker.engine.kv.padded import CacheCost, LanguageModel
from mlx_serving.worker.engine.kv.padded_cache import PaddedCache, QuantizedCache
from mlx_serving.worker.engine.kv.paged import dispatch
from mlx_serving.worker.engine.kv.paged.cache import BLOCK_TOKENS, LOOKAHEAD_TOKENS, PagedCache
from mlx_serving.worker.engine.kv.paged.kernel_ops import KernelOps, supports
from mlx_serving.worker.engine.kv.paged.layers import PagedOps
from mlx_serving.worker.engine.kv.paged.pools import LayerShape
from mlx_serving.worker.engine.kv.paged.reference import ReferenceOps
from mlx_serving.worker.engine.kv.paged.self_check import check
from mlx_serving.worker.engine.kv.quantized import KvBits, bytes_per_token, quantization_of
from mlx_serving.worker.engine.native import AccelerationReport

PAGED_CACHE: Final = "paged KV cache"
MIXED_READS: Final = 1 << 17  # as 512 tokens of prompts of 256 tokens
CacheKind = Literal["auto", "paged", "padded"]


@dataclass(frozen=True, slots=True)
class CacheChoice:
    """A kind of cache. `block_tokens`: its block size; 0: rows are padded to the longest.

    `report` is None on a CPU, which has no kernels. `bytes_per_token` None: as many as mlx-lm's
    own caches take. `mixed_reads`: see `SchedulerLimits`.
    """

    make: Callable[[], DecodeCache]
    block_tokens: int
    report: AccelerationReport | None
    bytes_per_token: int | None = None
    mixed_reads: int = 0

    def cost(self, model: LanguageModel) -> CacheCost:
        """Measure the memory that a row takes.

        Raises:
            UnsupportedModelError: the model's rows can't be batched.
        """
        cost = padded.measure(model)
        if self.bytes_per_token is None:
            return cost
        return replace(cost, bytes_per_token=self.bytes_per_token, fixed_bytes=0)

    def row_overhead_tokens(self, cost: CacheCost) -> int:
        """KV tokens that a row may hold beyond its own."""
        return LOOKAHEAD_TOKENS if self.block_tokens else cost.overhead_tokens


def choose_cache(
    model: LanguageModel,
    *,
    prefer_native: bool = True,
    kind: CacheKind = "auto",
    bits: KvBits | None = None,
) -> CacheChoice:
    """Choose for this model on this device; runs a few tiny steps if there are kernels.

    `kind` "paged": use blocks also on a CPU, although their reference is slower than padding.
    `bits`: keep keys and values in so many bits; None: as the model computes them.

    Raises:
        UnsupportedModelError: the model's keys and values can't be kept in `bits`.
    """
    if bits is not None:
        return quantized_choice(model, bits)
    language = dialect()
    if kind == "padded":
        return padded_choice(model, "switched off by the settings")
    if language is None:
        return _choose_on_cpu(model, kind)
    if not prefer_native:
        return padded_choice(model, "switched off by the settings")
    try:
        return paged_choice(model, KernelOps(language))
    except Exception as error:  # noqa: BLE001 - after any error, mlx-lm's own caches are used
        return padded_choice(model, f"{type(error).__name__}: {error}")


def _choose_on_cpu(model: LanguageModel, kind: CacheKind) -> CacheChoice:
    if kind != "paged":
        return CacheChoice(lambda: PaddedCache(model), 0, None)
    choice = paged_choice(model, ReferenceOps())
    if not choice.block_tokens:
        return choice
    report = AccelerationReport(PAGED_CACHE, "twin", "asked for; MLX's CPU backend has no kernels")
    return replace(choice, report=report, mixed_reads=0)


def paged_choice(model: LanguageModel, ops: PagedOps) -> CacheChoice:
    """Return the paged cache with these operations if they and the model pass their checks."""
    shapes = layer_shapes(model)
    reason = _why_not(model, shapes) or check(model, shapes, ops)
    mx.clear_cache()  # of the check's buffers
    if reason is not None:
        return padded_choice(model, reason)
    report = AccelerationReport(PAGED_CACHE, "native", "self-check passed")
    mixed_reads = MIXED_READS if ops.ordered_by_stream else 0
    return CacheChoice(
        lambda: PagedCache(model, shapes, ops), BLOCK_TOKENS, report, mixed_reads=mixed_reads
    )


def quantized_choice(model: LanguageModel, bits: KvBits) -> CacheChoice:
    """Return padded caches in so many bits; there is no kernel for blocks of those."""
    how = quantization_of(model, bits)
    reason = f"cache.bits={bits}: padded, by mlx-lm's attention on groups of {how.group_size}"
    report = AccelerationReport(PAGED_CACHE, "off", reason)
    return CacheChoice(lambda: QuantizedCache(model, how), 0, report, bytes_per_token(model, how))


def padded_choice(model: LanguageModel, reason: str) -> CacheChoice:
    """Return mlx-lm's batch caches, and the reason for them."""
    report = AccelerationReport(PAGED_CACHE, "twin", reason)
    return CacheChoice(lambda: PaddedCache(model), 0, report)


def layer_shapes(model: LanguageModel) -> list[LayerShape]:
    """Return the shape of each layer's cache; empty if any layer has no plain KV cache."""
    cache = padded.new_cache(model, 1)
    if any(type(layer) is not KVCache for layer in cache):
        return []
    model(mx.zeros((1, 2), dtype=mx.int32), cache=cache)  # built, never computed
    if any(layer.keys.shape != layer.values.shape for layer in cache):
        return []
    shapes = [(layer.keys.shape, layer.keys.dtype) for layer in cache]
    return [LayerShape(shape[1], shape[3], dtype) for shape, dtype in shapes]


def _why_not(model: LanguageModel, shapes: Sequence[LayerShape]) -> str | None:
    if not shapes:
        return "a layer keeps another cache than plain keys and values"
    if not all(supports(shape.head_dim) for shape in shapes):
        return f"no kernel for heads of {max(shape.head_dim for shape in shapes)}"
    if not dispatch.install(model):
        return "the model does not use mlx-lm's attention"
    return None
