"""One model's part of a batch: its Redis, its window, its feeder and its collector."""

from __future__ import annotations

import math
from itertools import islice
from typing import TYPE_CHECKING, Final

from mlx_serving.common.queues import queue_name
from mlx_serving.producer.batch.collector import PAGE_JOBS, Collector
from mlx_serving.producer.batch.feeder import Feeder, Window
from mlx_serving.producer.batch.index import read_places
from mlx_serving.producer.batch.store import JobStore
from mlx_serving.producer.client import Client

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlx_serving.common.settings import Settings
    from mlx_serving.producer.batch.folder import BatchFolder, BatchState, Section
    from mlx_serving.producer.batch.index import Place
    from mlx_serving.producer.batch.lines import LineReader
    from mlx_serving.producer.batch.results import Results

GRACE_SECONDS: Final = 15.0  # for running jobs to end once they are cancelled


class Lane:
    """Feeds and collects the lines of one section of the index.

    Raises:
        QueueUnavailable: from `turn`, `cancel` and `forget`, where Redis is away; each may be
            called again.

    """

    def __init__(
        self,
        section: Section,
        folder: BatchFolder,
        state: BatchState,
        settings: Settings,
        reader: LineReader,
        source: int,
        results: Results,
    ) -> None:
        options = state.options
        self.model = section.model
        self.window = Window(options.depth, options.in_flight)
        self._section, self._index, self._results = section, folder.index, results
        self._most, self._reader = options.in_flight, reader
        self._queue = queue_name(section.model, "bulk")
        self._client = Client(settings=settings, model=section.model, tenant=options.tenant)
        self._store = JobStore(self._client.endpoint)
        self._feeder = Feeder(
            self._client, reader, source, self._open_places(), self.window, results
        )
        self._collector = Collector(self._store, self.window, results, self._feeder.again)
        self._cancelled_s = math.inf  # monotonic time at which its jobs were cancelled
        self.wound_up = False

    @property
    def over(self) -> bool:
        """Whether all its lines have ended."""
        return self._feeder.exhausted and not self.window

    def turn(self, seconds_left: float, *, sweep: bool) -> int:
        """Collect what ended and feed what there is room for; returns lines moved."""
        ended = self._collector.collect(sweep=sweep)
        return ended + self._feeder.feed(seconds_left)

    def wind_up(self, now_s: float, reason: str) -> int:
        """Cancel what is in flight, once, and collect; returns how many lines ended.

        `wound_up` says whether that was all: nothing is in flight any more, or it had its time.
        """
        if self._cancelled_s == math.inf:
            self._adopt()
            jobs = [flight.job_id for flight in self.window.flights]
            for start in range(0, len(jobs), PAGE_JOBS):
                self._store.cancel(jobs[start : start + PAGE_JOBS], reason)
            self._cancelled_s = now_s
        ended = self._collector.collect(sweep=True)
        self.wound_up = not self.window or now_s - self._cancelled_s > GRACE_SECONDS
        return ended

    def forget(self) -> None:
        """Delete the jobs whose results are on disk."""
        jobs = self._collector.collected
        while jobs:
            self._store.forget(self._queue, jobs[:PAGE_JOBS])
            del jobs[:PAGE_JOBS]

    def close(self) -> None:
        """Close the connections; jobs in flight go on."""
        self._client.close()
        self._store.close()

    def _open_places(self) -> Iterator[Place]:
        """Lines that have not ended, in their order."""
        places = read_places(self._index, self._section.first, self._section.count)
        return (place for place in places if place.line not in self._results.done)

    def _adopt(self) -> None:
        """Take on what a runner that died had in flight and this one has not submitted again.

        Lines go in order and no more than `in_flight` at once, so none lies further.
        """
        places = list(islice(self._open_places(), self._most))
        for start in range(0, len(places), PAGE_JOBS):
            page = places[start : start + PAGE_JOBS]
            states = self._store.states([self._reader.job_id(place.line) for place in page])
            there = [place for place, state in zip(page, states, strict=True) if state is not None]
            self.window.add(self._feeder.flight(place) for place in there)
