"""Which short prompts share one prefill chunk. Pure.

Prompts that share a chunk are padded alike: each begins where the least is known, and goes as far
as the longest. What is asked of each further prompt does not grow with those before it, so that a
burst of many costs the engine's thread little.
"""

from collections.abc import Iterable
from typing import Final

from mlx_serving.worker.engine.prefix.index import TOKEN_BYTES, PrefixKey
from mlx_serving.worker.engine.scheduling.limits import SchedulerLimits
from mlx_serving.worker.engine.scheduling.prefill_chunk import Group
from mlx_serving.worker.engine.sequence import Sequence

# Of a chunk: what prompts that are computed at once may hold, known tokens included.
PACKED_CONTEXT_CHUNKS: Final = 8


class Packing:
    """Prompts that share a chunk; `shares_blocks` where they could find each other's blocks."""

    def __init__(
        self, limits: SchedulerLimits, groups: Iterable[Group] = (), *, shares_blocks: bool
    ) -> None:
        """Start with prompts that go together."""
        self._limits = limits
        self._shares_blocks = shares_blocks
        self._rows: list[Sequence] = []  # a prompt's first
        self._keys: list[PrefixKey] = []  # of these, as far as they were needed
        self._least = self._most = self._longest = 0
        for group in groups:
            self.add(group)

    def has_room_for(self, group: Group) -> bool:
        """Say whether one more prompt may share the chunk.

        More than a block of what is known is not given up for that.
        """
        if not self._rows:
            return True
        row, limits = group[0], self._limits
        least, most = min(self._least, row.found), max(self._most, row.found)
        rows, longest = len(self._rows) + 1, max(self._longest, row.context_length)
        return (
            most - least <= limits.kv_block_tokens
            and rows * (longest - least) <= limits.prefill_chunk_tokens
            and rows * longest <= PACKED_CONTEXT_CHUNKS * limits.prefill_chunk_tokens
            and not self._computes(row)
        )

    def add(self, group: Group) -> None:
        """Take a prompt."""
        row = group[0]
        self._least = min(self._least, row.found) if self._rows else row.found
        self._most = max(self._most, row.found)
        self._longest = max(self._longest, row.context_length)
        self._rows.append(row)

    def _computes(self, row: Sequence) -> bool:
        """Say whether the others are to compute a block's worth of tokens that the row needs next.

        Then it waits a step and finds them.
        """
        if not self._shares_blocks:
            return False
        salt, tokens = row.context_key
        end = (row.found + self._limits.kv_block_tokens) * TOKEN_BYTES
        if end > len(tokens):
            return False
        needed = tokens[:end]
        self._keys += [other.context_key for other in self._rows[len(self._keys) :]]
        return any(key.salt == salt and key.tokens.startswith(needed) for key in self._keys)
