"""What an engine had no room for: of that, nothing more is claimed until there is room."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Final, NamedTuple

from mlx_serving.common.queues import LANES, queue_name
from mlx_serving.worker.claiming.placement import ModelQueues

if TYPE_CHECKING:
    from collections.abc import Callable

    from mlx_serving.worker.engine.interface import Request

CLOSED_SECONDS: Final = 5.0  # how long nobody overtakes a job that there was no room for
PASSED_SECONDS: Final = 5.0  # how long others do then, before it is tried again


class Missing(NamedTuple):
    """A job that was handed back, and when (monotonic seconds)."""

    request: Request
    since: float


class Shortage:
    """Jobs that were handed back because they did not fit, one a model and lane. Thread-safe.

    Such a job stands at the front of its queue, for any worker that has room. Until this worker has
    room, it claims nothing of the job's lane, or of a lower lane of its model: it would claim the
    job again and again, or others would overtake it for ever. After `CLOSED_SECONDS` the job is
    passed: the worker claims jobs that fit beside what runs. After `PASSED_SECONDS` more the job
    is forgotten, and tried again. So nobody waits for ever for a job that was cancelled, or that
    another worker took.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._jobs: dict[tuple[str, int], Missing] = {}  # by model and rank of the lane
        self._clock, self._lock = clock, threading.Lock()

    def __bool__(self) -> bool:
        """Whether any job is waited for."""
        return bool(self._jobs)

    def note(self, request: Request) -> None:
        """Remember a job that was handed back, in place of the last one of its lane."""
        with self._lock:
            self._jobs[request.model, request.rank] = Missing(request, self._clock())

    def settle(self, has_room: Callable[[Request], bool]) -> bool:
        """Forget the jobs that there is room for; returns whether there are any."""
        with self._lock:
            jobs = list(self._jobs.items())
        met = [(key, job) for key, job in jobs if has_room(job.request)]
        over = [
            (key, job) for key, job in jobs if self._age(job) >= CLOSED_SECONDS + PASSED_SECONDS
        ]
        with self._lock:
            for key, job in met + over:
                if self._jobs.get(key) is job:
                    del self._jobs[key]
        return bool(met)

    @property
    def closed(self) -> list[str]:
        """Queues of which nothing is to be claimed."""
        with self._lock:
            keys = [key for key, job in self._jobs.items() if self._age(job) < CLOSED_SECONDS]
        return [queue_name(model, lane) for model, rank in keys for lane in LANES[rank:]]

    def passes(self, model: str) -> bool:
        """Say whether a job of the model is passed: others are claimed that fit now."""
        with self._lock:
            return any(
                key[0] == model and self._age(job) >= CLOSED_SECONDS
                for key, job in self._jobs.items()
            )

    def open_part(self, groups: list[ModelQueues]) -> list[ModelQueues]:
        """Return what of these is to be claimed."""
        closed = self.closed
        kept = (ModelQueues(g.model, tuple(q for q in g.queues if q not in closed)) for g in groups)
        return [group for group in kept if group.queues]

    def _age(self, job: Missing) -> float:
        return self._clock() - job.since
