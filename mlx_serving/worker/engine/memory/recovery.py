"""Recovery of rows after the device ran out of memory. Pure."""

from __future__ import annotations

import re
from collections import deque
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from mlx_serving.worker.engine.interface import (
    Request,
    RequestChoice,
    RequestRefusedError,
    RowError,
)
from mlx_serving.worker.engine.scheduling.parking import NO_PARKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mlx_serving.worker.engine.memory.guard import MemoryRoom
    from mlx_serving.worker.engine.row import Row
    from mlx_serving.worker.engine.scheduling.scheduler import Scheduler

_SIGNS: Final = re.compile(
    r"out of memory|OutOfMemory|insufficient memory|unable to allocate|\[metal::malloc\]"
    r"|cudaErrorMemoryAllocation",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether the error is the device's lack of memory."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError | ValueError) and bool(_SIGNS.search(str(error)))
    )


OUT_OF_MEMORY: Final = "out_of_memory"
NO_MEMORY: Final = RowError(OUT_OF_MEMORY, "the device ran out of memory over this request")


RowProgress = tuple[str, int, int]  # request id, index of the choice, decoded tokens


class Recovery:
    """Keeps rows that lost their state, until there is room to begin them again."""

    def __init__(self, scheduler: Scheduler, room: MemoryRoom) -> None:
        """Start empty."""
        self._scheduler, self._room = scheduler, room
        self._rows: deque[Row] = deque()
        self._alone: RowProgress | None = None  # the last row that ran out of memory by itself

    def __len__(self) -> int:
        """Rows that wait for room."""
        return len(self._rows)

    def take(self, rows: Sequence[Row]) -> list[Row]:
        """Take admitted rows out of the scheduler; return those that have to end.

        A row ends if it ran out of memory twice, alone and without progress in between.
        """
        scheduler = self._scheduler
        progress = [(row.request.id, row.choice.index, row.decoded) for row in rows]
        alone = len(rows) == 1 == len(scheduler.rows)
        hopeless = alone and progress[0] == self._alone
        self._alone = progress[0] if alone else None
        self._room.strike(scheduler.kv_tokens_used)
        for row in rows:
            scheduler.remove(row)
        if hopeless:
            self._room.forgive()
            return list(rows)
        self._rows.extend(rows)
        return []

    def readmit(self) -> None:
        """Admit rows again in their order while there is room; one always, if no other is here."""
        while self._rows:
            lost = self._rows[0]
            choice = RequestChoice(lost.choice.index, (*lost.choice.committed, *lost.tokens))
            request = replace(lost.request, choices=(choice,))
            if not self._can_readmit(request):
                return
            self._rows.popleft()
            (row,) = self._scheduler.add(request)
            _carry_over(lost, row)

    def _can_readmit(self, request: Request) -> bool:
        """Say whether a row may continue now, without parking another."""
        if not self._scheduler.has_work:
            return True
        try:
            return self.has_room(request) and self._scheduler.find_room(request) == NO_PARKING
        except RequestRefusedError:
            return False

    def has_room(self, request: Request) -> bool:
        """Say whether scheduler and memory have room for a request."""
        scheduler = self._scheduler
        return scheduler.can_add(request) and self._room.admits(
            request.kv_tokens,
            request.prefill_tokens,
            used=scheduler.kv_tokens_used,
            rows=scheduler.admitted,
            kept=scheduler.kv_tokens_kept,
        )

    @property
    def rows(self) -> list[Row]:
        """Rows that wait to begin again."""
        return list(self._rows)

    def forget(self, request_id: str) -> list[Row]:
        """Forget a request's rows; returns them."""
        gone = [row for row in self._rows if row.request.id == request_id]
        self._rows = deque(row for row in self._rows if row.request.id != request_id)
        return gone


def _carry_over(lost: Row, row: Row) -> None:
    """Let the new row continue from the state of the lost one, whose text was returned."""
    row.slot, row.decoded, row.parser = lost.slot, lost.decoded, lost.parser
    reported = lost.prefill.reported_cached_tokens
    row.prefill = replace(row.prefill, reported_cached_tokens=reported)
    if row.request.grammar is not None:
        # From the start: the lost matcher may have taken a token that was never returned.
        row.matcher = row.request.grammar.start()
        row.matcher.replay(row.choice.committed)
