"""Sampler implementations and helpers for their tests."""

from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import pytest

from mlx_serving.worker.engine.sampling import (
    BatchSampler,
    MakeDraw,
    ReferenceDraw,
    RowSampling,
    token_words,
)
from mlx_serving.worker.engine.sampling.kernel import KernelDraw, gpu_dialect
from mlx_serving.worker.engine.sequence import SamplingParams
from tests.sampler_on_host import COMPILER, HostGroupDraw, HostKernelDraw

_needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
_needs_gpu = pytest.mark.skipif(gpu_dialect() is None, reason="needs a GPU")

REFERENCE: Any = pytest.param(ReferenceDraw, id="reference")
KERNEL_ON_HOST: Any = pytest.param(HostKernelDraw, id="kernel-on-host", marks=_needs_compiler)
GROUP_ON_HOST: Any = pytest.param(HostGroupDraw, id="group-on-host", marks=_needs_compiler)
KERNEL: Any = pytest.param(KernelDraw, id="kernel", marks=_needs_gpu)
IMPLEMENTATIONS: Any = [REFERENCE, KERNEL_ON_HOST, GROUP_ON_HOST, KERNEL]
KERNELS: Any = IMPLEMENTATIONS[1:]


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
