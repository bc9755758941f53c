"""Computes prompts and lets their rows join the batch; if several fail, tries each alone."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial

from mlx_serving.worker.engine.batch_runner import BatchRunner
from mlx_serving.worker.engine.failures import attempt
from mlx_serving.worker.engine.interface import RowError
from mlx_serving.worker.engine.memory.recovery import OUT_OF_MEMORY
from mlx_serving.worker.engine.row import Row
from mlx_serving.worker.engine.scheduling.chunk import PrefillChunk, RowGroup
from mlx_serving.worker.engine.scheduling.scheduler import Scheduler

FailedRows = tuple[Iterable[Row], RowError]


class Prefilling:
    """Takes a step's chunk from the scheduler to the runner.

    It yields rows that failed; the caller ends them or takes them out before asking for the next.
    It raises `LaunchedWorkError` if work failed that was launched before.
    """

    def __init__(
        self, runner: BatchRunner, scheduler: Scheduler, tell: Callable[[Iterable[str]], None]
    ) -> None:
        """Take runner and scheduler; `tell` is called with the request ids of each chunk."""
        self._runner, self._scheduler, self._tell = runner, scheduler, tell

    def compute(self, chunk: PrefillChunk) -> Iterator[FailedRows]:
        """Compute a chunk; if it completes its prompts, their rows join the batch."""
        error = self._try_prefill(chunk)
        if error is None and self._scheduler.finish_prefill(chunk):
            error = self._try_join(chunk)
        if error is None:
            return
        if len(chunk.groups) == 1 or error.code == OUT_OF_MEMORY:
            yield chunk.rows, error
        else:
            yield from self.compute_apart(chunk.groups)

    def compute_apart(self, groups: Iterable[RowGroup]) -> Iterator[FailedRows]:
        """Compute prompts one by one: one of them may have made all fail."""
        for group in groups:
            for row in group:
                row.failed = False
                row.begin_prefill(cached_tokens=0)
            chunks = self._scheduler.chunks_of(group)
            error = next(filter(None, map(self._try_prefill, chunks)), None)
            if error is None:
                self._scheduler.finish_prefill(chunks[-1])
                error = self._try_join(chunks[-1])
            if error is not None:
                yield group, error

    def waiting_for_step(self, chunk: PrefillChunk | None) -> list[RowGroup]:
        """Return the prompts that the next decode step computes, without those that failed."""
        if chunk is None or not chunk.mixed:
            return []
        return [group for group in chunk.groups if all(map(self._scheduler.is_here, group))]

    def _try_prefill(self, chunk: PrefillChunk) -> RowError | None:
        self._tell([row.request.id for row in chunk.rows])
        if chunk.mixed:
            return None
        error = attempt("prefill", partial(self._runner.prefill, chunk))
        if error is not None:
            self._runner.drop_prefill(chunk.lane)
        return error

    def _try_join(self, chunk: PrefillChunk) -> RowError | None:
        error = attempt("join", partial(self._runner.join, chunk))
        if error is None:
            self._scheduler.join(chunk.groups)
        else:
            self._runner.drop_prefill(chunk.lane)
        return error
