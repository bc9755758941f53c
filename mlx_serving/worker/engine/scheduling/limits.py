"""The limits of a batch: rows, KV tokens, prefill."""

import math
from dataclasses import dataclass

from mlx_serving.common import defaults
from mlx_serving.worker.engine.scheduling.chunk import FIRST_TOKENS, STEP_SECONDS


@dataclass(frozen=True, slots=True)
class BatchSize:
    """How many rows a batch has, and how lanes share them.

    `lane_min_share`: the part of the batch that each lane below the highest keeps while it has
    rows. `headroom_rows`: rows beyond `max_rows`, for the highest lane and for lanes that have
    less than their share.
    """

    max_rows: int
    lane_min_share: float = defaults.LANE_MIN_SHARE
    headroom_rows: int = 0

    def __post_init__(self) -> None:
        """Refuse a batch in which nothing could run."""
        _at_least_one(self, "max_rows")
        if not 0 <= self.lane_min_share < 1:
            message = f"lane_min_share must be at least 0 and under 1, got {self.lane_min_share}"
            raise ValueError(message)

    @classmethod
    def of(cls, max_rows: int, lane_min_share: float, headroom: float) -> "BatchSize":
        """Build one whose headroom is a part of the batch, rounded down to rows."""
        return cls(max_rows, lane_min_share, int(headroom * max_rows))

    @property
    def most_rows(self) -> int:
        """The most rows, headroom included."""
        return self.max_rows + self.headroom_rows

    @property
    def lane_min_rows(self) -> int:
        """Rows of a lane's share; the shares of two lanes leave at least one row of the batch."""
        return min(math.ceil(self.lane_min_share * self.max_rows), (self.max_rows - 1) // 2)


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """The limits of a batch.

    `prefill_chunk_tokens`: the largest prefill chunk, padding included; `first_chunk_tokens`: the
    first one's size; `step_seconds`: how long a step with a chunk may take. See `chunk.ChunkSize`.
    `kv_row_overhead_tokens`: KV tokens that a row may hold beyond its own (the cache grows in
    blocks; layers of fixed size). `kv_capacity_tokens`: the KV budget of the whole batch.
    `kv_block_tokens`: the size of the blocks that rows are kept in; 0: rows are padded to the
    longest. `mixed_reads`: how many KV tokens a decode step may read for the prompts that it
    computes, summed over their tokens; 0: each prompt has a forward pass of its own.
    """

    batch: BatchSize
    kv_capacity_tokens: int
    prefill_chunk_tokens: int
    kv_row_overhead_tokens: int = 0
    kv_block_tokens: int = 0
    mixed_reads: int = 0
    first_chunk_tokens: int = FIRST_TOKENS
    step_seconds: float = STEP_SECONDS

    def __post_init__(self) -> None:
        """Refuse limits with which nothing could run."""
        _at_least_one(self, "prefill_chunk_tokens")
        _at_least_one(self, "first_chunk_tokens")

    def is_share(self, rows: int, kv_tokens: int) -> bool:
        """Say whether these are a lane's share: of the rows, or of the KV budget."""
        least = self.batch.lane_min_share * self.kv_capacity_tokens
        return rows >= self.batch.lane_min_rows or (rows > 0 and kv_tokens >= least)


def _at_least_one(limits: object, name: str) -> None:
    if getattr(limits, name) < 1:
        message = f"{name} must be at least 1, got {getattr(limits, name)}"
        raise ValueError(message)
