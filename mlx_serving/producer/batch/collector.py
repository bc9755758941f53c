"""The collector: finds the jobs that ended and writes their results down."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from mlx_serving.common.states import TERMINAL, JobState
from mlx_serving.producer.batch.objects import LineError
from mlx_serving.producer.batch.store import CANCELLED_BY_BATCH, DEADLINE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mlx_serving.common.results import GenerationResult
    from mlx_serving.producer.batch.feeder import Flight, Window
    from mlx_serving.producer.batch.index import Place
    from mlx_serving.producer.batch.results import Results
    from mlx_serving.producer.batch.store import JobStore

PAGE_JOBS: Final = 256  # states a round trip
RESULT_JOBS: Final = 64  # result records a round trip, and in memory at once

_ENDED: Final = frozenset(state.value for state in TERMINAL)

BATCH_EXPIRED: Final = LineError(
    code="batch_expired", message="the completion window ended before this line did"
)
BATCH_CANCELLED: Final = LineError(
    code="batch_cancelled", message="the batch was cancelled before this line ended"
)


class Collector:
    """Collects the lines of one model that are in flight.

    Bulk jobs publish nothing, so it looks. Jobs start in the order in which they were fed, so a
    look ends at the first page of jobs that all still wait: it costs what runs, not the window.

    Args:
        store: the model's Redis.
        window: the lines in flight.
        results: takes what they ended with.
        lost: takes the place of a line whose job is gone.

    """

    def __init__(
        self, store: JobStore, window: Window, results: Results, lost: Callable[[Place], None]
    ) -> None:
        self._store, self._window, self._results, self._lost = store, window, results, lost
        self.collected: list[str] = []  # jobs to forget, once their results are on disk

    def collect(self, *, sweep: bool = False) -> int:
        """Take what ended; returns how many lines. `sweep` looks at all that is in flight.

        Raises:
            QueueUnavailable: Redis is away; what was not taken is taken at the next call.

        """
        flights = self._window.flights
        ended = waiting = 0
        for start in range(0, len(flights), PAGE_JOBS):
            page = flights[start : start + PAGE_JOBS]
            states = self._store.states([flight.job_id for flight in page])
            queued = states.count(JobState.QUEUED.value)
            waiting += queued
            ended += self._take(page, states)
            if queued == len(page) and not sweep:
                waiting += len(flights) - start - len(page)
                break
        self._window.waiting = waiting
        return ended

    def _take(self, page: Sequence[Flight], states: Sequence[str | None]) -> int:
        ended = []
        for flight, state in zip(page, states, strict=True):
            if state is None:
                self._lose(flight)
            elif state in _ENDED:
                ended.append(flight)
        for start in range(0, len(ended), RESULT_JOBS):
            some = ended[start : start + RESULT_JOBS]
            found = self._store.results([flight.job_id for flight in some])
            for flight, result in zip(some, found, strict=True):
                self._settle(flight, result)
        return len(ended)

    def _settle(self, flight: Flight, result: GenerationResult | None) -> None:
        if result is None:  # it expired between the two looks
            self._lose(flight)
            return
        if result.state is JobState.FINISHED:
            self._results.finished(flight, result)
        else:
            error = _error_of(result, flight.line)
            self._results.failed_line(flight.line, flight.custom_id, error, result.id)
        self._window.remove(flight)
        self.collected.append(flight.job_id)

    def _lose(self, flight: Flight) -> None:
        self._window.remove(flight)
        self._lost(flight.place)


def _error_of(result: GenerationResult, line: int) -> LineError:
    """Why a job did not finish, in the batch's words where the batch itself is the reason."""
    error = result.error
    code, message = (error.code, error.message) if error else (result.state.value, "")
    if result.state is JobState.EXPIRED and code == DEADLINE:
        code, message = BATCH_EXPIRED.code, BATCH_EXPIRED.message
    elif result.state is JobState.CANCELLED and CANCELLED_BY_BATCH in {code, message}:
        code, message = BATCH_CANCELLED.code, BATCH_CANCELLED.message
    return LineError(code=code, message=message, line=line)
