"""Allocates the blocks of a paged KV cache: ids, owner counts, a free list. Pure."""

from collections.abc import Iterable
from heapq import heappop, heappush


class OutOfBlocksError(RuntimeError):
    """The pool has fewer free blocks than asked for."""


class BlockAllocator:
    """Hands out block ids from 0 on, the lowest free one first, so that a pool stays short.

    A block may have several owners (rows that share a prefix). It is free again when the last one
    has freed it.
    """

    def __init__(self, limit: int) -> None:
        """Start empty; at most `limit` blocks are ever in use at once."""
        self.limit = limit
        self._owners: dict[int, int] = {}  # block in use -> number of owners
        self._free: list[int] = []  # a heap of ids below `extent`
        self._extent = 0

    @property
    def used(self) -> int:
        """Blocks that have an owner."""
        return len(self._owners)

    @property
    def extent(self) -> int:
        """One more than the highest id in use: so many blocks must exist on the device."""
        return self._extent

    @property
    def idle(self) -> int:
        """Blocks that no row uses and `reclaim` can free."""
        return 0

    def can_allocate(self, count: int) -> bool:
        """Say whether `count` more blocks are within the limit."""
        return self.used + count <= self.limit

    def allocate(self, count: int) -> list[int]:
        """Return `count` blocks with one owner each.

        Raises:
            OutOfBlocksError: `can_allocate` is false.
        """
        if not self.can_allocate(count):
            message = f"{count} blocks wanted, {self.limit - self.used} free"
            raise OutOfBlocksError(message)
        taken = [heappop(self._free) for _ in range(min(count, len(self._free)))]
        fresh = range(self._extent, self._extent + count - len(taken))
        self._extent += len(fresh)
        taken += fresh
        self._owners |= dict.fromkeys(taken, 1)
        return taken

    def share(self, blocks: Iterable[int]) -> None:
        """Give each block one more owner.

        Raises:
            KeyError: a block is not in use.
        """
        for block in blocks:
            self._owners[block] += 1

    def free(self, blocks: Iterable[int]) -> None:
        """Take one owner from each block.

        Raises:
            KeyError: a block is not in use.
        """
        for block in blocks:
            self._owners[block] -= 1
            if not self._owners[block]:
                del self._owners[block]
                heappush(self._free, block)
        if not self._owners:
            self._free, self._extent = [], 0

    def reclaim(self, blocks: int) -> None:
        """Free up to so many blocks that no row uses: here there are none."""

    def owners(self, block: int) -> int:
        """Return how many owners a block has; 0: it is free."""
        return self._owners.get(block, 0)

    def compact(self) -> dict[int, int]:
        """Renumber the blocks in use from 0 on; returns old id -> new id, in order of both."""
        moved = {old: new for new, old in enumerate(sorted(self._owners))}
        self._owners = {moved[old]: owners for old, owners in self._owners.items()}
        self._free, self._extent = [], len(moved)
        return moved
