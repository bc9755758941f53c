"""What an engine had no room for: of that, nothing more is claimed until there is room."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from mlx_serving.common.jobs import LANES, queue_name
from mlx_serving.worker.claims.demand import Group

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mlx_serving.worker.engine.sequence import Request


class Shortage:
    """Jobs that were handed back because they did not fit, one a model and lane. Thread-safe.

    Until there is room for such a job, nothing of its lane or a lower one of its model is claimed:
    it would be claimed again and again, or others would overtake it for ever. It stands at the
    front of its queue, for any worker that has the room.
    """

    def __init__(self) -> None:
        self._jobs: dict[tuple[str, int], Sequence[Request]] = {}  # by model and rank of the lane
        self._lock = threading.Lock()

    def __bool__(self) -> bool:
        """Whether any job is waited for."""
        return bool(self._jobs)

    def note(self, choices: Sequence[Request]) -> None:
        """Remember a job that was handed back; the first of its lane stands."""
        with self._lock:
            self._jobs.setdefault((choices[0].model, choices[0].rank), choices)

    def settle(self, has_room: Callable[..., bool]) -> bool:
        """Forget the jobs that there is room for; returns whether there are any."""
        with self._lock:
            jobs = list(self._jobs.items())
        met = [key for key, choices in jobs if has_room(*choices)]
        with self._lock:
            for key in met:
                del self._jobs[key]
        return bool(met)

    @property
    def closed(self) -> list[str]:
        """Queues of which nothing is to be claimed."""
        with self._lock:
            keys = list(self._jobs)
        return [queue_name(model, lane) for model, rank in keys for lane in LANES[rank:]]

    def open_part(self, groups: list[Group]) -> list[Group]:
        """Return what of these is to be claimed."""
        closed = self.closed
        kept = (Group(g.model, tuple(q for q in g.queues if q not in closed)) for g in groups)
        return [group for group in kept if group.queues]
