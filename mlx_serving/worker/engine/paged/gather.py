"""Blocks of the paged cache as the beginning of mlx-lm's own caches, for prefill to go on from."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache

Pools = Sequence[tuple[mx.array, mx.array]]  # a layer's keys and values: [blocks, KVH, T, D] each


def gather_blocks(pools: Pools, prompts: Sequence[Sequence[int]], after: mx.array) -> list[Any]:
    """Return a plain cache a layer, which begins with the blocks of each prompt.

    `prompts` have the same number of blocks each. `after`: int32 [1], 0; what it depends on
    comes first.
    """
    table = mx.array([list(blocks) for blocks in prompts], dtype=mx.int32) + after
    return [_layer(_take(keys, table), _take(values, table)) for keys, values in pools]


def _take(pool: mx.array, table: mx.array) -> mx.array:
    """Return the prompts' tokens in order: [P, KVH, W x T, D]."""
    blocks = pool[table].transpose(0, 2, 1, 3, 4)
    prompts, heads, _, _, head_dim = blocks.shape
    return blocks.reshape(prompts, heads, -1, head_dim)


def _layer(keys: mx.array, values: mx.array) -> KVCache:
    layer = KVCache()
    layer.state = (keys, values, keys.shape[2])
    return layer
