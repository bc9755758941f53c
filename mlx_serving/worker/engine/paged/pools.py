"""The pools of blocks of all layers: made, grown, moved together.

MLX can't make an array longer, so a pool that grows is copied into a new one. To get a new buffer
costs more than the copy (on an H200 0.3 ms for 30 MB, 3 ms for 450), and a model has two pools a
layer. So pools grow ahead of need, some layers at a time beside each step; only where need comes
first, a step waits for all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import mlx.core as mx

from mlx_serving.worker.engine.paged.layers import PagedLayer, PagedOps, materialize, resize
from mlx_serving.worker.engine.paged.order import wait_for_launched

RESIZED_BYTES: Final = 1 << 28  # of pools that are twice there while they grow
LEFT_BYTES: Final = 1 << 30  # of old pools, what may stay among MLX's cached buffers: so many, …
LEFT_FRACTION: Final = 1 / 16  # … or so much of all that pools may hold
STEPS_TO_GROW: Final = 32  # in so many steps all layers grow


@dataclass(frozen=True, slots=True)
class LayerShape:
    """A layer's KV heads, their size and type."""

    heads: int
    head_dim: int
    dtype: mx.Dtype


class Pools:
    """Each layer's keys and values, [blocks, KV heads, block tokens, head dim].

    Layers may have more blocks than `blocks` while the pools grow.
    """

    def __init__(self, shapes: Sequence[LayerShape], block_tokens: int, ops: PagedOps) -> None:
        """Start without any."""
        self.layers: list[PagedLayer] = []
        self._shapes, self._block_tokens, self._ops = shapes, block_tokens, ops
        self._left = 0  # bytes of old pools since MLX's cached buffers were given back
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
        """Know how many blocks there will ever be."""
        tokens = blocks * self._block_tokens
        values = sum(2 * shape.heads * shape.head_dim * shape.dtype.size for shape in self._shapes)
        self._may_leave = max(LEFT_BYTES, int(LEFT_FRACTION * tokens * values))

    def need(self, blocks: int) -> None:
        """Have so many blocks now; may wait for the step under way."""
        if not self.layers:
            layers = [self._new_layer(shape, blocks) for shape in self._shapes]
            materialize(layers)
            self.layers = layers
        else:
            self._grow(self._shorter(blocks), blocks)

    def grow_ahead(self, blocks: int) -> None:
        """Let a few of the layers with fewer blocks have so many, those with the fewest first."""
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
        # The old pools' buffers fit nothing else, but to clear has the next step ask the system
        # for all of its memory again: few bytes wait for the runner, which clears now and then.
        if self._left > self._may_leave:
            self._left = 0
            mx.clear_cache()

    def compact(self, kept: Sequence[int], blocks: int) -> None:
        """Keep these blocks, in order, in pools of so many; memory may be short."""
        resize(self.layers, blocks, kept, at_once=0)
        self._left = 0
        mx.clear_cache()

    def drop(self) -> None:
        """Forget them all; a step under way keeps what it uses."""
        self.layers = []

    def _new_layer(self, shape: LayerShape, blocks: int) -> PagedLayer:
        pool = (blocks, shape.heads, self._block_tokens, shape.head_dim)
        keys, values = (mx.zeros(pool, shape.dtype) for _ in range(2))
        return PagedLayer(self._ops, keys, values)
