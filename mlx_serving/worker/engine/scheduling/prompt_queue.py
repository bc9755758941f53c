"""Whose prompt is prefilled next. Pure."""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from mlx_serving.common.queues import LANES
from mlx_serving.worker.engine.row import Phase, Row
from mlx_serving.worker.engine.scheduling.chunk import ChunkSize, Group, PrefillChunk
from mlx_serving.worker.engine.scheduling.packing import ChunkPacking, Packing, StepPacking

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Iterator

    from mlx_serving.worker.engine.kv.prefix.cache import PrefixCache
    from mlx_serving.worker.engine.scheduling.limits import SchedulerLimits
    from mlx_serving.worker.engine.scheduling.reservation import Reservation


class LaneTurns:
    """The highest lane first, but each lane that waits gets its share of the turns."""

    def __init__(self, min_share: float) -> None:
        """Let one turn in 1 / `min_share` go to a lane that waits; 0: none."""
        self._patience = math.ceil(1 / min_share) - 1 if min_share else math.inf
        self._passed = [0] * len(LANES)  # turns since a lane that waits had one

    def next(self, waiting: Iterable[int]) -> int:
        """Return whose turn it is of the ranks that wait, at least one; they don't change."""
        ranks = sorted(waiting)
        overdue = (rank for rank in ranks if self._passed[rank] >= self._patience)
        return next(overdue, ranks[0])

    def take(self, turn: int, waiting: Iterable[int]) -> None:
        """Note that a lane had its turn while these waited."""
        ranks = set(waiting)
        self._passed = [
            passed + 1 if rank in ranks and rank != turn else 0
            for rank, passed in enumerate(self._passed)
        ]


ROWS_PER_PROMPT: Final = 16  # so many decoding rows make one more prompt worth waiting for


PATIENCE_STEPS: Final = (0, 4, 8)  # by lane, the most that a prompt waits for others


RIDING_CHUNKS: Final = 0.5  # of a chunk: what it may come to hold by prompts that ride along


RIDING_TOKENS: Final = 32  # such a prompt is as long as the others, rounded up to so many


