"""The collector: finds the jobs that ended and writes their results to the result files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from mlx_serving.common.states import TERMINAL, JobState
from mlx_serving.producer.batch.objects import LineError
from mlx_serving.producer.batch.store import CANCELLED_BY_BATCH, DEADLINE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mlx_serving.common.results import GenerationResult
    from mlx_serving.producer.batch.index import LinePlace
    from mlx_serving.producer.batch.results import Results
    from mlx_serving.producer.batch.store import JobStore
    from mlx_serving.producer.batch.window import SubmittedLine, Window

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
    """Collects the results of one model's lines that are in flight.

    Bulk jobs publish no events, so the collector polls. Jobs start in the order in which they were
    submitted, so a poll stops at the first page of jobs that are all still queued: its cost grows
    with the jobs that run, not with the window.

    Args:
        store: the model's Redis.
        window: the lines in flight.
        results: takes the result of each line.
        lost: is called with the place of a line whose job is gone from Redis.

    """

    def __init__(
        self, store: JobStore, window: Window, results: Results, lost: Callable[[LinePlace], None]
    ) -> None:
        self._store, self._window, self._results, self._lost = store, window, results, lost
        self.collected: list[str] = []  # jobs to forget, once their results are on disk

    def collect(self, *, sweep: bool = False) -> int:
        """Collect the lines that ended; return how many. `sweep` looks at every line in flight.

        Raises:
            QueueUnavailable: Redis is away; the next call collects what this one did not.

        """
        lines = self._window.lines
        ended = waiting = 0
        for start in range(0, len(lines), PAGE_JOBS):
            page = lines[start : start + PAGE_JOBS]
            states = self._store.states([line.job_id for line in page])
            queued = states.count(JobState.QUEUED.value)
            waiting += queued
            ended += self._take(page, states)
            if queued == len(page) and not sweep:
                waiting += len(lines) - start - len(page)
                break
        self._window.waiting = waiting
        return ended

    def _take(self, page: Sequence[SubmittedLine], states: Sequence[str | None]) -> int:
        ended = []
        for line, state in zip(page, states, strict=True):
            if state is None:
                self._lose(line)
            elif state in _ENDED:
                ended.append(line)
        for start in range(0, len(ended), RESULT_JOBS):
            some = ended[start : start + RESULT_JOBS]
            found = self._store.results([line.job_id for line in some])
            for line, result in zip(some, found, strict=True):
                self._settle(line, result)
        return len(ended)

    def _settle(self, line: SubmittedLine, result: GenerationResult | None) -> None:
        if result is None:  # it expired between the two reads
            self._lose(line)
            return
        if result.state is JobState.FINISHED:
            self._results.finished(line, result)
        else:
            error = _error_of(result, line.line)
            self._results.failed_line(line.line, line.custom_id, error, result.id)
        self._window.remove(line)
        self.collected.append(line.job_id)

    def _lose(self, line: SubmittedLine) -> None:
        self._window.remove(line)
        self._lost(line.place)


def _error_of(result: GenerationResult, line: int) -> LineError:
    """Why a job did not finish; a code of the batch's own if the batch itself is the reason."""
    error = result.error
    code, message = (error.code, error.message) if error else (result.state.value, "")
    if result.state is JobState.EXPIRED and code == DEADLINE:
        code, message = BATCH_EXPIRED.code, BATCH_EXPIRED.message
    elif result.state is JobState.CANCELLED and CANCELLED_BY_BATCH in {code, message}:
        code, message = BATCH_CANCELLED.code, BATCH_CANCELLED.message
    return LineError(code=code, message=message, line=line)
