"""The part of a batch that one model runs: its Redis, its window, its feeder and its collector."""

from __future__ import annotations

import math
from itertools import islice
from typing import TYPE_CHECKING, Final

from mlx_serving.producer.batch.collector import PAGE_JOBS, Collector
from mlx_serving.producer.batch.feeder import Feeder
from mlx_serving.producer.batch.index import read_places
from mlx_serving.producer.batch.store import JobStore
from mlx_serving.producer.batch.window import Window

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlx_serving.producer.batch.feeder import Connect
    from mlx_serving.producer.batch.folder import BatchFolder, BatchState, Section
    from mlx_serving.producer.batch.index import LinePlace
    from mlx_serving.producer.batch.lines import LineReader
    from mlx_serving.producer.batch.results import Results

GRACE_SECONDS: Final = 15.0  # for running jobs to end once they are cancelled


class ModelPart:
    """Submits and collects the lines of one section of the index.

    Raises:
        QueueUnavailable: from `turn`, `wind_up` and `forget`, if Redis is away; each may be
            called again.

    """

    def __init__(
        self,
        section: Section,
        folder: BatchFolder,
        state: BatchState,
        connect: Connect,
        reader: LineReader,
        source: int,
        results: Results,
    ) -> None:
        options = state.options
        self.model = section.model
        self.window = Window(options.depth, options.in_flight)
        self._section, self._index, self._results = section, folder.index, results
        self._most, self._reader = options.in_flight, reader
        self._client = connect(model=section.model, tenant=options.tenant)
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
        """Collect lines that ended and submit others; return how many of both."""
        ended = self._collector.collect(sweep=sweep)
        return ended + self._feeder.feed(seconds_left)

    def wind_up(self, now_s: float, reason: str) -> int:
        """End early: cancel the jobs in flight, once, and collect; return how many lines ended.

        `wound_up` turns true when no line is in flight, or `GRACE_SECONDS` after the cancelling.
        """
        if self._cancelled_s == math.inf:
            self._adopt()
            jobs = [line.job_id for line in self.window.lines]
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
            self._store.forget(jobs[:PAGE_JOBS])
            del jobs[:PAGE_JOBS]

    def close(self) -> None:
        """Close the connections; jobs in flight go on."""
        self._client.close()
        self._store.close()

    def _open_places(self) -> Iterator[LinePlace]:
        """Lines that have not ended, in the order of the index."""
        places = read_places(self._index, self._section.first, self._section.count)
        return (place for place in places if place.line not in self._results.done)

    def _adopt(self) -> None:
        """Add to the window what a runner that died had in flight and this one did not submit.

        Lines are submitted in order, at most `in_flight` at once, so the first `in_flight` lines
        that have not ended hold all of them.
        """
        places = list(islice(self._open_places(), self._most))
        for start in range(0, len(places), PAGE_JOBS):
            page = places[start : start + PAGE_JOBS]
            states = self._store.states([self._reader.job_id(place.line) for place in page])
            there = [place for place, state in zip(page, states, strict=True) if state is not None]
            self.window.add(self._feeder.submitted_line(place) for place in there)
