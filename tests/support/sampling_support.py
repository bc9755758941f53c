"""Sampler implementations and helpers for their tests."""

from collections.abc import Iterable
from typing import Any, cast

import mlx.core as mx
import pytest

from mlx_serving.worker.engine.interface import SamplingParams
from mlx_serving.worker.engine.kernels import dialect
from mlx_serving.worker.engine.native import load_native
from mlx_serving.worker.engine.sampling.kernels import KernelDraw, NativeDraw
from mlx_serving.worker.engine.sampling.noise import token_words
from mlx_serving.worker.engine.sampling.parameters import RowSampling
from mlx_serving.worker.engine.sampling.reference import ReferenceDraw
from mlx_serving.worker.engine.sampling.sampler import BatchSampler, MakeDraw

_native = load_native()[0]


def _on_host(*, by_groups: bool) -> MakeDraw:
    return lambda parameters, _: NativeDraw(cast("Any", _native), parameters, by_groups=by_groups)


# What this machine has, for a contract test to run over.
REFERENCE: Any = pytest.param(ReferenceDraw, id="reference")
_GPU: Any = [pytest.param(KernelDraw, id="kernel")] if dialect() else []
_CPU: Any = [pytest.param(_on_host(by_groups=False), id="native")] if _native else []
_GROUP: Any = [pytest.param(_on_host(by_groups=True), id="kernel on the host")] if _native else []
KERNELS: Any = [*_CPU, *_GROUP, *_GPU]
IMPLEMENTATIONS: Any = [REFERENCE, *KERNELS]
# Without the one whose threads are slow to meet, for tests that draw thousands of times.
FAST_IMPLEMENTATIONS: Any = [REFERENCE, *_CPU, *_GPU]


def ints(array: mx.array) -> list[int]:
    """A one-dimensional array's integers."""
    return [int(str(value)) for value in array.tolist()]  # type: ignore[union-attr]


def sample(
    make: MakeDraw, rows: Iterable[RowSampling], logits: mx.array, **inputs: mx.array
) -> list[int]:
    """The tokens of one call."""
    sampler = BatchSampler(rows, token_words(logits.shape[1]), make)
    return ints(sampler.sample(logits, **inputs).tokens)


def bits_of(allowed: Iterable[int], vocab_size: int) -> list[int]:
    """One row of a mask: int32 words with a bit a token."""
    words = [0] * -(-vocab_size // 32)
    for token in allowed:
        words[token // 32] |= 1 << token % 32
    return [word - (1 << 32) if word >> 31 else word for word in words]


def greedy(**fields: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, **fields)
