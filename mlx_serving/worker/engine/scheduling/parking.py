"""Which rows are parked for a request of a higher lane, and when they continue. Pure.

The newest row of the lowest lane is parked first, so that the oldest rows finish. A parked row
keeps its keys and values if the budget allows; else they are evicted, and computed again when it
continues. A lane below the highest keeps its share of the batch (`SchedulerLimits.is_share`): only
its rows beyond that are parked. If it has less, no row of a higher lane takes the room that its
parked rows need to regain it.

Parked rows continue in the order of lanes and admission, before anything new of their lane.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from mlx_serving.common.queues import LANES
from mlx_serving.worker.engine.interface import Request
from mlx_serving.worker.engine.row import Phase, Row
from mlx_serving.worker.engine.scheduling.limits import SchedulerLimits
from mlx_serving.worker.engine.scheduling.reservation import Reservation, Trial

# The order in which rows of a lane are parked: those that lose nothing first, that lose most last.
_PHASES = (Phase.WAITING, Phase.DECODING, Phase.PREFILLING)


@dataclass(frozen=True, slots=True)
class Parking:
    """How to make room: `park` these rows, and `evict` the keys and values of those.

    Rows to evict are parked already or are among those to park.
    """

    park: tuple[Row, ...] = ()
    evict: tuple[Row, ...] = ()


NO_PARKING: Final = Parking()
"""There is room as it is."""


@dataclass(frozen=True, slots=True)
class Resumption:
    """The parked row to `resume`, and the parked rows to `evict` before that."""

    resume: Row
    evict: tuple[Row, ...] = ()


class ParkingLot:
    """The parked rows, and the rules; `Scheduler` acts on the answers."""

    def __init__(self, limits: SchedulerLimits, reservation: Reservation) -> None:
        """Start empty."""
        self._limits, self._reservation = limits, reservation
        self._parked: list[list[Row]] = [[] for _ in LANES]  # each in order of admission

    def __len__(self) -> int:
        """Parked rows."""
        return sum(map(len, self._parked))

    @property
    def by_lane(self) -> tuple[int, ...]:
        """Parked rows of each lane."""
        return tuple(map(len, self._parked))

    def enter(self, row: Row) -> None:
        """Add a row that left the batch."""
        rows = self._parked[row.request.rank]
        rows.append(row)
        rows.sort(key=lambda parked: parked.order)

    def leave(self, row: Row) -> None:
        """Remove a row."""
        self._parked[row.request.rank].remove(row)

    def find_room(self, request: Request, rows: Iterable[Row]) -> Parking | None:
        """Say which of all rows to park and evict for a request; None: there can't be room."""
        if not len(self) and self._reservation.can_add(request):
            return NO_PARKING
        rank = request.rank
        if any(self._parked[: rank + 1]):
            return None
        trial = Trial(self._reservation, rank)
        for choice in request.choices:
            trial.add(Row(request, choice))
        self._reserve_shares(trial, below=rank)
        if trial.fits:
            return NO_PARKING
        return self._find_parking(trial, rank, rows)

    def _find_parking(self, trial: Trial, rank: int, rows: Iterable[Row]) -> Parking | None:
        parked: list[Row] = []
        evicted: list[Row] = []
        lower = [row for row in rows if row.request.rank > rank and row.phase in _PHASES]
        candidates = _candidates(trial, lower)
        while not trial.fits:
            evictable = self._evictable(trial, rank, parked) if trial.fits_rows else []
            if evictable:
                trial.evict(evictable[0])
                evicted.append(evictable[0])
                continue
            row = next(candidates, None)
            if row is None or len(self) + len(parked) >= self._limits.batch.max_rows:
                return None
            trial.park(row)
            parked.append(row)
        return Parking(tuple(parked), tuple(evicted))

    def _evictable(self, trial: Trial, rank: int, parked: list[Row]) -> list[Row]:
        """Rows of lower lanes whose keys and values may be evicted, in that order."""
        rows = [row for lane in self._parked[rank + 1 :] for row in lane] + parked
        kept = [row for row in rows if trial.keeps(row)]
        return sorted(kept, key=lambda row: (-row.request.rank, -row.order))

    def _reserve_shares(self, trial: Trial, below: int) -> None:
        """Add the parked rows that lower lanes need back to have their shares."""
        for rank in range(below + 1, len(LANES)):
            for row in self._parked[rank]:
                if trial.has_share(rank):
                    break
                trial.add(row)

    def next(self) -> Resumption | None:
        """Say which parked row continues now; None if there is room for none.

        If a lane's next row has no room, only rows of lower lanes with less than their share may
        overtake it.
        """
        blocked = False
        for rank, rows in enumerate(self._parked):
            if not rows or (blocked and self._reservation.has_share(rank)):
                continue
            found = self._find_resumption(rows[0])
            if found is not None:
                return found
            blocked = True
        return None

    def _find_resumption(self, row: Row) -> Resumption | None:
        rank = row.request.rank
        trial = Trial(self._reservation, rank)
        must = not trial.has_share(rank) or not trial.rows
        trial.add(row)
        self._reserve_shares(trial, below=rank)
        evicted: list[Row] = []
        if must and trial.fits_rows:
            evictable = (kept for kept in self._evictable(trial, rank - 1, []) if kept is not row)
            while not trial.fits_kv and (newest := next(evictable, None)) is not None:
                trial.evict(newest)
                evicted.append(newest)
        return Resumption(row, tuple(evicted)) if trial.fits else None


def _candidates(trial: Trial, lower: list[Row]) -> Iterator[Row]:
    """Yield rows that may be parked, in order, while their lane keeps its share without them."""
    for rank in range(len(LANES) - 1, 0, -1):
        lane = [row for row in lower if row.request.rank == rank]
        lane.sort(key=lambda row: (_PHASES.index(row.phase), -row.order))
        for row in lane:
            if trial.has_share(rank, without=row):
                yield row
