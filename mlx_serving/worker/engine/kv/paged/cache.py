"""The paged KV cache of the decode batch: time and memory follow the tokens of its rows.

Every layer has one pool of blocks; a row owns as many blocks as its tokens need. A row that joins
copies its prompt into free blocks, a row that leaves frees its blocks; nothing else is copied.
Choices of one prompt share its full blocks (vLLM's paged KV cache: Kwon et al., 2023).

The pools grow before rows need them, and shrink if most blocks are unused.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import mlx.core as mx
import numpy as np

from mlx_serving.worker.engine.failures import LaunchedWorkError, launched_work
from mlx_serving.worker.engine.kv import padded
from mlx_serving.worker.engine.kv.interface import ParkedRow, Prefilled, Prompt
from mlx_serving.worker.engine.kv.padded import LanguageModel
from mlx_serving.worker.engine.kv.paged.block_allocator import BlockAllocator
from mlx_serving.worker.engine.kv.paged.layers import PagedLayer, PagedOps, StepPlan, StoreEntry
from mlx_serving.worker.engine.kv.paged.placement import BlockPlacement
from mlx_serving.worker.engine.kv.paged.pools import (
    LayerShape,
    Pools,
    finish_writes,
    gather_blocks,
    wait_for_launched,
)
from mlx_serving.worker.engine.kv.paged.step import (
    BatchRows,
    Context,
    compiled_step,
    make_plan,
    plain_step,
    round_up,
)
from mlx_serving.worker.engine.kv.prefix.cache import PrefixCache
from mlx_serving.worker.engine.kv.prefix.index import PrefixKey

BLOCK_TOKENS: Final = 32
# A row gets its next block when its last one has fewer free places than this, so that the rows'
# tables change once in so many steps and not in each.
LOOKAHEAD_TOKENS: Final = 8
# Pools have at least so many blocks beyond those in use, two for each row, or an eighth of them.
SLACK_BLOCKS: Final = 64
RECLAIMED_PART: Final = 1 / 8  # of the idle blocks: may be evicted at once to avoid larger pools
PROMPT_TOKENS: Final = 32  # prompts are padded to a multiple of so many tokens
LONG_TOKENS: Final = 1024  # prompts of more tokens are copied in layer by layer
_UNBOUNDED: Final = 2**31 - 1


class PagedCache:
    """Rows in blocks; implements `interface.BlockCache`."""

    def __init__(self, model: LanguageModel, shapes: Sequence[LayerShape], ops: PagedOps) -> None:
        """Start without rows and without pools."""
        self.allocator = BlockAllocator(_UNBOUNDED)
        self._prefixes: PrefixCache | None = None
        self._pools = Pools(shapes, BLOCK_TOKENS, ops)
        self._model, self._ops = model, ops
        self._rows: list[list[int]] = []  # each row's blocks
        self._parked: list[ParkedRow] = []
        self._lengths = np.zeros(0, dtype=np.int32)  # each row's tokens, as of the last step begun
        self._leaving: list[int] = []  # blocks of rows that left: the running step may write there
        self._contexts: list[Context] = []  # of rows that joined, for the next step to compute
        self._steps_left = 0  # steps until a row needs another block
        self._plan: StepPlan | None = None  # None: rows or blocks changed
        self._stored = mx.zeros((1,), mx.int32)  # 0; depends on every store so far
        self._padding_block: int | None = None  # written by the rows that pad a batch
        self._step = compiled_step(model, ops) if ops.in_place else plain_step(model)

    @property
    def blocks(self) -> int:
        """Blocks that exist in each pool."""
        return self._pools.blocks

    @property
    def layers(self) -> list[PagedLayer]:
        """Each layer's pools."""
        return self._pools.layers

    @property
    def nbytes(self) -> int:
        """See `DecodeCache`."""
        return self._pools.nbytes

    def limit(self, tokens: int) -> None:
        """Limit each pool to whole blocks of so many tokens, and the padding block."""
        self.allocator.limit = tokens // BLOCK_TOKENS + 1
        self._pools.limit(self.allocator.limit)

    def new_prompts(self, prompts: int) -> list[Any]:
        """Return mlx-lm's plain caches: they hold several prompts, padded on the right."""
        del prompts
        return padded.new_cache(self._model, 1)

    def forward_prompts(self, contexts: list[list[int]], layers: list[Any]) -> None:
        """Pad on the right: no token attends to padding, and `join` gets the lengths.

        Lengths are rounded up too: for each new shape, a GPU's libraries search for a kernel.
        """
        longest = max(map(len, contexts))
        length = round_up(longest, PROMPT_TOKENS)
        self._model(padded.padded(contexts, length), cache=layers)
        for layer in layers:
            layer.trim(length - longest)  # the prompt's next chunk begins there

    def join(self, prefilled: Prefilled) -> None:
        """Append rows: copy each prompt into blocks, its full blocks once for all of its rows."""
        with self._placing() as placing:
            self._make_room(placing.count_prefilled(prefilled))
            placing.place_prefilled(prefilled)
            self._grow()
            finish_writes(self._ops, self._stored)
            self._append(placing, self._store(prefilled, placing.entries))

    def enter(self, prompts: Sequence[Prompt]) -> None:
        """Append rows with cached blocks, and new ones that the next step computes."""
        with self._placing() as placing:
            self._make_room(placing.count_prompts(prompts))
            placing.place_prompts(prompts)
            self._grow()
            self._append(placing, self._copy(placing.entries))

    @contextmanager
    def _placing(self) -> Iterator[BlockPlacement]:
        """Allocate blocks for rows that join; after an error, free them: other rows are unchanged.

        Raises:
            LaunchedWorkError: the step under way failed; raised in place of any other error.
        """
        placing = BlockPlacement(
            self.allocator,
            self._prefixes,
            block_tokens=BLOCK_TOKENS,
            first_row=len(self._rows),
        )
        try:
            self._need_padding_block()
            yield placing
        except Exception as error:
            self._wait_and_give_back(placing, error)
            raise

    def _wait_and_give_back(self, placing: BlockPlacement, error: Exception) -> None:
        """Free the blocks of a failed join, after launched work that may read or write them."""
        try:
            wait_for_launched()
        except LaunchedWorkError:
            if not isinstance(error, LaunchedWorkError):
                raise
        finally:
            placing.give_back()
            self._plan = None
            if not self._rows:
                self._leave_pools()

    def _need_padding_block(self) -> int:
        if self._padding_block is None:
            (self._padding_block,) = self.allocator.allocate(1)
        return self._padding_block

    def _free_padding_block(self) -> None:
        if self._padding_block is not None:
            self.allocator.free([self._padding_block])
            self._padding_block = None

    def _append(self, placing: BlockPlacement, stored: mx.array) -> None:
        lengths = np.concatenate([self._lengths, np.array(placing.lengths, dtype=np.int32)])
        placing.publish()
        self._rows += placing.rows
        self._contexts += placing.contexts
        self._lengths, self._stored, self._plan = lengths, stored, None

    def _store(self, prefilled: Prefilled, entries: Sequence[StoreEntry]) -> mx.array:
        """Copy the prompts in; long ones layer by layer, so that only one layer exists twice."""
        stored = self._stored
        long = sum(prefilled.lengths) > LONG_TOKENS
        for index, layer in enumerate(self.layers if entries else ()):
            source = prefilled.layers[index]
            stored = layer.store(source.keys, source.values, entries, stored)
            if long:
                mx.async_eval(stored)
            prefilled.layers[index] = None
        return stored

    def _copy(self, entries: Sequence[StoreEntry]) -> mx.array:
        """Copy the cached parts of blocks into the rows' own blocks."""
        stored = self._stored
        if entries:
            finish_writes(self._ops, stored)
            for layer in self.layers:
                stored = layer.store(layer.keys, layer.values, entries, stored)
        return stored

    def keep(self, kept: Sequence[int]) -> None:
        """Keep only these rows; copies nothing."""
        self._contexts = []  # not empty only after a step with new rows failed: they leave now
        staying = set(kept)
        for index, blocks in enumerate(self._rows):
            if index not in staying:
                self._leaving += blocks
        self._rows = [self._rows[index] for index in kept]
        self._lengths = self._lengths[np.array(kept, dtype=np.int64)]
        self._plan = None
        if not kept:
            self._drop()

    def step(self, tokens: mx.array) -> mx.array:
        """Build the model's step; the tables change only if rows or their blocks changed."""
        rows = len(self._rows)
        self._grow_ahead()
        if self._plan is None or not self._steps_left:
            self._shrink()
            self._extend_rows()
            batch = BatchRows(self._rows, self._lengths, self._need_padding_block())
            self._plan = make_plan(batch, self._contexts, self._stored)
        filling = self._plan.lengths.shape[0] - rows
        if filling:
            tokens = mx.concatenate([tokens, self._take_contexts(filling)])
        if self._plan.mixed:
            mx.async_eval(tokens)  # by itself: see `ModelRunner._forward`
        logits, self._plan.lengths = self._step(tokens, self._plan, self.layers)
        if self._plan.mixed:
            self._plan = None
        self._lengths += 1
        self._steps_left -= 1
        return logits[:rows] if filling else logits

    def _take_contexts(self, count: int) -> mx.array:
        """Return the prompts' tokens that the step computes beside its rows': int32 [count]."""
        tokens = [token for context in self._contexts for token in context.tokens]
        self._contexts = []
        return mx.array(tokens + [0] * (count - len(tokens)), dtype=mx.int32)

    def settle(self) -> None:
        """Free the blocks of rows that left."""
        self.allocator.free(self._leaving)
        self._leaving = []

    def _extend_rows(self) -> None:
        """Allocate the next block of each row that has almost filled its last one."""
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

    def _make_room(self, blocks: int) -> None:
        """Free what is needed so that `blocks` can be allocated, if need be after the running step.

        If the pools would have to grow for them, evict a few idle blocks of the prefix cache
        instead. Not more than a few: cached prefixes are worth a step that waits.
        """
        if not self.allocator.can_allocate(blocks):
            wait_for_launched()
            self.settle()
        missing = blocks - (self.blocks - self.allocator.used)
        if self.layers and missing <= RECLAIMED_PART * self.allocator.idle:
            self.allocator.reclaim(missing)

    def _grow(self) -> None:
        """Grow the pools to the blocks that are allocated."""
        needed = self.allocator.extent
        if needed > self.blocks:
            self._launch_stores()
            self._pools.need(max(needed, self._wanted()))

    def _grow_ahead(self) -> None:
        """Grow the pools a little if they may soon be too small for the next block of every row."""
        blocks = self.blocks
        if blocks - self.allocator.used < len(self._rows) + LOOKAHEAD_TOKENS:
            wanted = self._wanted()
            if wanted > blocks:
                self._launch_stores()
                self._pools.grow_ahead(wanted)

    def _launch_stores(self) -> None:
        """Launch pending stores, since the pools are copied next."""
        with launched_work():
            mx.async_eval(self._stored)

    def _wanted(self) -> int:
        """Return how many blocks the pools should have for those in use."""
        used = self.allocator.used
        slack = max(SLACK_BLOCKS, 2 * len(self._rows), used // 8)
        return min(used + slack, self.allocator.limit)

    def _shrink(self) -> None:
        """Compact the pools if most blocks are unused."""
        size = self._wanted()
        if self.blocks > 2 * size:
            self._compact(size)

    def shrink(self) -> None:
        """See `DecodeCache`."""
        wait_for_launched()
        self.settle()
        if not self.allocator.used:
            self._pools.drop()
        elif self.blocks > self.allocator.used:
            self._compact(self.allocator.used)
            self._plan = None

    def reset(self) -> None:
        """See `DecodeCache`. Only rows and the prefix index may own blocks."""
        self.allocator.free([block for row in self._rows for block in row])
        self.allocator.free([block for parked in self._parked for block in parked.state])
        self.allocator.free(self._leaving)
        self._free_padding_block()
        if self._prefixes:
            self._prefixes.clear()
        self._rows, self._leaving = [], []
        self._parked, self._contexts = [], []
        self._pools.drop()
        self._lengths = np.zeros(0, dtype=np.int32)
        self._plan, self._stored = None, mx.zeros((1,), mx.int32)

    def _compact(self, size: int) -> None:
        """Move the used blocks to the beginning of new pools of so many blocks."""
        wait_for_launched(self._stored)
        self.settle()
        moved = self.allocator.compact()
        self._rows = [[moved[block] for block in row] for row in self._rows]
        for parked in self._parked:
            parked.state[:] = [moved[block] for block in parked.state]
        if self._padding_block is not None:
            self._padding_block = moved[self._padding_block]
        self._pools.compact(list(moved), size)

    def _drop(self) -> None:
        """Let go of the pools: no row is left. A running step keeps them alive until it is done."""
        if self._prefixes or self._parked:
            wait_for_launched()  # the pools stay and may be written to
        self._leave_pools()
        if self.allocator.used:
            self._shrink()

    def _leave_pools(self) -> None:
        """Free what only rows need, and the pools if no block is used."""
        self.settle()
        self._free_padding_block()
        if not self.allocator.used:
            self._pools.drop()

    def use_prefixes(self, prefixes: PrefixCache) -> None:
        """See `BlockCache`; call it before any row joins."""
        self.allocator = self._prefixes = prefixes

    def gather(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[Any]:
        """See `BlockCache`."""
        finish_writes(self._ops, self._stored)
        pools = [(layer.keys, layer.values) for layer in self.layers]
        return gather_blocks(pools, prompts, tokens, self._stored)

    def remember(self, row: int, key: PrefixKey | None) -> None:
        """See `DecodeCache`."""
        self._enter(self._rows[row], key)

    def _enter(self, blocks: list[int], key: PrefixKey | None) -> None:
        if self._prefixes and key is not None:
            self._prefixes.insert(key, blocks)
        elif self._prefixes:
            self._prefixes.forget(blocks)

    def park(self, row: int) -> ParkedRow:
        """Keep the row's blocks: nothing is copied."""
        finish_writes(self._ops, self._stored)
        parked = ParkedRow(self._rows[row], int(self._lengths[row]))
        self._rows[row] = []  # so that `keep` frees nothing
        self._parked.append(parked)
        return parked

    def resume(self, parked: ParkedRow) -> None:
        """Append the row with its blocks."""
        finish_writes(self._ops, self._stored)
        self._need_padding_block()
        self._parked.remove(parked)
        self._rows.append(parked.state)
        self._lengths = np.append(self._lengths, np.int32(parked.length))
        self._plan = None

    def release(self, parked: ParkedRow, key: PrefixKey | None) -> None:
        """Free the row's blocks, and the pools if those were the last ones."""
        self._parked.remove(parked)
        self._enter(parked.state, key)
        self.allocator.free(parked.state)
        if not self._rows:
            self._drop()
