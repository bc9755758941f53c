"""Blocks of the paged cache as the beginning of mlx-lm's own caches, for prefill to go on from."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache

Pools = Sequence[tuple[mx.array, mx.array]]  # a layer's keys and values: [blocks, KVH, T, D] each


def gather_blocks(
    pools: Pools, prompts: Sequence[Sequence[int]], tokens: int, after: mx.array
) -> list[Any]:
    """Return a plain cache a layer, which holds so many tokens of each prompt.

    `prompts` are each one's blocks, which hold that many at least. `after`: int32 [1], 0; what
    it depends on comes first.
    """
    count = -(-tokens // pools[0][0].shape[2])
    table = mx.array([list(blocks[:count]) for blocks in prompts], dtype=mx.int32) + after
    return [_layer(_take(keys, table), _take(values, table), tokens) for keys, values in pools]


def _take(pool: mx.array, table: mx.array) -> mx.array:
    """Return the prompts' tokens in order: [P, KVH, W x T, D]."""
    blocks = pool[table].transpose(0, 2, 1, 3, 4)
    prompts, heads, _, _, head_dim = blocks.shape
    return blocks.reshape(prompts, heads, -1, head_dim)


def _layer(keys: mx.array, values: mx.array, tokens: int) -> KVCache:
    layer = KVCache()
    layer.state = (keys, values, tokens)
    return layer
