"""Which lane's prompts are computed next. Pure."""

import math
from collections.abc import Iterable

from mlx_serving.common.job.schema import LANES


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
