"""Which prompts are prefilled next. Pure."""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from mlx_serving.common.queues import LANES
from mlx_serving.worker.engine.row import Phase, Row
from mlx_serving.worker.engine.scheduling.chunk import ChunkSize, PrefillChunk, RowGroup
from mlx_serving.worker.engine.scheduling.packing import ChunkPacking, Packing, StepPacking

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Iterator

    from mlx_serving.worker.engine.kv.prefix.cache import PrefixCache
    from mlx_serving.worker.engine.scheduling.limits import SchedulerLimits
    from mlx_serving.worker.engine.scheduling.reservation import Reservation


class LaneTurns:
    """The highest lane has the next turn, but each waiting lane gets its share of the turns."""

    def __init__(self, min_share: float) -> None:
        """Give a waiting lane at least one turn in 1 / `min_share`; 0: no such share."""
        self._patience = math.ceil(1 / min_share) - 1 if min_share else math.inf
        self._turns_without = [0] * len(LANES)  # turns since a waiting lane had one

    def next(self, waiting: Iterable[int]) -> int:
        """Return the rank whose turn it is, of at least one that waits; `take` then notes it."""
        ranks = sorted(waiting)
        overdue = (rank for rank in ranks if self._turns_without[rank] >= self._patience)
        return next(overdue, ranks[0])

    def take(self, turn: int, waiting: Iterable[int]) -> None:
        """Note that lane `turn` has its turn while the lanes `waiting` wait."""
        ranks = set(waiting)
        self._turns_without = [
            turns + 1 if rank in ranks and rank != turn else 0
            for rank, turns in enumerate(self._turns_without)
        ]


ROWS_PER_PROMPT: Final = 16  # a prompt waits for one more prompt for each so many decoding rows
PATIENCE_STEPS: Final = (0, 4, 8)  # by lane: how many steps a prompt waits for others at most
RIDING_CHUNKS: Final = 0.5  # prompts ride along only up to this part of a full chunk
RIDING_TOKENS: Final = 32  # such a prompt is as long as the others, rounded up to so many


