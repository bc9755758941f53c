"""Prompts are computed and their rows join the batch; what fails for several is tried for each."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial

from mlx_serving.worker.engine.batch_runner import BatchRunner
from mlx_serving.worker.engine.failures import attempt
from mlx_serving.worker.engine.memory.recovery import OUT_OF_MEMORY
from mlx_serving.worker.engine.row import Row, RowError
from mlx_serving.worker.engine.scheduling.chunk import Group, PrefillChunk
from mlx_serving.worker.engine.scheduling.scheduler import Scheduler

Failure = tuple[Iterable[Row], RowError]


class Prefilling:
    """Takes a step's chunk from the scheduler to the runner.

    What it yields has failed, and is to be ended or taken out before it goes on. It raises
    `LaunchedWorkError` where something failed that was launched before.
    """

    def __init__(
        self, runner: BatchRunner, scheduler: Scheduler, tell: Callable[[Iterable[str]], None]
    ) -> None:
        """Take who computes and who knows the rows; `tell` gets the requests of each chunk."""
        self._runner, self._scheduler, self._tell = runner, scheduler, tell

    def compute(self, chunk: PrefillChunk) -> Iterator[Failure]:
        """Compute a chunk; its rows join where it is the last one of their prompts."""
        error = self._try_prefill(chunk)
        if error is None and self._scheduler.finish_prefill(chunk):
            error = self._try_join(chunk)
        if error is None:
            return
        if len(chunk.groups) == 1 or error.code == OUT_OF_MEMORY:
            yield chunk.rows, error
        else:
            yield from self.compute_apart(chunk.groups)

    def compute_apart(self, groups: Iterable[Group]) -> Iterator[Failure]:
        """Compute prompts one by one: one of them may have been to blame for all."""
        for group in groups:
            for row in group:
                row.failed = False
                row.found = row.prefilled = 0
            chunks = self._scheduler.chunks_of(group)
            error = next(filter(None, map(self._try_prefill, chunks)), None)
            if error is None:
                self._scheduler.finish_prefill(chunks[-1])
                error = self._try_join(chunks[-1])
            if error is not None:
                yield group, error

    def waiting_for_step(self, chunk: PrefillChunk | None) -> list[Group]:
        """Return prompts that the next decode step is to compute; those that failed are gone."""
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
            self._scheduler.joined(chunk.groups)
        else:
            self._runner.drop_prefill(chunk.lane)
        return error
