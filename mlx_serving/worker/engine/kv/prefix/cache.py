"""The prefix cache: blocks of the paged KV cache that can be found again by their tokens. Pure.

An allocator whose blocks outlive their rows: a row's full blocks are entered into an index, which
then owns them beside the row. Blocks that only the index owns are idle: they are evicted, the
least recently used first, when rows need room or when there are more than `idle_limit`.
"""

from collections.abc import Iterable, Sequence

from mlx_serving.worker.engine.kv.paged.block_allocator import BlockAllocator
from mlx_serving.worker.engine.kv.prefix.index import PrefixIndexProtocol, PrefixKey


class PrefixCache(BlockAllocator):
    """See `BlockAllocator`; here `used` counts idle blocks too, and `allocate` evicts them."""

    def __init__(
        self, index: PrefixIndexProtocol, block_tokens: int, limit: int, idle_limit: int
    ) -> None:
        """Start empty; keep at most `idle_limit` blocks that no row uses."""
        super().__init__(limit)
        self._index = index
        self._block_tokens = block_tokens
        self._idle_limit = idle_limit
        self._pins: dict[int, list[int]] = {}  # by the list's id

    @property
    def idle_limit(self) -> int:
        """The most blocks that are kept and no row uses."""
        return self._idle_limit

    @property
    def idle(self) -> int:
        """Blocks that only the index owns."""
        return self._index.idle

    @property
    def held(self) -> int:
        """Blocks of the index that rows own too."""
        return len(self._index) - self._index.idle

    def can_allocate(self, count: int) -> bool:
        """Say whether `count` more blocks are within the limit if all idle ones are evicted."""
        return self.used - self.idle + count <= self.limit

    def allocate(self, count: int) -> list[int]:
        """See `BlockAllocator.allocate`."""
        if self.can_allocate(count):
            self._evict(self.used + count - self.limit)
        return super().allocate(count)

    def share(self, blocks: Iterable[int]) -> None:
        """See `BlockAllocator.share`."""
        shared = list(blocks)
        super().share(shared)
        self._index.hold(shared)

    def free(self, blocks: Iterable[int]) -> None:
        """See `BlockAllocator.free`."""
        freed = list(blocks)
        super().free(freed)
        self._index.release([block for block in freed if self.owners(block) == 1])
        self._evict(self.idle - self._idle_limit)

    def reclaim(self, blocks: int) -> None:
        """See `BlockAllocator.reclaim`: the idle blocks that were used least recently."""
        self._evict(min(blocks, self.idle))

    def keep_idle(self, blocks: int) -> None:
        """From now on, keep at most so many blocks that no row uses."""
        self._idle_limit = blocks
        self._evict(self.idle - blocks)

    def find(self, key: PrefixKey) -> list[int]:
        """Return the whole blocks of the longest cached prefix."""
        blocks, tokens = self._index.match(*key)
        return blocks[: tokens // self._block_tokens]

    def acquire(self, key: PrefixKey) -> list[int]:
        """Do as `find`, and give each block one more owner."""
        blocks = self.find(key)
        self.share(blocks)
        return blocks

    def pin(self, key: PrefixKey) -> tuple[list[int], int]:
        """Return the blocks of the longest cached prefix, and its tokens; each gets one more owner.

        Of the last block, maybe only the first tokens are the prefix's. A prefix of less than a
        block counts as none: copying it costs more than computing it. `unpin` takes the same list
        back; until then, `compact` renumbers the blocks in it.
        """
        blocks, tokens = self._index.match(*key)
        if tokens < self._block_tokens:
            blocks, tokens = [], 0
        self.share(blocks)
        self._pins[id(blocks)] = blocks
        return blocks, tokens

    def unpin(self, blocks: list[int]) -> None:
        """Take one owner from the blocks of a list that `pin` returned; other lists are ignored."""
        if self._pins.pop(id(blocks), None) is not None:
            self.free(blocks)

    def compact(self) -> dict[int, int]:
        """See `BlockAllocator.compact`."""
        moved = super().compact()
        self._index.renumber(list(moved))
        for blocks in self._pins.values():
            blocks[:] = [moved[block] for block in blocks]
        return moved

    def insert(self, key: PrefixKey, blocks: Sequence[int]) -> None:
        """Enter the blocks of a row, in order, that the key's tokens fill."""
        super().share(self._index.insert(*key, blocks))

    def forget(self, blocks: Sequence[int]) -> None:
        """Take a row's blocks out of the index, except those that other rows use."""
        shared = sum(self.owners(block) > 2 for block in blocks)  # noqa: PLR2004 - index and row
        super().free(self._index.forget(blocks[shared:]))

    def clear(self) -> None:
        """Evict all idle blocks."""
        self._evict(self.idle)

    def check(self) -> None:
        """Compare the index with the owners of every block.

        Raises:
            RuntimeError: they disagree, or the index contradicts itself.
        """
        self._index.check()
        for block, held in self._index.blocks().items():
            if not self.owners(block) or (self.owners(block) > 1) != held:
                message = f"block {block} has {self.owners(block)} owners, held: {held}"
                raise RuntimeError(message)

    def _evict(self, count: int) -> None:
        if count > 0:
            super().free(self._index.evict(count))
