"""The pools of blocks of all layers: makes, grows, moves and gathers them, after running writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from mlx_serving.worker.engine.failures import launched_work
from mlx_serving.worker.engine.kv.paged.layers import PagedLayer, PagedOps, materialize, resize


def wait_for_launched(*stored: mx.array) -> None:
    """Launch stores, and wait for all launched work.

    Raises:
        LaunchedWorkError: some of it failed.
    """
    with launched_work():
        mx.async_eval(*stored)
        mx.synchronize()


def finish_writes(ops: PagedOps, stored: mx.array) -> None:
    """Wait for running steps and stores, unless kernels run in the order of their launch.

    `stored`: int32 [1], 0; depends on every store so far.

    Raises:
        LaunchedWorkError: see `wait_for_launched`.
    """
    if not ops.ordered_by_stream:
        wait_for_launched(stored)


LayerArrays = Sequence[tuple[mx.array, mx.array]]
"""Keys and values of each layer: [blocks, KVH, T, D] each."""


def gather_blocks(
    pools: LayerArrays, prompts: Sequence[Sequence[int]], tokens: int, after: mx.array
) -> list[Any]:
    """Return a plain cache for each layer, with the first `tokens` of each prompt.

    `prompts`: the blocks of each, with at least so many tokens. `after`: int32 [1], 0; the copy
    runs after the work that it depends on.
    """
    count = -(-tokens // pools[0][0].shape[2])
    table = mx.array([list(blocks[:count]) for blocks in prompts], dtype=mx.int32) + after
    return [_layer(_take(keys, table), _take(values, table), tokens) for keys, values in pools]


def _take(pool: mx.array, table: mx.array) -> mx.array:
    """Return the prompts' keys or values in order of tokens: [P, KVH, W x T, D]."""
    blocks = pool[table].transpose(0, 2, 1, 3, 4)
    prompts, heads, _, _, head_dim = blocks.shape
    return blocks.reshape(prompts, heads, -1, head_dim)


def _layer(keys: mx.array, values: mx.array, tokens: int) -> KVCache:
    layer = KVCache()
    layer.state = (keys, values, tokens)
    return layer


RESIZED_BYTES: Final = 1 << 28  # of pools that may exist twice while they grow
LEFT_BYTES: Final = 1 << 30  # of old pools that may stay in MLX's buffer cache: so many, …
LEFT_FRACTION: Final = 1 / 16  # … or this part of the largest size of all pools
STEPS_TO_GROW: Final = 32  # all layers grow within so many steps


@dataclass(frozen=True, slots=True)
class LayerShape:
    """The number, size and type of a layer's KV heads."""

    heads: int
    head_dim: int
    dtype: mx.Dtype


class Pools:
    """Each layer's keys and values, [blocks, KV heads, block tokens, head dim].

    Layers may have more blocks than `blocks` while the pools grow.
    """

    def __init__(self, shapes: Sequence[LayerShape], block_tokens: int, ops: PagedOps) -> None:
        """Start without pools."""
        self.layers: list[PagedLayer] = []
        self._shapes, self._block_tokens, self._ops = shapes, block_tokens, ops
        self._left = 0  # bytes of old pools in MLX's buffer cache
        self._may_leave = LEFT_BYTES

    @property
    def blocks(self) -> int:
        """Blocks that exist in every layer."""
        return min((layer.keys.shape[0] for layer in self.layers), default=0)

    @property
    def nbytes(self) -> int:
        """Bytes of all pools."""
        return sum(layer.nbytes for layer in self.layers)

    def limit(self, blocks: int) -> None:
        """Set the most blocks that there will be."""
        tokens = blocks * self._block_tokens
        values = sum(2 * shape.heads * shape.head_dim * shape.dtype.size for shape in self._shapes)
        self._may_leave = max(LEFT_BYTES, int(LEFT_FRACTION * tokens * values))

    def need(self, blocks: int) -> None:
        """Grow to so many blocks now; may wait for the running step."""
        if not self.layers:
            layers = [self._new_layer(shape, blocks) for shape in self._shapes]
            materialize(layers)
            self.layers = layers
        else:
            self._grow(self._shorter(blocks), blocks)

    def grow_ahead(self, blocks: int) -> None:
        """Grow a few of the layers to so many blocks, those with the fewest first."""
        count = -(-len(self.layers) // STEPS_TO_GROW)
        shortest = sorted(self._shorter(blocks), key=lambda layer: layer.keys.shape[0])
        self._grow(shortest[:count], blocks)

    def _shorter(self, blocks: int) -> list[PagedLayer]:
        return [layer for layer in self.layers if layer.keys.shape[0] < blocks]

    def _grow(self, layers: Sequence[PagedLayer], blocks: int) -> None:
        if not layers:
            return
        wait_for_launched()
        self._left += sum(layer.nbytes for layer in layers)
        resize(layers, blocks, at_once=RESIZED_BYTES)
        # Nothing else fits the old pools' buffers. But after a clear, the next step allocates all
        # of its memory anew: so a few bytes stay until the runner clears, now and then.
        if self._left > self._may_leave:
            self._left = 0
            mx.clear_cache()

    def compact(self, kept: Sequence[int], blocks: int) -> None:
        """Keep these blocks, in order, in new pools of so many; memory may be short."""
        resize(self.layers, blocks, kept, at_once=0)
        self._left = 0
        mx.clear_cache()

    def drop(self) -> None:
        """Drop all pools; a running step keeps those that it uses."""
        self.layers = []

    def _new_layer(self, shape: LayerShape, blocks: int) -> PagedLayer:
        pool = (blocks, shape.heads, self._block_tokens, shape.head_dim)
        keys, values = (mx.zeros(pool, shape.dtype) for _ in range(2))
        return PagedLayer(self._ops, keys, values)
