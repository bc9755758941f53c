"""Which short prompts are computed at once. Pure.

Prompts that share a chunk are padded to one length: each begins at the smallest number of cached
tokens and ends with the longest context. Prompts that a decode step computes are not padded. The
check of one more prompt costs the same however many there are, so that a burst of many costs the
engine's thread little.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Final

from mlx_serving.worker.engine.kv.prefix.index import TOKEN_BYTES, PrefixKey
from mlx_serving.worker.engine.row import Row
from mlx_serving.worker.engine.scheduling.chunk import RowGroup
from mlx_serving.worker.engine.scheduling.limits import SchedulerLimits

# In chunks: tokens that prompts computed at once may have, cached ones included.
PACKED_CONTEXT_CHUNKS: Final = 8


class Packing(ABC):
    """Prompts that are computed at once.

    `shares_blocks`: there is a prefix cache, so one may find blocks that another one computed.
    """

    def __init__(self, limits: SchedulerLimits, chunk_tokens: int, *, shares_blocks: bool) -> None:
        """Start empty; `chunk_tokens` is the present size of a chunk."""
        self._limits, self._chunk_tokens = limits, chunk_tokens
        self._shares_blocks = shares_blocks
        self._rows: list[Row] = []  # the first row of each prompt
        self._keys: list[PrefixKey] = []  # of these rows, as far as they were needed

    def has_room_for(self, group: RowGroup) -> bool:
        """Say whether one more prompt may be computed with the others."""
        return self._fits(group) and not self._will_compute_block_of(group[0])

    @abstractmethod
    def _fits(self, group: RowGroup) -> bool:
        """Say whether the prompt fits beside the others."""

    @abstractmethod
    def add(self, group: RowGroup) -> None:
        """Take a prompt."""
        self._rows.append(group[0])

    def _will_compute_block_of(self, row: Row) -> bool:
        """Say whether another prompt will compute the first whole block that the row needs.

        Then the row waits a step and finds that block in the prefix cache. If both computed it at
        once, each would have a block of its own, while the prefix cache keeps one and the
        reservation counts one. A part of the block may be cached for the row already.
        """
        if not self._shares_blocks:
            return False
        salt, tokens = row.context_key
        block = self._limits.kv_block_tokens
        end = (row.prefill.cached_tokens // block + 1) * block * TOKEN_BYTES
        if end > len(tokens):
            return False
        needed = tokens[:end]
        self._keys += [other.context_key for other in self._rows[len(self._keys) :]]
        return any(key.salt == salt and key.tokens.startswith(needed) for key in self._keys)


class ChunkPacking(Packing):
    """Prompts that share a chunk: the first one, and others of about the same length."""

    def __init__(
        self,
        limits: SchedulerLimits,
        chunk_tokens: int,
        groups: Iterable[RowGroup] = (),
        *,
        shares_blocks: bool,
    ) -> None:
        """Start with prompts that are chosen already."""
        super().__init__(limits, chunk_tokens, shares_blocks=shares_blocks)
        self._least = self._most = self._longest = 0
        for group in groups:
            self.add(group)

    def _fits(self, group: RowGroup) -> bool:
        """See `Packing._fits`. No prompt gives up more than a block of its cached tokens."""
        if not self._rows:
            return True
        row, block = group[0], self._limits.kv_block_tokens
        cached = row.prefill.cached_tokens
        least, most = min(self._least, cached), max(self._most, cached)
        rows, longest = len(self._rows) + 1, max(self._longest, row.context_length)
        return (
            most - least <= block
            and rows * (longest - least) <= self._chunk_tokens
            and rows * longest <= PACKED_CONTEXT_CHUNKS * self._chunk_tokens
        )

    def add(self, group: RowGroup) -> None:
        """See `Packing.add`."""
        row = group[0]
        cached = row.prefill.cached_tokens
        self._least = min(self._least, cached) if self._rows else cached
        self._most = max(self._most, cached)
        self._longest = max(self._longest, row.context_length)
        super().add(group)


class StepPacking(Packing):
    """Prompts that a decode step computes: each of their tokens reads its prompt's whole KV."""

    def __init__(self, limits: SchedulerLimits, chunk_tokens: int, *, shares_blocks: bool) -> None:
        """Start empty."""
        super().__init__(limits, chunk_tokens, shares_blocks=shares_blocks)
        self.most_tokens = chunk_tokens
        self._tokens = self._reads = 0

    def _fits(self, group: RowGroup) -> bool:
        """See `Packing._fits`. A prompt of several choices needs a chunk of its own."""
        tokens, reads = self._cost(group[0])
        return (
            len(group) == 1
            and self._tokens + tokens <= self.most_tokens
            and self._reads + reads <= self._limits.mixed_reads
        )

    def add(self, group: RowGroup) -> None:
        """See `Packing.add`."""
        tokens, reads = self._cost(group[0])
        self._tokens += tokens
        self._reads += reads
        super().add(group)

    def _cost(self, row: Row) -> tuple[int, int]:
        """Return the tokens to compute, and the KV tokens that they read."""
        tokens = row.uncached_tokens
        return tokens, tokens * row.context_length
