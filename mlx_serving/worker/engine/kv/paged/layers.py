"""One layer's keys and values in blocks, and the interface of the operations on them.

`reference.ReferenceOps` implements it in MLX, `kernel_ops.KernelOps` by kernels on a GPU, in place.
Both store a decode step's own keys and values and attend over all tokens of each row, those
included.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx


@dataclass(slots=True)
class StepPlan:
    """The rows of a step, as arrays on the device.

    `table` int32 [B, W]: the blocks of each row in order, then any valid ids. `lengths` int32
    [B]: tokens in the cache before this step. `advance` int32 [B]: how many tokens a step adds, 0
    for rows that pad the batch. `work` int32 [I, 3]: (row, first token, end) of each item of work,
    in order of rows, then items of row -1, which pad it; the last item of a row may end after its
    tokens. `firsts` int32 [B + 1]: the first item of each row, then the number of items. `split`:
    whether a row has several items; else item i is row i. `mixed`: whether rows attend to tokens
    that other rows of this step store: those rows are tokens of prompts.
    """

    table: mx.array
    lengths: mx.array
    advance: mx.array
    work: mx.array
    firsts: mx.array
    split: bool
    mixed: bool = False


@dataclass(frozen=True, slots=True)
class StoreEntry:
    """Tokens [first, first + count) of a prompt, to store at the start of a block."""

    block: int
    prompt: int
    first: int
    count: int


class PagedOps(Protocol):
    """Operations on a layer's blocks. `in_place`: they write to the pools' own buffers.

    `ordered_by_stream`: kernels run one after the other, in the order of their launch.
    """

    in_place: bool
    ordered_by_stream: bool

    def store(
        self,
        layer: "PagedLayer",
        keys: mx.array,
        values: mx.array,
        entries: Sequence[StoreEntry],
        after: mx.array,
    ) -> mx.array:
        """Copy from keys and values [P, KVH, S, D] into blocks that no running step reads.

        Returns int32 [1], 0, which depends on the copy and on `after`, of the same shape.
        """

    def attend(
        self,
        layer: "PagedLayer",
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scale: float,
        plan: StepPlan,
    ) -> mx.array:
        """Store keys and values [B, KVH, 1, D]; attend with queries [B, H, 1, D]."""


class PagedLayer:
    """A layer's cache, as an mlx-lm model takes it in a decode step of one token a row.

    `keys` and `values` are [blocks, KV heads, block tokens, head dim].
    """

    plan: StepPlan  # set before each step

    def __init__(self, ops: PagedOps, keys: mx.array, values: mx.array) -> None:
        self.keys = keys
        self.values = values
        self.views: tuple[mx.array, ...] = ()  # the pools' first blocks, on the same buffers
        self._ops = ops

    @property
    def offset(self) -> mx.array:
        """Each row's position: int32 [B]."""
        return self.plan.lengths

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Return the step's keys and values unchanged: `attend` stores them."""
        return keys, values

    def make_mask(
        self,
        tokens: int,
        return_array: bool = False,  # noqa: FBT001, FBT002 - mlx-lm's signature
        window_size: int | None = None,
    ) -> None:
        """Return no mask: a row attends to all of its own tokens and to no others.

        Raises:
            ValueError: the model asks for several tokens, a mask or a window.
        """
        if tokens != 1 or return_array or window_size:
            message = "a paged cache takes one token a row and knows no mask and no window"
            raise ValueError(message)

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, scale: float) -> mx.array:
        """Store the step's keys and values, attend; returns [B, H, 1, D]."""
        return self._ops.attend(self, queries, keys, values, scale, self.plan)

    def store(
        self, keys: mx.array, values: mx.array, entries: Sequence[StoreEntry], after: mx.array
    ) -> mx.array:
        """Copy prefilled keys and values into blocks; see `PagedOps.store`."""
        return self._ops.store(self, keys, values, entries, after)

    @property
    def nbytes(self) -> int:
        """Bytes of the pools."""
        return self.keys.nbytes + self.values.nbytes

    def view(self) -> tuple[mx.array, ...]:
        """Make views of the pools, which are computed by now, if they are written in place."""
        self.views = (self.keys[:1], self.values[:1]) if self._ops.in_place else ()
        return self.views


def resize(
    layers: Sequence[PagedLayer], blocks: int, kept: Sequence[int] | None = None, *, at_once: int
) -> None:
    """Copy into pools of `blocks` blocks: the blocks `kept` first, in order; None: all blocks.

    No step may be running. `at_once`: bytes of pools that may exist twice meanwhile (at least one
    layer's). If memory is short for some layers, those keep their old pools.
    """
    step = max(1, at_once // max(layer.nbytes for layer in layers))
    for first in range(0, len(layers), step):
        some = layers[first : first + step]
        pools = [[_resized(p, blocks, kept) for p in (layer.keys, layer.values)] for layer in some]
        mx.eval(pools)
        for layer, (keys, values) in zip(some, pools, strict=True):
            layer.keys, layer.values = keys, values
        del pools
        materialize(some)


def materialize(layers: Sequence[PagedLayer]) -> None:
    """Compute layers' pools, and views of them if they are written in place."""
    mx.eval([pool for layer in layers for pool in (layer.keys, layer.values)])
    mx.eval([view for layer in layers for view in layer.view()])


def _resized(pool: mx.array, blocks: int, kept: Sequence[int] | None) -> mx.array:
    if kept is not None:
        pool = pool[mx.array(list(kept), dtype=mx.int32)]
    unused = mx.zeros((blocks - pool.shape[0], *pool.shape[1:]), pool.dtype)
    return mx.concatenate([pool, unused])
