"""Blocks of the paged cache as the beginning of mlx-lm's own caches, for prefill to go on from."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import BatchKVCache, KVCache

Pools = Sequence[tuple[mx.array, mx.array]]  # a layer's keys and values: [blocks, KVH, T, D] each


def gather_blocks(pools: Pools, prompts: Sequence[Sequence[int]], after: mx.array) -> list[Any]:
    """Return a cache a layer: plain for one prompt, batched and right-justified for several.

    `prompts` are each prompt's blocks. `after`: int32 [1], 0; what it depends on comes first.
    """
    block_tokens = pools[0][0].shape[2]
    widest = max(map(len, prompts))
    table = np.zeros((len(prompts), widest), dtype=np.int32)
    for row, blocks in enumerate(prompts):
        table[row, widest - len(blocks) :] = blocks
    padding = [(widest - len(blocks)) * block_tokens for blocks in prompts]
    picked = mx.array(table) + after
    return [_layer(_take(keys, picked), _take(values, picked), padding) for keys, values in pools]


def _take(pool: mx.array, table: mx.array) -> mx.array:
    """Return the prompts' tokens in order: [P, KVH, W x T, D]."""
    blocks = pool[table].transpose(0, 2, 1, 3, 4)
    prompts, heads, _, _, head_dim = blocks.shape
    return blocks.reshape(prompts, heads, -1, head_dim)


def _layer(keys: mx.array, values: mx.array, padding: list[int]) -> Any:  # noqa: ANN401 - untyped
    tokens = keys.shape[2]
    if len(padding) == 1:
        plain = KVCache()
        plain.state = (keys, values, tokens)
        return plain
    batch = BatchKVCache(padding)
    offsets = mx.array([tokens - pad for pad in padding])
    batch.state = (keys, values, offsets, mx.array(padding), tokens)
    return batch
