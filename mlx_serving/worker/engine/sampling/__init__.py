"""One sampler for the whole batch: a reference in pure MLX and fused kernels that equal it."""

from mlx_serving.worker.engine.sampling.logprobs import read_logprobs
from mlx_serving.worker.engine.sampling.noise import (
    hash_tokens,
    mix,
    negative_gumbel,
    position_keys,
    stream_key,
    token_words,
)
from mlx_serving.worker.engine.sampling.parameters import GREEDY_BELOW, Draws, Logprobs, RowSampling
from mlx_serving.worker.engine.sampling.reference import ReferenceDraw
from mlx_serving.worker.engine.sampling.sampler import BatchSampler, MakeDraw

__all__ = [
    "GREEDY_BELOW",
    "BatchSampler",
    "Draws",
    "Logprobs",
    "MakeDraw",
    "ReferenceDraw",
    "RowSampling",
    "hash_tokens",
    "mix",
    "negative_gumbel",
    "position_keys",
    "read_logprobs",
    "stream_key",
    "token_words",
]
