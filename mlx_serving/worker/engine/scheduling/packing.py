"""Which short prompts are computed at once. Pure.

Prompts that share a chunk of their own are padded alike: each begins where the least is known, and
goes as far as the longest. Those that a decode step computes are not padded. What is asked of each
further prompt does not grow with those before it, so that a burst of many costs the engine's thread
little.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Final

from mlx_serving.worker.engine.kv.prefix.index import TOKEN_BYTES, PrefixKey
from mlx_serving.worker.engine.row import Row
from mlx_serving.worker.engine.scheduling.chunk import Group
from mlx_serving.worker.engine.scheduling.limits import SchedulerLimits

# Of a chunk: what prompts that are computed at once may hold, known tokens included.
PACKED_CONTEXT_CHUNKS: Final = 8


class Packing(ABC):
    """Prompts that are computed at once.

    `shares_blocks` where they could find each other's blocks.
    """

    def __init__(self, limits: SchedulerLimits, chunk_tokens: int, *, shares_blocks: bool) -> None:
        """Start without any; `chunk_tokens` is the size of a chunk now."""
        self._limits, self._chunk_tokens = limits, chunk_tokens
        self._shares_blocks = shares_blocks
        self._rows: list[Row] = []  # a prompt's first
        self._keys: list[PrefixKey] = []  # of these, as far as they were needed

    def has_room_for(self, group: Group) -> bool:
        """Say whether one more prompt may be computed with the others."""
        return self._fits(group) and not self._computes(group[0])

    @abstractmethod
    def _fits(self, group: Group) -> bool:
        """Say whether the others leave as much room."""

    @abstractmethod
    def add(self, group: Group) -> None:
        """Take a prompt."""
        self._rows.append(group[0])

    def _computes(self, row: Row) -> bool:
        """Say whether the others are to compute the block that the row needs next to its end.

        Then it waits a step and finds it: together they would have that block once each, while the
        prefix cache keeps one, and the reservation counts one. Of that block the row may know a
        part.
        """
        if not self._shares_blocks:
            return False
        salt, tokens = row.context_key
        block = self._limits.kv_block_tokens
        end = (row.found // block + 1) * block * TOKEN_BYTES
        if end > len(tokens):
            return False
        needed = tokens[:end]
        self._keys += [other.context_key for other in self._rows[len(self._keys) :]]
        return any(key.salt == salt and key.tokens.startswith(needed) for key in self._keys)


class ChunkPacking(Packing):
    """Prompts that share a chunk of their own: the first, and such as are much alike."""

    def __init__(
        self,
        limits: SchedulerLimits,
        chunk_tokens: int,
        groups: Iterable[Group] = (),
        *,
        shares_blocks: bool,
    ) -> None:
        """Start with prompts that go together."""
        super().__init__(limits, chunk_tokens, shares_blocks=shares_blocks)
        self._least = self._most = self._longest = 0
        for group in groups:
            self.add(group)

    def _fits(self, group: Group) -> bool:
        """See `Packing._fits`. More than a block of what is known is not given up."""
        if not self._rows:
            return True
        row, block = group[0], self._limits.kv_block_tokens
        least, most = min(self._least, row.found), max(self._most, row.found)
        rows, longest = len(self._rows) + 1, max(self._longest, row.context_length)
        return (
            most - least <= block
            and rows * (longest - least) <= self._chunk_tokens
            and rows * longest <= PACKED_CONTEXT_CHUNKS * self._chunk_tokens
        )

    def add(self, group: Group) -> None:
        """See `Packing.add`."""
        row = group[0]
        self._least = min(self._least, row.found) if self._rows else row.found
        self._most = max(self._most, row.found)
        self._longest = max(self._longest, row.context_length)
        super().add(group)


class StepPacking(Packing):
    """Prompts that a decode step computes: each of their tokens reads the whole prompt's KV."""

    def __init__(self, limits: SchedulerLimits, chunk_tokens: int, *, shares_blocks: bool) -> None:
        """Start without any."""
        super().__init__(limits, chunk_tokens, shares_blocks=shares_blocks)
        self.most_tokens = chunk_tokens
        self._tokens = self._reads = 0

    def _fits(self, group: Group) -> bool:
        """See `Packing._fits`. A prompt of several choices has a chunk, which they share."""
        tokens, reads = self._cost(group[0])
        return (
            len(group) == 1
            and self._tokens + tokens <= self.most_tokens
            and self._reads + reads <= self._limits.mixed_reads
        )

    def add(self, group: Group) -> None:
        """See `Packing.add`."""
        tokens, reads = self._cost(group[0])
        self._tokens += tokens
        self._reads += reads
        super().add(group)

    def _cost(self, row: Row) -> tuple[int, int]:
        """Tokens to compute, and KV tokens that they read."""
        tokens = row.context_length - row.found
        return tokens, tokens * row.context_length