class PromptQueue:
    """Prompts that wait, and those under way: in each lane at most the prompts of one chunk."""

    def __init__(
        self,
        limits: SchedulerLimits,
        chunk_size: ChunkSize,
        reservation: Reservation,
        prefixes: PrefixCache | None = None,
    ) -> None:
        """Start empty."""
        self._limits, self._chunk_size, self._reservation = limits, chunk_size, reservation
        self._shares_blocks = prefixes is not None
        self._waiting: list[list[RowGroup]] = [[] for _ in LANES]
        self._begun: list[tuple[RowGroup, ...]] = [()] * len(LANES)
        self._turns = LaneTurns(limits.batch.lane_min_share)
        self._waited = 0  # steps that the next prompt was put off

    def add(self, group: RowGroup) -> None:
        """Queue a prompt, in its lane's order of admission."""
        insort(self._waiting[group[0].request.rank], group, key=lambda rows: rows[0].order)
        for row in group:
            row.phase = Phase.WAITING
        self._pin_prefixes(group)

    def remove(self, row: Row) -> None:
        """Forget a row, in whatever phase it is."""
        rank = row.request.rank
        if row.phase is Phase.WAITING:
            self._waiting[rank] = list(_without(self._waiting[rank], (row,)))
        elif row.phase is Phase.PREFILLING:
            self._end((row,))
        row.prefill = self._reservation.unpin_prefix(row)

    def begun(self, rank: int) -> tuple[RowGroup, ...]:
        """Return the prompts under way in a lane's chunk, those that ride along included.

        Between two steps there is at most one: the lane's own, which takes several chunks. A chunk
        of several prompts computes all of each.
        """
        return self._begun[rank]

    def schedule(self, decoding: int) -> PrefillChunk | None:
        """Choose the next chunk beside so many decoding rows; None: there is none, or it waits."""
        pending = [rank for rank in range(len(LANES)) if self._begun[rank] or self._waiting[rank]]
        if not pending:
            self._waited = 0
            return None
        rank = self._turns.next(pending)
        mixed = False
        if not self._begun[rank]:
            if rank == pending[0] and self._waits_for_more(self._waiting[rank], decoding):
                return None
            mixed = self._begin(rank)
        self._turns.take(rank, pending)
        groups = self._begun[rank]
        leaders = [group[0] for group in groups]
        start = leaders[0].prefill.prefilled_tokens - leaders[0].prefill.cached_tokens
        length = max(row.uncached_tokens for row in leaders) - start
        if not mixed:
            length = min(length, self._chunk_size.tokens)
        return PrefillChunk(groups, start, length, mixed=mixed)

    def finish(self, chunk: PrefillChunk) -> bool:
        """Record that the chunk is computed; return whether its prompts are complete."""
        end = chunk.start + chunk.length
        for row in chunk.rows:
            prefilled = min(row.prefill.cached_tokens + end, row.context_length)
            row.prefill = replace(row.prefill, prefilled_tokens=prefilled)
        if not chunk.completes:
            return False
        for row in chunk.rows:
            row.phase = Phase.DECODING
        self._end(chunk.rows)
        return True

    def _end(self, rows: Container[Row]) -> None:
        """Take rows out of the prefills under way; a row may ride along in another lane's chunk."""
        self._begun = [tuple(_without(groups, rows)) for groups in self._begun]

    def _begin(self, rank: int) -> bool:
        """Take the next prompts of a lane; returns whether the decode step computes them."""
        taken = self._take_for_step(rank)
        mixed = bool(taken)
        if not mixed:
            taken = self._take_for_chunk(rank)
        self._begun[rank] = tuple(taken)
        for group in self._begun[rank]:
            for row in group:
                row.phase = Phase.PREFILLING
        return mixed

    def _waits_for_more(self, waiting: list[RowGroup], decoding: int) -> bool:
        """Say whether to put the next chunk off by a step, so that more prompts share it."""
        head, wanted = waiting[0][0], decoding // ROWS_PER_PROMPT
        patience = PATIENCE_STEPS[head.request.rank]
        if not patience:
            return False
        waits = len(waiting) < wanted and self._waited < patience
        if waits:
            # If no others fit into a chunk beside this prompt, it has nothing to wait for.
            head.prefill = self._reservation.pin_prefix(head)
            waits = wanted * head.uncached_tokens <= self._chunk_size.tokens
        self._waited = self._waited + 1 if waits else 0
        return waits

    def _take_for_step(self, rank: int) -> list[RowGroup]:
        """Take prompts that a decode step computes; none if the lane's next prompt is too long."""
        if not self._limits.mixed_reads:
            return []
        packing = StepPacking(
            self._limits, self._chunk_size.tokens, shares_blocks=self._shares_blocks
        )
        taken = self._take(self._waiting[rank], packing)
        if taken:
            packing.most_tokens = int(RIDING_CHUNKS * packing.most_tokens)
            for waiting in self._lower(rank):
                taken += self._take(waiting, packing)
        return taken

    def _take_for_chunk(self, rank: int) -> list[RowGroup]:
        """Take one prompt, or as many short ones as fit one chunk when padded to one length."""
        packing = ChunkPacking(
            self._limits, self._chunk_size.tokens, shares_blocks=self._shares_blocks
        )
        taken = self._take(self._waiting[rank], packing)
        rows = [row for group in taken for row in group]
        cached = min(row.prefill.cached_tokens for row in rows)
        for row in rows:
            row.begin_prefill(cached)
        for waiting in self._lower(rank):
            self._take_along(taken, waiting)
        return taken

    def _lower(self, rank: int) -> Iterator[list[RowGroup]]:
        """Yield the waiting prompts of each lower lane that has no prefill under way."""
        for lower in range(rank + 1, len(LANES)):
            if not self._begun[lower]:
                yield self._waiting[lower]

    def _take(self, waiting: list[RowGroup], packing: Packing) -> list[RowGroup]:
        """Take prompts in their order, as long as there is room for the next one."""
        taken: list[RowGroup] = []
        while waiting:
            self._pin_prefixes(waiting[0])
            if not packing.has_room_for(waiting[0]):
                break
            packing.add(waiting[0])
            taken.append(waiting.pop(0))
        return taken

    def _take_along(self, taken: list[RowGroup], waiting: list[RowGroup]) -> None:
        """Add prompts of a lower lane that make the chunk little longer and not much larger."""
        most = RIDING_CHUNKS * self._chunk_size.tokens
        longest = max(group[0].uncached_tokens for group in taken)
        if not longest:
            return  # all is cached: there is no forward pass to ride in
        length = -(-longest // RIDING_TOKENS) * RIDING_TOKENS
        cached = taken[0][0].prefill.cached_tokens
        packing = ChunkPacking(
            self._limits, self._chunk_size.tokens, taken, shares_blocks=self._shares_blocks
        )
        while waiting and (len(taken) + 1) * length <= most:
            head = waiting[0][0]
            if head.context_length - cached > length:
                return
            self._pin_prefixes(waiting[0])
            if head.prefill.cached_tokens < cached or not packing.has_room_for(waiting[0]):
                return
            taken.append(waiting.pop(0))
            for row in taken[-1]:
                row.begin_prefill(cached)
            packing.add(taken[-1])

    def _pin_prefixes(self, group: RowGroup) -> None:
        for row in group:
            row.prefill = self._reservation.pin_prefix(row)


def _without(groups: Iterable[RowGroup], leaving: Container[Row]) -> Iterator[RowGroup]:
    for group in groups:
        if kept := tuple(row for row in group if row not in leaving):
            yield kept
