"""The paged KV cache of the decode batch: cost and memory follow live tokens.

Every layer has one pool of blocks; a row owns as many as its tokens need. Rows that join bring
their prompt into free blocks, rows that leave give theirs back; nothing else is touched. Choices
of one prompt share its full blocks (vLLM's paged KV cache: Kwon et al., 2023).

The pools grow as rows need them and shrink when most of them is unused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import mlx.core as mx
import numpy as np

from mlx_serving.worker.engine.block_allocator import BlockAllocator
from mlx_serving.worker.engine.decode_cache import Prefilled
from mlx_serving.worker.engine.gathering import gather_blocks
from mlx_serving.worker.engine.paged_attention import PagedLayer, PagedOps, StepPlan, StoreEntry
from mlx_serving.worker.engine.prefix_cache import PrefixCache
from mlx_serving.worker.engine.prefix_index import PrefixKey

BLOCK_TOKENS: Final = 32
# A row gets its next block when fewer free places than this are left, so that the rows' tables
# change once in so many steps and not in each.
LOOKAHEAD_TOKENS: Final = 8
GROWTH_BLOCKS: Final = 16  # the least by which a pool grows; above, a sixteenth of itself
CHUNK_TOKENS: Final = 512  # of a row that one item of work covers, at least
_END: Final = 2**31 - 1


@dataclass(frozen=True, slots=True)
class LayerShape:
    """A layer's KV heads, their size and type."""

    heads: int
    head_dim: int
    dtype: mx.Dtype


