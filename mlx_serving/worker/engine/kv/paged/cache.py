"""The paged KV cache of the decode batch: cost and memory follow live tokens.

Every layer has one pool of blocks; a row owns as many as its tokens need. Rows that join bring
their prompt into free blocks, rows that leave give theirs back; nothing else is touched. Choices
of one prompt share its full blocks (vLLM's paged KV cache: Kwon et al., 2023).

The pools grow before rows need them and shrink when most of them is unused.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import mlx.core as mx
import numpy as np

from mlx_serving.worker.engine.failures import LaunchedWorkError, launched_work
from mlx_serving.worker.engine.kv import padded
from mlx_serving.worker.engine.kv.decode_cache import ParkedRow, Prefilled, Prompt
from mlx_serving.worker.engine.kv.padded import LanguageModel
from mlx_serving.worker.engine.kv.paged.block_allocator import BlockAllocator
from mlx_serving.worker.engine.kv.paged.layers import PagedLayer, PagedOps, StepPlan, StoreEntry
from mlx_serving.worker.engine.kv.paged.placement import Placement
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
# A row gets its next block when fewer free places than this are left, so that the rows' tables
# change once in so many steps and not in each.
LOOKAHEAD_TOKENS: Final = 8
# What pools have beyond the blocks in use: so many, two a row, or an eighth of those.
SLACK_BLOCKS: Final = 64
RECLAIMED_PART: Final = 1 / 8  # of idle blocks, what a burst may take so that no pool has to grow
PROMPT_TOKENS: Final = 32  # prompts are computed in multiples of so many tokens
LONG_TOKENS: Final = 1024  # of the prompts that join at once
_UNBOUNDED: Final = 2**31 - 1


class PagedCache:
    """See `DecodeCache`."""

    def __init__(self, model: LanguageModel, shapes: Sequence[LayerShape], ops: PagedOps) -> None:
        """Start without rows and without pools."""
        self.allocator = BlockAllocator(_UNBOUNDED)
        self._prefixes: PrefixCache | None = None
        self._pools = Pools(shapes, BLOCK_TOKENS, ops)
        self._model, self._ops = model, ops
        self._rows: list[list[int]] = []  # each row's blocks
        self._parked: list[ParkedRow] = []
        self._lengths = np.zeros(0, dtype=np.int32)  # each row's tokens, as of the last step begun
        self._leaving: list[int] = []  # blocks of rows that left: a running step may write there
        self._contexts: list[Context] = []  # of rows that joined uncomputed
        self._steps_left = 0  # steps until a row is out of room
        self._plan: StepPlan | None = None  # None: rows or blocks changed
        self._stored = mx.zeros((1,), mx.int32)  # 0; depends on every store so far
        self._nobodys: list[int] = []  # the block that rows write to which fill up a batch
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
        """Bound each pool to whole blocks of so many tokens, and the one of nobody."""
        self.allocator.limit = tokens // BLOCK_TOKENS + 1
        self._pools.limit(self.allocator.limit)

    def new_prompts(self, prompts: int) -> list[Any]:
        """Return mlx-lm's plain caches: they hold several prompts, padded on the right."""
        del prompts
        return padded.new_cache(self._model, 1)

    def forward_prompts(self, contexts: list[list[int]], layers: list[Any]) -> None:
        """Pad on the right; no token looks there, and `join` knows the lengths.

        Lengths are rounded up too: each new shape costs a GPU's libraries a search for kernels.
        """
        longest = max(map(len, contexts))
        length = round_up(longest, PROMPT_TOKENS)
        self._model(padded.padded(contexts, length), cache=layers)
        for layer in layers:
            layer.trim(length - longest)  # a prompt's next chunk goes there

    def join(self, prefilled: Prefilled) -> None:
        """Append rows: each prompt is copied into blocks, its full ones once for all its rows."""
        with self._placing() as placing:
            self._make_room(placing.count_prefilled(prefilled))
            placing.place_prefilled(prefilled)
            self._grow()
            finish_writes(self._ops, self._stored)
            self._append(placing, self._store(prefilled, placing.entries))

    def enter(self, prompts: Sequence[Prompt]) -> None:
        """Append rows by their blocks: known ones, and what the next step computes into."""
        with self._placing() as placing:
            self._make_room(placing.count_prompts(prompts))
            placing.place_prompts(prompts)
            self._grow()
            self._append(placing, self._copy(placing.entries))

    @contextmanager
    def _placing(self) -> Iterator[Placement]:
        """Take blocks for rows that join; whatever raises, all others are as they were.

        Raises:
            LaunchedWorkError: the step under way failed; in place of what was raised, too.
        """
        placing = Placement(
            self.allocator,
            self._prefixes,
            block_tokens=BLOCK_TOKENS,
            first_row=len(self._rows),
        )
        try:
            self._need_nobodys()
            yield placing
        except Exception as error:
            self._wait_and_give_back(placing, error)
            raise

    def _wait_and_give_back(self, placing: Placement, error: Exception) -> None:
        """Return blocks that what was launched may read or write."""
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

    def _need_nobodys(self) -> None:
        if not self._nobodys:
            self._nobodys = self.allocator.allocate(1)

    def _append(self, placing: Placement, stored: mx.array) -> None:
        lengths = np.concatenate([self._lengths, np.array(placing.lengths, dtype=np.int32)])
        placing.publish()
        self._rows += placing.rows
        self._contexts += placing.contexts
        self._lengths, self._stored, self._plan = lengths, stored, None

    def _store(self, prefilled: Prefilled, entries: Sequence[StoreEntry]) -> mx.array:
        """Copy the prompts in; long ones layer by layer, so that one layer at a time is twice."""
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
        """Copy the known parts of blocks."""
        stored = self._stored
        if entries:
            finish_writes(self._ops, stored)
            for layer in self.layers:
                stored = layer.store(layer.keys, layer.values, entries, stored)
        return stored

    def keep(self, kept: Sequence[int]) -> None:
        """Keep only these rows; copies nothing."""
        self._contexts = []  # not empty only where a step with new rows failed: they leave now
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
        """Build the model's step; only where rows or their blocks changed does a table change."""
        rows = len(self._rows)
        self._grow_ahead()
        if self._plan is None or not self._steps_left:
            self._shrink()
            self._extend_rows()
            batch = BatchRows(self._rows, self._lengths, self._nobodys[0])
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
        """Return what the step computes beside the rows' own tokens: int32 [count]."""
        tokens = [token for context in self._contexts for token in context.tokens]
        self._contexts = []
        return mx.array(tokens + [0] * (count - len(tokens)), dtype=mx.int32)

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

    def _make_room(self, blocks: int) -> None:
        """See that the allocator can give `blocks`: leavings of a step that still runs count.

        Where the pools have to grow for them, a few known blocks that nobody uses are given up
        instead; no more, since what they are known for is worth a step that waits.
        """
        if not self.allocator.can_allocate(blocks):
            wait_for_launched()
            self.settle()
        missing = blocks - (self.blocks - self.allocator.used)
        if self.layers and missing <= RECLAIMED_PART * self.allocator.idle:
            self.allocator.reclaim(missing)

    def _grow(self) -> None:
        """Let the pools hold what the allocator handed out."""
        needed = self.allocator.extent
        if needed > self.blocks:
            self._launch_stores()
            self._pools.need(max(needed, self._wanted()))

    def _grow_ahead(self) -> None:
        """Let the pools grow a little where every row's next block may not find room any more."""
        blocks = self.blocks
        if blocks - self.allocator.used < len(self._rows) + LOOKAHEAD_TOKENS:
            wanted = self._wanted()
            if wanted > blocks:
                self._launch_stores()
                self._pools.grow_ahead(wanted)

    def _launch_stores(self) -> None:
        """See that pools which are copied next have what was to be stored in them."""
        with launched_work():
            mx.async_eval(self._stored)

    def _wanted(self) -> int:
        """Blocks that the pools should have for what is in use."""
        used = self.allocator.used
        slack = max(SLACK_BLOCKS, 2 * len(self._rows), used // 8)
        return min(used + slack, self.allocator.limit)

    def _shrink(self) -> None:
        """Move what is used together where most of the pools is not."""
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
        """See `DecodeCache`. Nobody may hold blocks but rows and the index."""
        self.allocator.free([block for row in self._rows for block in row])
        self.allocator.free([block for parked in self._parked for block in parked.state])
        self.allocator.free([*self._leaving, *self._nobodys])
        if self._prefixes:
            self._prefixes.clear()
        self._rows, self._leaving, self._nobodys = [], [], []
        self._parked, self._contexts = [], []
        self._pools.drop()
        self._lengths = np.zeros(0, dtype=np.int32)
        self._plan, self._stored = None, mx.zeros((1,), mx.int32)

    def _compact(self, size: int) -> None:
        """Move what is used to the beginning of pools of so many blocks."""
        wait_for_launched(self._stored)
        self.settle()
        moved = self.allocator.compact()
        self._rows = [[moved[block] for block in row] for row in self._rows]
        for parked in self._parked:
            parked.state[:] = [moved[block] for block in parked.state]
        self._nobodys = [moved[block] for block in self._nobodys]
        self._pools.compact(list(moved), size)

    def _drop(self) -> None:
        """Forget the pools: no row is left. A running step keeps them alive until it is done."""
        if self._prefixes or self._parked:
            wait_for_launched()  # pools that stay are free to be written to
        self._leave_pools()
        if self.allocator.used:
            self._shrink()

    def _leave_pools(self) -> None:
        """Forget what only rows need, and the pools where nobody has blocks there."""
        self.settle()
        self.allocator.free(self._nobodys)
        self._nobodys = []
        if not self.allocator.used:
            self._pools.drop()

    def use_prefixes(self, prefixes: PrefixCache) -> None:
        """See `DecodeCache`; call it before any row joins."""
        self.allocator = self._prefixes = prefixes

    def gather(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[Any]:
        """See `DecodeCache`."""
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
        self._rows[row] = []  # for `keep` to find nothing to free
        self._parked.append(parked)
        return parked

    def resume(self, parked: ParkedRow) -> None:
        """Append the row by its blocks."""
        finish_writes(self._ops, self._stored)
        self._need_nobodys()
        self._parked.remove(parked)
        self._rows.append(parked.state)
        self._lengths = np.append(self._lengths, np.int32(parked.length))
        self._plan = None

    def release(self, parked: ParkedRow, key: PrefixKey | None) -> None:
        """Give the row's blocks back, and the pools where they were the last ones."""
        self._parked.remove(parked)
        self._enter(parked.state, key)
        self.allocator.free(parked.state)
        if not self._rows:
            self._drop()
