"""Tells a device that ran out of memory from other errors; which rows lost their state. Pure."""

from __future__ import annotations

import re
from collections import deque
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from mlx_serving.worker.engine.row import Request, RequestRefusedError, Row, RowError
from mlx_serving.worker.engine.scheduling.parking import NOBODY

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mlx_serving.worker.engine.memory.guard import MemoryRoom
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


Place = tuple[str, int, int]  # of a row: request, choice, decoded tokens


class Recovery:
    """Holds such rows until there is room again."""

    def __init__(self, scheduler: Scheduler, room: MemoryRoom) -> None:
        """Start empty."""
        self._scheduler, self._room = scheduler, room
        self._rows: deque[Row] = deque()
        self._alone: Place | None = None  # the last row that ran out of memory by itself

    def __len__(self) -> int:
        """Rows that wait for room."""
        return len(self._rows)

    def take(self, rows: Sequence[Row]) -> list[Row]:
        """Take admitted rows out of the scheduler; return those that are to be ended instead."""
        scheduler = self._scheduler
        places = [(row.request.id, row.request.choice, row.decoded) for row in rows]
        alone = len(rows) == 1 == len(scheduler.rows)
        hopeless = alone and places[0] == self._alone
        self._alone = places[0] if alone else None
        self._room.strike(scheduler.kv_tokens_used)
        for row in rows:
            scheduler.remove(row)
        if hopeless:
            self._room.forgive()
            return list(rows)
        self._rows.extend(rows)
        return []

    def readmit(self) -> None:
        """Admit rows again, in their order, as far as there is room; one may always try."""
        while self._rows:
            lost = self._rows[0]
            request = replace(lost.request, committed=(*lost.request.committed, *lost.tokens))
            if not self._goes_on(request):
                return
            self._rows.popleft()
            (row,) = self._scheduler.add(request)
            _carry_over(lost, row)

    def _goes_on(self, request: Request) -> bool:
        """Say whether a row may go on now; it parks no other."""
        if not self._scheduler.has_work:
            return True
        try:
            return self.has_room(request) and self._scheduler.make_room(request) == NOBODY
        except RequestRefusedError:
            return False

    def has_room(self, *choices: Request) -> bool:
        """Say whether scheduler and memory have room for choices of one request."""
        scheduler = self._scheduler
        return scheduler.can_add(*choices) and self._room.admits(
            choices,
            used=scheduler.kv_tokens_used,
            rows=scheduler.admitted,
            kept=scheduler.kv_tokens_kept,
        )

    @property
    def rows(self) -> list[Row]:
        """Rows that are to begin again."""
        return list(self._rows)

    def forget(self, request_id: str) -> list[Row]:
        """Forget a request's rows; returns them."""
        gone = [row for row in self._rows if row.request.id == request_id]
        self._rows = deque(row for row in self._rows if row.request.id != request_id)
        return gone


def _carry_over(lost: Row, row: Row) -> None:
    """Let the new row go on where the lost one stood; its text is out already."""
    row.slot, row.decoded, row.parser = lost.slot, lost.decoded, lost.parser
    row.cached = lost.cached
    if row.request.grammar is not None:
        # Anew: the lost one may have taken a token that nobody was given.
        row.matcher = row.request.grammar.start()
        row.matcher.replay(row.request.committed)