class PagedCache:
    """See `DecodeCache`."""

    def __init__(self, shapes: Sequence[LayerShape], ops: PagedOps) -> None:
        """Start without rows and without pools."""
        self.allocator = BlockAllocator(_END)
        self._prefixes: PrefixCache | None = None
        self.layers: list[PagedLayer] = []
        self._shapes = shapes
        self._ops = ops
        self._rows: list[list[int]] = []  # each row's blocks
        self._lengths = np.zeros(0, dtype=np.int32)  # each row's tokens, as of the last step begun
        self._leaving: list[int] = []  # blocks of rows that left: a running step may write there
        self._steps_left = 0  # steps until a row is out of room
        self._plan: StepPlan | None = None  # None: rows or blocks changed
        self._stored = mx.zeros((1,), mx.int32)  # depends on every store so far

    @property
    def blocks(self) -> int:
        """Blocks that exist in each pool."""
        return self.layers[0].keys.shape[0] if self.layers else 0

    def limit(self, tokens: int) -> None:
        """Bound each pool to whole blocks of so many tokens."""
        self.allocator.limit = tokens // BLOCK_TOKENS

    def join(self, prefilled: Prefilled) -> None:
        """Append rows: each prompt is copied into blocks, its full ones once for all its rows."""
        needed = sum(self._blocks_of_prompt(prefilled, p) for p in range(len(prefilled.lengths)))
        self._make_room(needed)
        entries: list[StoreEntry] = []
        shared = self._store_full_blocks(prefilled, entries)
        lengths = [prefilled.lengths[prompt] for prompt in prefilled.prompts]
        for prompt, length in zip(prefilled.prompts, lengths, strict=True):
            self._rows.append(self._row_of(prompt, length, shared[prompt], entries))
        for blocks in shared:
            self.allocator.free(blocks)  # the prompt itself lets go; its rows keep them
        self._lengths = np.concatenate([self._lengths, np.array(lengths, dtype=np.int32)])
        self._grow()
        if entries:
            self._store(prefilled, entries)
        self._plan = None

    def _blocks_of_prompt(self, prefilled: Prefilled, prompt: int) -> int:
        length = prefilled.lengths[prompt]
        copies = sum(index == prompt for index in prefilled.prompts)
        return length // BLOCK_TOKENS + copies * (length % BLOCK_TOKENS > 0)

    def _store_full_blocks(
        self, prefilled: Prefilled, entries: list[StoreEntry]
    ) -> list[list[int]]:
        """Allocate each prompt's full blocks, which its rows share."""
        shared = []
        for prompt, length in enumerate(prefilled.lengths):
            known = self._prefixes.acquire(prefilled.keys[prompt]) if self._prefixes else []
            blocks = self.allocator.allocate(length // BLOCK_TOKENS - len(known))
            entries += [
                StoreEntry(block, prompt, index * BLOCK_TOKENS, BLOCK_TOKENS)
                for index, block in enumerate(blocks, start=len(known))
            ]
            shared.append(known + blocks)
            if self._prefixes:
                self._prefixes.insert(prefilled.keys[prompt], shared[-1])
        return shared

    def _row_of(
        self, prompt: int, length: int, shared: list[int], entries: list[StoreEntry]
    ) -> list[int]:
        """Return a row's blocks: the shared ones, and its own for what does not fill a block."""
        self.allocator.share(shared)
        rest = length % BLOCK_TOKENS
        if not rest:
            return list(shared)
        (own,) = self.allocator.allocate(1)
        entries.append(StoreEntry(own, prompt, length - rest, rest))
        return [*shared, own]

    def _store(self, prefilled: Prefilled, entries: list[StoreEntry]) -> None:
        """Copy the prompts in, layer by layer, so that one layer at a time is there twice."""
        single = len(prefilled.lengths) == 1
        for index, layer in enumerate(self.layers):
            source = prefilled.layers[index]
            keys, values = source.keys, source.values
            placed = entries
            if not single:  # right-justified
                starts = [source.size() - length for length in prefilled.lengths]
                placed = [
                    StoreEntry(e.block, e.prompt, starts[e.prompt] + e.first, e.count)
                    for e in entries
                ]
            self._stored = self._stored + layer.store(keys, values, placed)
            mx.async_eval(self._stored)
            prefilled.layers[index] = None

    def keep(self, kept: Sequence[int]) -> None:
        """Keep only these rows; copies nothing."""
        staying = set(kept)
        for index, blocks in enumerate(self._rows):
            if index not in staying:
                self._leaving += blocks
        self._rows = [self._rows[index] for index in kept]
        self._lengths = self._lengths[np.array(kept, dtype=np.int64)]
        self._plan = None
        if not kept:
            self._drop()

    def begin_step(self) -> None:
        """Give rows their next blocks; bring what changed to the device."""
        if self._steps_left == 0 or self._plan is None:
            self._extend_rows()
            self._plan = self._make_plan()
            for layer in self.layers:
                layer.plan = self._plan

    def end_step(self) -> None:
        """Count the step's tokens, on the host and on the device."""
        self._lengths += 1
        self._steps_left -= 1
        if self._plan is not None:
            self._plan.lengths = self._plan.lengths + 1

    def settle(self) -> None:
        """Free the blocks of rows that left."""
        self.allocator.free(self._leaving)
        self._leaving = []

    def _extend_rows(self) -> None:
        """Allocate the next block of each row that is close to the end of its last one."""
        short = [
            index
            for index, (blocks, length) in enumerate(
                zip(self._rows, self._lengths.tolist(), strict=True)
            )
            if len(blocks) * BLOCK_TOKENS - length < LOOKAHEAD_TOKENS
        ]
        if short:
            self._make_room(len(short))
            for index, block in zip(short, self.allocator.allocate(len(short)), strict=True):
                self._rows[index].append(block)
            self._grow()
        rooms = [len(blocks) * BLOCK_TOKENS for blocks in self._rows] - self._lengths
        self._steps_left = int(rooms.min())

    def _make_plan(self) -> StepPlan:
        width = 1 << (max(map(len, self._rows)) - 1).bit_length()
        table = np.zeros((len(self._rows), width), dtype=np.int32)
        work: list[tuple[int, int, int]] = []
        firsts = [0]
        for index, blocks in enumerate(self._rows):
            table[index, : len(blocks)] = blocks
            parts = max(1, len(blocks) * BLOCK_TOKENS // CHUNK_TOKENS)
            bounds = [part * CHUNK_TOKENS for part in range(parts)] + [_END]
            work += [(index, bounds[part], bounds[part + 1]) for part in range(parts)]
            firsts.append(len(work))
        return StepPlan(
            mx.array(table),
            mx.array(self._lengths) + self._stored,  # after every store
            mx.array(work, dtype=mx.int32),
            mx.array(firsts, dtype=mx.int32),
            split=len(work) > len(self._rows),
        )

    def _make_room(self, blocks: int) -> None:
        """See that the allocator can give `blocks`: leavings of a step that still runs count."""
        if not self.allocator.can_allocate(blocks):
            mx.synchronize()
            self.settle()

    def _grow(self) -> None:
        """Let the pools hold what the allocator handed out."""
        needed, blocks = self.allocator.extent, self.blocks
        if needed <= blocks:
            return
        size = max(needed, min(blocks + max(GROWTH_BLOCKS, blocks // 16), self.allocator.limit))
        if not self.layers:
            self.layers = [self._new_layer(shape, size) for shape in self._shapes]
            mx.eval([(layer.keys, layer.values) for layer in self.layers])
            return
        mx.synchronize()
        for layer in self.layers:
            layer.resize(size)

    def _new_layer(self, shape: LayerShape, blocks: int) -> PagedLayer:
        pool = (blocks, shape.heads, BLOCK_TOKENS, shape.head_dim)
        return PagedLayer(self._ops, mx.zeros(pool, shape.dtype), mx.zeros(pool, shape.dtype))

    def _drop(self) -> None:
        """Forget the pools: no row is left. A running step keeps them alive until it is done."""
        if self._prefixes:
            mx.synchronize()  # the pools stay, and blocks that a running step writes to are freed
        self.settle()
        if not self.allocator.used:
            self.layers = []

    def use_prefixes(self, prefixes: PrefixCache) -> None:
        """See `DecodeCache`; call it before any row joins."""
        self.allocator = self._prefixes = prefixes

    def gather(self, prefixes: Sequence[Sequence[int]]) -> list[Any]:
        """See `DecodeCache`."""
        return gather_blocks(
            [(layer.keys, layer.values) for layer in self.layers], prefixes, self._stored
        )

    def remember(self, row: int, key: PrefixKey | None) -> None:
        """See `DecodeCache`."""
        if self._prefixes and key is not None:
            self._prefixes.insert(key, self._rows[row])
        elif self._prefixes:
            self._prefixes.forget(self._rows[row])
