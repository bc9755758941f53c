"""Which blocks rows that join get, and what is to be stored in them. Pure.

A join succeeds or leaves no trace: `give_back` returns all that was taken, and nobody else finds
a prompt's blocks before `publish`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mlx_serving.worker.engine.kv.decode_cache import Prefilled, Prompt
from mlx_serving.worker.engine.kv.paged.block_allocator import BlockAllocator
from mlx_serving.worker.engine.kv.paged.layers import StoreEntry
from mlx_serving.worker.engine.kv.paged.step import Context
from mlx_serving.worker.engine.kv.prefix.cache import PrefixCache

if TYPE_CHECKING:
    from mlx_serving.worker.engine.kv.prefix.index import PrefixKey


class Placement:
    """Rows that join after `first_row` others: each one's blocks and tokens, in order.

    `entries`: what is to be stored, from prompts that were computed or from known blocks.
    `contexts`: what the next step is to compute.
    """

    def __init__(
        self,
        allocator: BlockAllocator,
        prefixes: PrefixCache | None,
        *,
        block_tokens: int,
        first_row: int,
    ) -> None:
        """Start without any."""
        self.rows: list[list[int]] = []
        self.lengths: list[int] = []
        self.entries: list[StoreEntry] = []
        self.contexts: list[Context] = []
        self._allocator, self._prefixes = allocator, prefixes
        self._block_tokens, self._first_row = block_tokens, first_row
        self._taken: list[int] = []  # a block is here once for each owner that it got
        self._of_prompts: list[int] = []  # of these, what is a prompt's and not a row's
        self._known: list[tuple[PrefixKey, list[int], int]] = []  # a prompt's; how many others knew
        self._entered: list[list[int]] = []  # what the prefix cache got

    # Prompts that were computed

    def count_prefilled(self, prefilled: Prefilled) -> int:
        """Return how many blocks the rows take at most."""
        blocks = 0
        for prompt, length in enumerate(prefilled.lengths):
            whole, rest = divmod(length, self._block_tokens)
            copies = sum(index == prompt for index in prefilled.prompts)
            blocks += whole + copies * (rest > 0)
        return blocks

    def place_prefilled(self, prefilled: Prefilled) -> None:
        """Give each prompt full blocks, which its rows share, and each row one for the rest."""
        shared = [self._full_blocks(prefilled, p) for p in range(len(prefilled.lengths))]
        for prompt in prefilled.prompts:
            length = prefilled.lengths[prompt]
            self._add_row(self._row_of(prompt, length, shared[prompt]), length)

    def _full_blocks(self, prefilled: Prefilled, prompt: int) -> list[int]:
        known: list[int] = []
        if self._prefixes:
            known = self._prefixes.acquire(prefilled.keys[prompt])
            self._taken += known
        fresh = self._allocate(prefilled.lengths[prompt] // self._block_tokens - len(known))
        size = self._block_tokens
        self.entries += [
            StoreEntry(block, prompt, index * size, size)
            for index, block in enumerate(fresh, start=len(known))
        ]
        blocks = known + fresh
        self._of_prompts += blocks
        if self._prefixes:
            self._known.append((prefilled.keys[prompt], blocks, len(known)))
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
        """Return how many blocks the rows take."""
        return sum(map(self._new_blocks, prompts))

    def _new_blocks(self, prompt: Prompt) -> int:
        size = self._block_tokens
        return -(-len(prompt.context) // size) - prompt.found // size

    def place_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Give each its known blocks and new ones; what is known of a part of a block is copied."""
        for prompt in prompts:
            length, (whole, rest) = len(prompt.context), divmod(prompt.found, self._block_tokens)
            blocks = list(prompt.blocks[:whole])
            self._share(blocks)
            blocks += self._allocate(self._new_blocks(prompt))
            if rest:
                self.entries.append(StoreEntry(blocks[whole], prompt.blocks[whole], 0, rest))
            if prompt.found < length:
                row = self._first_row + len(self.rows)
                self.contexts.append(Context(row, prompt.found, prompt.context[prompt.found :]))
            if self._prefixes:
                self._known.append((prompt.key, blocks[: length // self._block_tokens], whole))
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
        """Let the prompts be found; they let go of their blocks, and their rows keep them."""
        if self._prefixes:
            for key, blocks, known in self._known:
                self._entered.append(blocks[known:])
                self._prefixes.insert(key, blocks)
        self._allocator.free(self._of_prompts)

    def give_back(self) -> None:
        """Return all blocks."""
        self._allocator.free(self._taken)
        if self._prefixes:
            for blocks in self._entered:
                self._prefixes.forget(blocks)
