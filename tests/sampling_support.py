"""Sampler implementations and helpers for their tests."""

from collections.abc import Iterable
from typing import Any, Final

import mlx.core as mx
import pytest

from mlx_serving.worker.engine.kernels import dialect
from mlx_serving.worker.engine.sampling import (
    BatchSampler,
    MakeDraw,
    ReferenceDraw,
    RowSampling,
    token_words,
)
from mlx_serving.worker.engine.sampling.kernel import KernelDraw
from mlx_serving.worker.engine.sequence import SamplingParams
from tests.sampler_on_host import COMPILER, HostGroupDraw, HostKernelDraw

# What this machine has, for a contract test to run over.
REFERENCE: Any = pytest.param(ReferenceDraw, id="reference")
_HAS_GPU: Final = dialect() is not None
_DEVICE: Any = [pytest.param(KernelDraw, id="kernel")] if _HAS_GPU else []
_HOST: Any = [pytest.param(HostKernelDraw, id="kernel-on-host")] if COMPILER else []
_GROUP: Any = [pytest.param(HostGroupDraw, id="group-on-host")] if COMPILER else []
KERNELS: Any = [*_HOST, *_GROUP, *_DEVICE]
IMPLEMENTATIONS: Any = [REFERENCE, *KERNELS]
# Without the one whose threads are slow to start, for tests that draw thousands of times.
FAST_IMPLEMENTATIONS: Any = [REFERENCE, *_HOST, *_DEVICE]


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
