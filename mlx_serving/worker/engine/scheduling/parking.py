"""Which rows give way to a request of a higher lane, and when they go on. Pure.

A row of the lowest lane gives way first, and the newest of that lane: so the oldest goes on and
ends. Its keys and values are kept where the budget allows, else they are computed again when it
goes on. A lane below the highest keeps its share of the batch (`SchedulerLimits.is_share`): rows
beyond it alone give way, and where it has less, nothing of a higher lane takes the room that its
parked rows need for it.

Parked rows go on in the order of lanes and admission, before anything new of their lane.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from mlx_serving.common.queues import LANES
from mlx_serving.worker.engine.row import Phase, Request, Row
from mlx_serving.worker.engine.scheduling.limits import SchedulerLimits
from mlx_serving.worker.engine.scheduling.reservation import Reservation, Trial

# Which rows of a lane give way first: those that lose nothing, last the one that loses most.
_PHASES = (Phase.WAITING, Phase.DECODING, Phase.PREFILLING)


@dataclass(frozen=True, slots=True)
class Parking:
    """What makes room: rows to `park`; rows, of these and of parked ones, to `drop` the KV of."""

    park: tuple[Row, ...] = ()
    drop: tuple[Row, ...] = ()


NOBODY: Final = Parking()
"""There is room as it is."""


class ParkingLot:
    """The parked rows, and the rules; `Scheduler` does what they say."""

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
        """Take a row that left the batch."""
        rows = self._parked[row.request.rank]
        rows.append(row)
        rows.sort(key=lambda parked: parked.order)

    def leave(self, row: Row) -> None:
        """Forget a row."""
        self._parked[row.request.rank].remove(row)

    def make_room(self, choices: tuple[Request, ...], rows: Iterable[Row]) -> Parking | None:
        """Say who of all rows gives way to choices of one lane; None: not enough of them can."""
        if not len(self) and self._reservation.can_add(choices):
            return NOBODY
        rank = choices[0].rank
        if any(self._parked[: rank + 1]):
            return None
        trial = Trial(self._reservation, rank)
        for request in choices:
            trial.add(Row(request))
        self._reserve_shares(trial, below=rank)
        if trial.fits:
            return NOBODY
        return self._give_way(trial, rank, rows)

    def _give_way(self, trial: Trial, rank: int, rows: Iterable[Row]) -> Parking | None:
        parked: list[Row] = []
        dropped: list[Row] = []
        lower = [row for row in rows if row.request.rank > rank and row.phase in _PHASES]
        candidates = _candidates(trial, lower)
        while not trial.fits:
            kept = self._kept(trial, rank, parked) if trial.fits_rows else []
            if kept:
                trial.drop(kept[0])
                dropped.append(kept[0])
                continue
            row = next(candidates, None)
            if row is None or len(self) + len(parked) >= self._limits.batch.max_rows:
                return None
            trial.park(row)
            parked.append(row)
        return Parking(tuple(parked), tuple(dropped))

    def _kept(self, trial: Trial, rank: int, parked: list[Row]) -> list[Row]:
        """Rows of lanes below whose keys and values could go, the first to go first."""
        rows = [row for lane in self._parked[rank + 1 :] for row in lane] + parked
        kept = [row for row in rows if trial.keeps(row)]
        return sorted(kept, key=lambda row: (-row.request.rank, -row.order))

    def _reserve_shares(self, trial: Trial, below: int) -> None:
        """Add the parked rows that lanes below need back for their shares."""
        for rank in range(below + 1, len(LANES)):
            for row in self._parked[rank]:
                if trial.has_share(rank):
                    break
                trial.add(row)

    def next(self) -> Parking | None:
        """Say which parked row goes on now (`park`, one row), and whose KV goes for it; or None.

        Where a lane's next row has no room, nobody passes it but rows of a lane below which has
        less than its share.
        """
        blocked = False
        for rank, rows in enumerate(self._parked):
            if not rows or (blocked and self._reservation.has_share(rank)):
                continue
            found = self._try(rows[0])
            if found is not None:
                return found
            blocked = True
        return None

    def _try(self, row: Row) -> Parking | None:
        rank = row.request.rank
        trial = Trial(self._reservation, rank)
        must = not trial.has_share(rank) or not trial.rows
        trial.add(row)
        self._reserve_shares(trial, below=rank)
        dropped: list[Row] = []
        if must and trial.fits_rows:
            kept = (kept for kept in self._kept(trial, rank - 1, []) if kept is not row)
            while not trial.fits_kv and (newest := next(kept, None)) is not None:
                trial.drop(newest)
                dropped.append(newest)
        return Parking((row,), tuple(dropped)) if trial.fits else None


def _candidates(trial: Trial, lower: list[Row]) -> Iterator[Row]:
    """Rows that may give way, in turn, as long as their lane keeps its share without them."""
    for rank in range(len(LANES) - 1, 0, -1):
        lane = [row for row in lower if row.request.rank == rank]
        lane.sort(key=lambda row: (_PHASES.index(row.phase), -row.order))
        for row in lane:
            if trial.has_share(rank, without=row):
                yield row
