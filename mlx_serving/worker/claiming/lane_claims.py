"""Which lanes a worker claims from next, and how many jobs. Pure.

Free rows are for all lanes, in their order. The last free ones go first to a lane that has less
than its share (`lane_min_share`), so that it gets rows in a batch that other lanes filled. If no
row is free, the headroom is for the highest lane, and for a lane that has less than its share; and
a higher lane may claim as many jobs as there are rows of lower lanes that can give way in the
engine.
A lane with parked rows claims nothing: these go on first.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING

from mlx_serving.common.queues import LANES, lane_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mlx_serving.common.queues import Lane
    from mlx_serving.worker.engine.interface import LaneRows
    from mlx_serving.worker.engine.scheduling.limits import BatchSize


@dataclass(frozen=True, slots=True)
class LaneClaim:
    """Lanes in the order to look into, and how many jobs to take at most."""

    lanes: tuple[Lane, ...]
    most: int

    def up_to(self, limit: int) -> LaneClaim:
        """Return the same for no more than `limit` jobs."""
        return LaneClaim(self.lanes, min(self.most, limit))


@dataclass(frozen=True, slots=True)
class LaneRoom:
    """The room of a batch."""

    batch: BatchSize

    def next_claim(
        self, rows: LaneRows, in_hand: Sequence[Lane] = (), in_line: Sequence[Lane] = ()
    ) -> LaneClaim | None:
        """Return the next claim, None if there is no room.

        `in_hand` are lanes of jobs just claimed, `in_line` of those that the engine has not
        admitted: of their lanes and below nothing more is claimed.
        """
        ranks = [LANES.index(lane) for lane in (*in_hand, *in_line)]
        active = [count + ranks.count(rank) for rank, count in enumerate(rows.active)]
        stops = [LANES.index(lane) for lane in in_line]
        stops += [rank for rank, parked in enumerate(rows.parked) if parked]
        allowed = range(min(stops, default=len(LANES)))
        lacking = [max(0, self.batch.lane_min_rows - count) if rank else 0
                   for rank, count in enumerate(active)]  # fmt: skip
        due = sum(map(min, lacking, rows.parked))  # rows that parked ones take when they can
        free = self.batch.max_rows - sum(active) - due
        wanted = sum(lacking[rank] for rank in allowed)
        if free > wanted:
            return _claim(allowed, free)
        if free > 0:
            return _claim(sorted(allowed, key=lambda rank: not lacking[rank]), free)
        poor = [rank for rank in allowed if lacking[rank]]
        beyond = min([free + self.batch.headroom_rows, *(lacking[rank] for rank in poor)])
        if poor and beyond > 0:
            return _claim([*poor, 0], beyond)
        return self._claim_over(active, allowed, free, sum(rows.parked))

    def _claim_over(
        self, active: Sequence[int], allowed: range, free: int, parked: int
    ) -> LaneClaim | None:
        """Claim for lanes above rows that can give way, and for the highest what is left."""
        for rank in reversed(allowed):
            beyond = sum(max(0, rows - self.batch.lane_min_rows) for rows in active[rank + 1 :])
            room = free if rank else free + self.batch.headroom_rows
            most = min(beyond + room, self.batch.max_rows - parked)
            if most > 0:
                return _claim(range(rank + 1), most)
        return None


class LaneNews:
    """In which lanes there may be jobs that no claim has found.

    A claim of all lanes looks whenever there is room. One of some lanes only is for what has come
    in since: it is made if a wake-up says so, and now and then without one.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Look without a wake-up, which may be lost, every so many seconds."""
        self._seconds, self._clock = seconds, clock
        self._looked_at = clock()
        self._lanes = set(LANES)
        self._asked: set[Lane] = set()  # lanes of the last claim of which there was news
        self._due = inf  # when a job that was left to another worker is anybody's

    def note(self, queue: str = "") -> None:
        """Take a wake-up of a queue; '': of any."""
        self._lanes |= {lane_of(queue)} if queue else set(LANES)

    def expect(self, seconds: float) -> None:
        """Note that there may be jobs in so many seconds, without a wake-up; 0: there are none."""
        if seconds > 0:
            self._due = min(self._due, self._clock() + seconds)

    def due_in(self) -> float:
        """Return the seconds until then, 0 once; infinite if nothing is expected."""
        left = self._due - self._clock()
        if left > 0:
            return left
        self._due = inf
        self.note()
        return 0.0

    def worth(self, claim: LaneClaim | None) -> LaneClaim | None:
        """Return what of a claim is worth making."""
        self.due_in()
        if claim is None or len(claim.lanes) == len(LANES):
            return claim
        if self._clock() - self._looked_at >= self._seconds:
            self._looked_at = self._clock()
            self.note()
        lanes = tuple(lane for lane in claim.lanes if lane in self._lanes)
        return LaneClaim(lanes, claim.most) if lanes else None

    def ask(self, claim: LaneClaim) -> None:
        """Note that a claim is on its way: a wake-up from now on may be of a job that it misses."""
        self._asked = self._lanes.intersection(claim.lanes)
        self._lanes.difference_update(claim.lanes)

    def found_more(self, claim: LaneClaim, last: Lane | None = None) -> None:
        """Note that it did not take all that there may be.

        Where its `last` job is known to be from a lane, those before that have no more, and of
        those behind it as much is known as when it was made. None: any lane may have more.
        """
        if last not in claim.lanes:
            self._lanes.update(claim.lanes)
            return
        behind = claim.lanes[claim.lanes.index(last) + 1 :]
        self._lanes |= {last} | self._asked.intersection(behind)


def _claim(ranks: Sequence[int], most: int) -> LaneClaim | None:
    return LaneClaim(tuple(LANES[rank] for rank in ranks), most) if ranks else None
