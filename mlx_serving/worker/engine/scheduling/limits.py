"""What bounds a batch."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """What bounds a batch.

    `kv_row_overhead_tokens`: KV tokens that a row may hold beyond its own (the cache grows in
    blocks; layers of fixed size). `kv_capacity_tokens` is the budget of the whole batch.
    `kv_block_tokens`: rows are kept in blocks of so many tokens; 0: padded to the longest row.
    `lane_min_share`: of the batch, what each lane below the highest keeps while it has rows.
    `mixed_reads`: KV tokens that prompts may read in a decode step which computes them, summed over
    their own tokens; 0: no step does, every prompt has a pass of its own.
    `headroom_rows`: beyond `max_rows`, for the highest lane and for what a lane lacks of its share.
    """

    max_rows: int
    kv_capacity_tokens: int
    prefill_chunk_tokens: int
    kv_row_overhead_tokens: int = 0
    kv_block_tokens: int = 0
    lane_min_share: float = 0.1
    headroom_rows: int = 0
    mixed_reads: int = 0

    def __post_init__(self) -> None:
        """Refuse limits under which nothing could run."""
        for name in ("max_rows", "prefill_chunk_tokens"):
            if getattr(self, name) < 1:
                message = f"{name} must be at least 1, got {getattr(self, name)}"
                raise ValueError(message)
        if not 0 <= self.lane_min_share < 1:
            message = f"lane_min_share must be at least 0 and under 1, got {self.lane_min_share}"
            raise ValueError(message)

    @property
    def most_rows(self) -> int:
        """Rows at most, headroom included."""
        return self.max_rows + self.headroom_rows

    @property
    def lane_min_rows(self) -> int:
        """Rows that are a lane's share; none in a batch that has not as many for three lanes."""
        return least_rows(self.max_rows, self.lane_min_share)

    def is_share(self, rows: int, kv_tokens: int) -> bool:
        """Say whether a lane that has these has its share: of the rows, or of the KV budget."""
        least = self.lane_min_share * self.kv_capacity_tokens
        return rows >= self.lane_min_rows or (rows > 0 and kv_tokens >= least)


def headroom_rows(max_rows: int, share: float) -> int:
    """Return the rows that headroom of so large a part of a batch is, rounded down."""
    return int(share * max_rows)


def least_rows(max_rows: int, share: float) -> int:
    """Return the rows that a lane keeps of a batch; what is left is never less than a row."""
    return min(math.ceil(share * max_rows), (max_rows - 1) // 2)