class PromptQueue:
    """Prompts that wait, and those of which a part is computed: at most one chunk's a lane."""

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
        self._waiting: list[list[Group]] = [[] for _ in LANES]
        self._begun: list[tuple[Group, ...]] = [()] * len(LANES)
        self._turns = LaneTurns(limits.batch.lane_min_share)
        self._waited = 0  # steps for which the next prompt was put off

    def add(self, group: Group) -> None:
        """Queue a prompt, in its lane's order of admission."""
        insort(self._waiting[group[0].request.rank], group, key=lambda rows: rows[0].order)
        for row in group:
            row.phase = Phase.WAITING
            self._reservation.look_up(row)

    def remove(self, row: Row) -> None:
        """Forget a row; one that is not here is ignored."""
        rank = row.request.rank
        if row.phase is Phase.WAITING:
            self._waiting[rank] = list(_without(self._waiting[rank], (row,)))
        elif row.phase is Phase.PREFILLING:
            self._end((row,))
        self._reservation.let_go(row)

    def begun(self, rank: int) -> tuple[Group, ...]:
        """Return the prompts under way in a lane's chunk: those that ride with it, too.

        Between two steps there is at most one, which is the lane's own and takes several chunks: a
        chunk of several prompts computes all of each.
        """
        return self._begun[rank]

    def schedule(self, decoding: int) -> PrefillChunk | None:
        """Choose the next chunk beside so many decoding rows; None where there is none."""
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
        start = leaders[0].prefilled - leaders[0].found
        length = max(map(_to_compute, leaders)) - start
        if not mixed:
            length = min(length, self._chunk_size.tokens)
        return PrefillChunk(groups, start, length, mixed=mixed)

    def finish(self, chunk: PrefillChunk) -> bool:
        """Record that the chunk is computed; return whether that was all of its prompts."""
        for row in chunk.rows:
            row.prefilled = min(row.found + chunk.start + chunk.length, row.context_length)
        if not chunk.completes:
            return False
        for row in chunk.rows:
            row.phase = Phase.DECODING
        self._end(chunk.rows)
        return True

    def _end(self, rows: Container[Row]) -> None:
        """Let prefills under way go on without these rows, which may ride with another lane."""
        self._begun = [tuple(_without(groups, rows)) for groups in self._begun]

    def _begin(self, rank: int) -> bool:
        """Take the next prompts of a lane; returns whether the decode step is to compute them."""
        taken = self._take_for_step(rank)
        mixed = bool(taken)
        if not mixed:
            taken = self._take_for_chunk(rank)
        self._begun[rank] = tuple(taken)
        for group in self._begun[rank]:
            for row in group:
                row.phase = Phase.PREFILLING
        return mixed

    def _waits_for_more(self, waiting: list[Group], decoding: int) -> bool:
        """Say whether the next chunk is put off by a step, so that more prompts share it."""
        head, wanted = waiting[0][0], decoding // ROWS_PER_PROMPT
        patience = PATIENCE_STEPS[head.request.rank]
        if not patience:
            return False
        waits = len(waiting) < wanted and self._waited < patience
        if waits:
            # A prompt beside which no others fit into a chunk has nothing to wait for.
            self._reservation.look_up(head)
            waits = wanted * _to_compute(head) <= self._chunk_size.tokens
        self._waited = self._waited + 1 if waits else 0
        return waits

    def _take_for_step(self, rank: int) -> list[Group]:
        """Take prompts that a decode step computes; none where the lane's next is too long."""
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

    def _take_for_chunk(self, rank: int) -> list[Group]:
        """Take one prompt, or as many short ones as fit one chunk when padded alike."""
        packing = ChunkPacking(
            self._limits, self._chunk_size.tokens, shares_blocks=self._shares_blocks
        )
        taken = self._take(self._waiting[rank], packing)
        rows = [row for group in taken for row in group]
        found = min(row.found for row in rows)
        for row in rows:
            row.found = row.prefilled = found
        for waiting in self._lower(rank):
            self._take_along(taken, waiting)
        return taken

    def _lower(self, rank: int) -> Iterator[list[Group]]:
        """Yield what waits in each lower lane that has no prefill under way."""
        for lower in range(rank + 1, len(LANES)):
            if not self._begun[lower]:
                yield self._waiting[lower]

    def _take(self, waiting: list[Group], packing: Packing) -> list[Group]:
        """Take prompts in their order as far as they are packed."""
        taken: list[Group] = []
        while waiting:
            for row in waiting[0]:
                self._reservation.look_up(row)
            if not packing.has_room_for(waiting[0]):
                break
            packing.add(waiting[0])
            taken.append(waiting.pop(0))
        return taken

    def _take_along(self, taken: list[Group], waiting: list[Group]) -> None:
        """Add prompts of a lower lane that make the chunk hardly longer and not much larger."""
        most = RIDING_CHUNKS * self._chunk_size.tokens
        longest = max(_to_compute(group[0]) for group in taken)
        if not longest:
            return  # all is known: there is no pass to ride in
        length = -(-longest // RIDING_TOKENS) * RIDING_TOKENS
        found = taken[0][0].found
        packing = ChunkPacking(
            self._limits, self._chunk_size.tokens, taken, shares_blocks=self._shares_blocks
        )
        while waiting and (len(taken) + 1) * length <= most:
            head = waiting[0][0]
            if head.context_length - found > length:
                return
            for row in waiting[0]:
                self._reservation.look_up(row)
            if head.found < found or not packing.has_room_for(waiting[0]):
                return
            taken.append(waiting.pop(0))
            for row in taken[-1]:
                row.found = row.prefilled = found
            packing.add(taken[-1])


def _without(groups: Iterable[Group], leaving: Container[Row]) -> Iterator[Group]:
    for group in groups:
        if kept := tuple(row for row in group if row not in leaving):
            yield kept


def _to_compute(row: Row) -> int:
    return row.context_length - row.found
