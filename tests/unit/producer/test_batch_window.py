"""What a batch has in flight: how much more may go, and what a look at it costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from mlx_serving.common.events import ErrorInfo
from mlx_serving.common.results import GenerationResult
from mlx_serving.common.states import JobState
from mlx_serving.producer.batch.collector import PAGE_JOBS, Collector
from mlx_serving.producer.batch.index import LinePlace
from mlx_serving.producer.batch.objects import CHAT
from mlx_serving.producer.batch.window import SubmittedLine, Window

if TYPE_CHECKING:
    from collections.abc import Sequence


def flights(count: int, length: int = 1) -> list[SubmittedLine]:
    return [
        SubmittedLine(LinePlace(n, 0, length), f"job-{n}", f"id-{n}", CHAT, "tally")
        for n in range(1, count + 1)
    ]


class TestWindow:
    def test_it_is_filled_to_its_depth_once_half_of_it_is_used_up(self) -> None:
        window = Window(depth=100, most=1000)
        assert window.room == 100
        window.add(flights(100))
        assert window.room == 0
        window.waiting = 51
        assert window.room == 0
        window.waiting = 50
        assert window.room == 50

    def test_no_more_than_the_most_are_in_flight(self) -> None:
        window = Window(depth=100, most=120)
        window.add(flights(100))
        window.waiting = 0
        assert window.room == 20

    def test_their_bytes_are_bounded(self) -> None:
        window = Window(depth=100, most=1000, most_bytes=500)
        going = flights(5, length=100)
        window.add(going)
        window.waiting = 0
        assert window.room == 0
        window.remove(going[0])
        assert window.room == 100
        window.remove(going[0])
        assert (window.room, len(window)) == (100, 4)


class Store:
    """Jobs in states, and how often they were looked at."""

    def __init__(self, states: dict[str, str]) -> None:
        self.states_by_id = states
        self.looks = 0
        self.expired = False

    def states(self, job_ids: Sequence[str]) -> list[str | None]:
        self.looks += 1
        return [self.states_by_id.get(job_id) for job_id in job_ids]

    def results(self, job_ids: Sequence[str]) -> list[GenerationResult | None]:
        if self.expired:
            return [None for _ in job_ids]
        return [self._result(job_id) for job_id in job_ids]

    def _result(self, job_id: str) -> GenerationResult | None:
        state = self.states_by_id.get(job_id)
        error = ErrorInfo("deadline_exceeded", "late")
        return state and GenerationResult(id=job_id, state=JobState(state), error=error)  # type: ignore[return-value]


class Sink:
    """Takes what ended."""

    def __init__(self) -> None:
        self.lines: list[int] = []
        self.codes: list[str] = []

    def finished(self, flight: SubmittedLine, _: GenerationResult) -> None:
        self.lines.append(flight.line)

    def failed_line(self, line: int, _custom_id: str, error: Any, _job: str) -> None:
        self.lines.append(line)
        self.codes.append(error.code)


class TestCollector:
    def collector(self, count: int, **states: str) -> tuple[Collector, Store, Sink, Window]:
        going = flights(count)
        store = Store({f.job_id: states.get(f"n{f.line}", "queued") for f in going})
        window, sink = Window(10_000, 10_000), Sink()
        window.add(going)
        self.lost: list[int] = []
        collector: Any = Collector(
            store,  # type: ignore[arg-type]
            window,
            sink,  # type: ignore[arg-type]
            lambda place: self.lost.append(place.line),
        )
        return collector, store, sink, window

    def test_a_look_ends_where_all_still_wait(self) -> None:
        collector, store, sink, window = self.collector(5 * PAGE_JOBS, n3="finished", n4="running")
        assert collector.collect() == 1
        assert (sink.lines, store.looks) == ([3], 2)
        assert (window.waiting, len(window)) == (5 * PAGE_JOBS - 2, 5 * PAGE_JOBS - 1)
        assert collector.collected == ["job-3"]

    def test_a_sweep_looks_at_all(self) -> None:
        last = 5 * PAGE_JOBS
        collector, store, sink, _ = self.collector(last, **{f"n{last}": "finished"})
        assert collector.collect() == 0
        assert collector.collect(sweep=True) == 1
        assert (sink.lines, store.looks) == ([last], 1 + 5)

    def test_a_job_that_is_gone_goes_back_to_the_feeder(self) -> None:
        collector, store, sink, window = self.collector(3, n1="finished")
        del store.states_by_id["job-2"]
        collector.collect()
        assert (self.lost, sink.lines, len(window)) == ([2], [1], 1)

    def test_a_result_that_expires_between_two_looks_is_lost_too(self) -> None:
        collector, store, sink, _ = self.collector(1, n1="finished")
        store.expired = True
        collector.collect()
        assert (self.lost, sink.lines, collector.collected) == ([1], [], [])

    @pytest.mark.parametrize("state", ["failed", "dead", "expired", "cancelled"])
    def test_every_end_is_taken(self, state: str) -> None:
        collector, _, sink, _ = self.collector(1, n1=state)
        collector.collect()
        assert sink.lines == [1]
        assert (sink.codes == ["batch_expired"]) == (state == "expired")
