"""The blocks of rows that join, and what is stored in them. Pure.

A join succeeds or leaves no trace: `give_back` frees all that was allocated, and the prefix cache
gets a prompt's blocks only by `publish`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mlx_serving.worker.engine.kv.interface import Prefilled, Prompt
from mlx_serving.worker.engine.kv.paged.block_allocator import BlockAllocator
from mlx_serving.worker.engine.kv.paged.layers import StoreEntry
from mlx_serving.worker.engine.kv.paged.step import Context
from mlx_serving.worker.engine.kv.prefix.cache import PrefixCache

if TYPE_CHECKING:
    from mlx_serving.worker.engine.kv.prefix.index import PrefixKey


class BlockPlacement:
    """Rows that join after `first_row` others: the blocks and the length of each, in order.

    `entries`: what to store, from computed prompts or from cached blocks. `contexts`: what the next
    step computes.
    """

    def __init__(
        self,
        allocator: BlockAllocator,
        prefixes: PrefixCache | None,
        *,
        block_tokens: int,
        first_row: int,
    ) -> None:
        """Start without rows."""
        self.rows: list[list[int]] = []
        self.lengths: list[int] = []
        self.entries: list[StoreEntry] = []
        self.contexts: list[Context] = []
        self._allocator, self._prefixes = allocator, prefixes
        self._block_tokens, self._first_row = block_tokens, first_row
        self._taken: list[int] = []  # each block once for each owner that it got here
        self._of_prompts: list[int] = []  # of these, those that a prompt owns and not a row
        # For each prompt: its key, its full blocks, and how many of them were cached already.
        self._full: list[tuple[PrefixKey, list[int], int]] = []
        self._published: list[list[int]] = []  # blocks that the prefix cache got

    # Prompts that were computed

    def count_prefilled(self, prefilled: Prefilled) -> int:
        """Return the most blocks that the rows can need."""
        blocks = 0
        for prompt, length in enumerate(prefilled.lengths):
            whole, rest = divmod(length, self._block_tokens)
            copies = sum(index == prompt for index in prefilled.prompts)
            blocks += whole + copies * (rest > 0)
        return blocks

    def place_prefilled(self, prefilled: Prefilled) -> None:
        """Give each prompt full blocks, which its rows share, and each row a block for the rest."""
        shared = [self._full_blocks(prefilled, p) for p in range(len(prefilled.lengths))]
        for prompt in prefilled.prompts:
            length = prefilled.lengths[prompt]
            self._add_row(self._row_of(prompt, length, shared[prompt]), length)

    def _full_blocks(self, prefilled: Prefilled, prompt: int) -> list[int]:
        cached: list[int] = []
        if self._prefixes:
            cached = self._prefixes.acquire(prefilled.keys[prompt])
            self._taken += cached
        fresh = self._allocate(prefilled.lengths[prompt] // self._block_tokens - len(cached))
        size = self._block_tokens
        self.entries += [
            StoreEntry(block, prompt, index * size, size)
            for index, block in enumerate(fresh, start=len(cached))
        ]
        blocks = cached + fresh
        self._of_prompts += blocks
        if self._prefixes:
            self._full.append((prefilled.keys[prompt], blocks, len(cached)))
        return blocks

    def _row_of(self, prompt: int, length: int, shared: list[int]) -> list[int]:
        self._share(shared)
        rest = length % self._block_tokens
        if not rest:
            return list(shared)
        (own,) = self._allocate(1)
        self.entries.append(StoreEntry(own, prompt, length - rest, rest))
        return [*shared, own]

    # Prompts that the next step computes

    def count_prompts(self, prompts: Sequence[Prompt]) -> int:
        """Return how many blocks the rows need."""
        return sum(map(self._new_blocks, prompts))

    def _new_blocks(self, prompt: Prompt) -> int:
        size = self._block_tokens
        return -(-len(prompt.context) // size) - prompt.cached_tokens // size

    def place_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Give each row its cached blocks and new ones; a cached part of a block is copied."""
        for prompt in prompts:
            length, cached = len(prompt.context), prompt.cached_tokens
            whole, rest = divmod(cached, self._block_tokens)
            blocks = list(prompt.cached_blocks[:whole])
            self._share(blocks)
            blocks += self._allocate(self._new_blocks(prompt))
            if rest:
                self.entries.append(StoreEntry(blocks[whole], prompt.cached_blocks[whole], 0, rest))
            if cached < length:
                row = self._first_row + len(self.rows)
                self.contexts.append(Context(row, cached, prompt.context[cached:]))
            if self._prefixes:
                self._full.append((prompt.key, blocks[: length // self._block_tokens], whole))
            self._add_row(blocks, length)

    # Both

    def _add_row(self, blocks: list[int], length: int) -> None:
        self.rows.append(blocks)
        self.lengths.append(length)

    def _allocate(self, count: int) -> list[int]:
        blocks = self._allocator.allocate(count)
        self._taken += blocks
        return blocks

    def _share(self, blocks: list[int]) -> None:
        self._allocator.share(blocks)
        self._taken += blocks

    def publish(self) -> None:
        """Enter the prompts into the prefix cache; from now on only their rows own the blocks."""
        if self._prefixes:
            for key, blocks, cached in self._full:
                self._published.append(blocks[cached:])
                self._prefixes.insert(key, blocks)
        self._allocator.free(self._of_prompts)

    def give_back(self) -> None:
        """Free all blocks."""
        self._allocator.free(self._taken)
        if self._prefixes:
            for blocks in self._published:
                self._prefixes.forget(blocks)
