"""The runner: takes a batch to its end (validate, submit, collect, wind up). Safe to kill.

It is one loop in one thread: collect, submit, write to disk, sleep. What a new runner needs to go
on after a crash is in the folder (the result files say which lines have ended) and in Redis (the
jobs themselves).
"""

from __future__ import annotations

import os
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, TypeVar

import structlog

from mlx_serving.common.errors import InvalidBatch, MlxServingError, QueueFailure
from mlx_serving.producer.batch.collector import BATCH_CANCELLED, BATCH_EXPIRED
from mlx_serving.producer.batch.folder import InputFile
from mlx_serving.producer.batch.index import read_places
from mlx_serving.producer.batch.lines import LineReader, custom_id_of
from mlx_serving.producer.batch.model_part import ModelPart
from mlx_serving.producer.batch.objects import LineError
from mlx_serving.producer.batch.registry import Registry, Report
from mlx_serving.producer.batch.results import Results
from mlx_serving.producer.batch.store import CANCELLED_BY_BATCH, DEADLINE
from mlx_serving.producer.batch.validation import Validation
from mlx_serving.producer.batch.window_clock import WindowClock

if TYPE_CHECKING:
    from collections.abc import Callable

    from mlx_serving.common.settings import Settings
    from mlx_serving.producer.batch.feeder import Connect
    from mlx_serving.producer.batch.folder import BatchFolder, BatchState
    from mlx_serving.producer.batch.objects import Batch

T = TypeVar("T")

SYNC_SECONDS: Final = 1.0  # between two writes to disk; results not yet written are collected again
SWEEP_SECONDS: Final = 5.0  # between two looks at every line in flight
AWAY_SECONDS: Final = 1.0  # between two tries while Redis is away
REFUSED_SECONDS: Final = 300.0  # that a Redis which has answered may refuse: a password is changed
SHORTEST_PAUSE: Final = 0.1  # between two polls; half of a window's depth lasts longer than that
LONGEST_PAUSE: Final = 0.5

_log = structlog.get_logger(__name__)


class BulkRunner:
    """Runs one batch. Only the holder of the folder's lock may.

    Args:
        folder: the batch's.
        settings: which Redis holds the report on the batch.
        connect: opens a client of the Redis that serves a model.

    """

    def __init__(self, folder: BatchFolder, settings: Settings, connect: Connect) -> None:
        self._folder, self._connect = folder, connect
        self._registry = Registry(settings)
        self._state: BatchState = folder.read()
        self._stop: Literal["", "cancelled", "expired"] = ""
        self._synced_s = self._swept_s = 0.0
        self._written = -1  # results on disk at the last write
        self._away: set[str] = set()  # models (or "registry") whose Redis did not answer last time
        self._answered_s: dict[str, float] = {}  # of the same, when it last did
        self._parts: list[ModelPart] = []
        self._clock = WindowClock()

    def run(self, progress: Callable[[int], object] | None = None) -> Batch:
        """Run to the end; `progress` is told how many lines are validated.

        Raises:
            InvalidBatch: the input file is gone, or no longer what was validated.
            QueueRefused: Redis refuses us from the start, or for five minutes in a row.

        """
        with ExitStack() as stack:
            stack.callback(self._registry.close)
            try:
                if self._batch.status == "validating":
                    self._validate(progress)
                if not self._batch.ended:
                    self._run(stack)
            except (MlxServingError, OSError) as error:  # OSError: a full disk
                with suppress(QueueFailure):
                    self._tell(str(error))
                raise
        return self._batch

    def validate(self, progress: Callable[[int], object] | None = None) -> Batch:
        """Only read and check the lines; see `run`."""
        with self._registry:
            self._validate(progress)
        return self._batch

    @property
    def _batch(self) -> Batch:
        return self._state.batch

    def _validate(self, progress: Callable[[int], object] | None) -> None:
        def on_lines(count: int) -> None:
            self._batch.request_counts.total = count
            if time.monotonic() - self._synced_s >= SYNC_SECONDS:
                self._synced_s = time.monotonic()
                self._tell()
            if progress is not None:
                progress(count)

        try:
            Validation(self._folder, self._state, on_lines).run()
        except OSError as error:
            raise InvalidBatch([("input", f"{error.filename}: {error.strerror}")]) from None
        self._folder.write(self._state)
        self._tell()

    def _run(self, stack: ExitStack) -> None:
        source = self._open_input(stack)
        results = Results(self._folder, self._batch.id)
        stack.callback(results.close)
        if results.cut_bytes:
            _log.warning("batch_torn_tail_cut", batch=self._batch.id, bytes=results.cut_bytes)
        reader = LineReader(self._batch.id, self._state.options)
        for section in self._state.sections:
            part = ModelPart(
                section, self._folder, self._state, self._connect, reader, source, results
            )
            stack.callback(part.close)
            self._parts.append(part)
        self._loop(results)
        self._wind_up(results, source)

    def _open_input(self, stack: ExitStack) -> int:
        path = Path(self._state.input.path)
        try:
            file = stack.enter_context(path.open("rb"))
            same = InputFile.of(path) == self._state.input
        except OSError as error:
            raise InvalidBatch([("input", f"{path}: {error.strerror}")]) from None
        if not same:
            raise InvalidBatch([("input", f"{path} was changed after it was submitted")])
        return file.fileno()

    # -- the loop -----------------------------------------------------------------------

    def _loop(self, results: Results) -> None:
        """Take turns until all lines have ended, or the batch was wound up."""
        pause = SHORTEST_PAUSE
        self._write_down(results)  # asks Redis for the time
        while True:
            moved = self._turn(results)
            if self._over:
                return
            pause = SHORTEST_PAUSE if moved else min(2 * pause, LONGEST_PAUSE)
            time.sleep(AWAY_SECONDS if self._away else pause)

    def _turn(self, results: Results) -> int:
        now_s = time.monotonic()
        self._check_stop()
        sweep = now_s - self._swept_s >= SWEEP_SECONDS
        moved = sum(self._turn_part(part, now_s, sweep=sweep) for part in self._parts)
        if sweep:
            self._swept_s = now_s
        if now_s - self._synced_s >= SYNC_SECONDS:
            self._write_down(results)
        return moved

    def _turn_part(self, part: ModelPart, now_s: float, *, sweep: bool) -> int:
        """Give one model its turn; if its Redis is away, the others go on."""
        if self._stop:
            reason = DEADLINE if self._stop == "expired" else CANCELLED_BY_BATCH
            return self._try(part.model, lambda: part.wind_up(now_s, reason), 0)
        return self._try(part.model, lambda: part.turn(self._seconds_left, sweep=sweep), 0)

    def _try(self, what: str, call: Callable[[], T], otherwise: T) -> T:
        """Make a call that may find Redis away; log that once, and return `otherwise`.

        So, for some minutes, of one that refuses what it did before.
        """
        try:
            answer = call()
        except QueueFailure as error:
            answered_s = self._answered_s.get(what, float("-inf"))
            if not error.retryable and time.monotonic() - answered_s > REFUSED_SECONDS:
                raise
            if what not in self._away:
                _log.warning("batch_waits_for_redis", batch=self._batch.id, error=str(error))
            self._away.add(what)
            return otherwise
        self._away.discard(what)
        self._answered_s[what] = time.monotonic()
        return answer

    @property
    def _seconds_left(self) -> float:
        """Of the completion window; 0 while the time is not known."""
        now_s = self._clock.now_s(time.monotonic())
        return 0.0 if now_s is None else (self._batch.expires_at or 0) - now_s

    @property
    def _over(self) -> bool:
        return all(part.wound_up if self._stop else part.over for part in self._parts)

    def _check_stop(self) -> None:
        if self._stop:
            return
        if self._batch.status == "cancelling":
            self._stop = "cancelled"
        elif self._clock.sure and self._seconds_left <= 0:
            self._stop = "expired"

    def _write_down(self, results: Results) -> None:
        """Write results to disk first, then the counts; only then delete their jobs from Redis."""
        self._synced_s = time.monotonic()
        if results.count != self._written:
            results.sync()
            self._written = results.count
            self._count(results)
            self._folder.write(self._state)
        if self._tell() and self._batch.status == "in_progress":
            self._batch.move("cancelling", time.time())
            self._folder.write(self._state)
        for part in self._parts:
            self._try(part.model, part.forget, None)

    def _count(self, results: Results) -> None:
        self._batch.request_counts.completed = results.completed
        self._batch.request_counts.failed = results.failed
        self._batch.usage = results.usage
        self._batch.output_file_id = str(self._folder.output) if results.completed else None
        self._batch.error_file_id = str(self._folder.errors) if results.failed else None

    def _tell(self, problem: str = "") -> bool:
        """Report progress to Redis; return whether somebody asked to cancel the batch."""
        report = Report(
            batch=self._batch,
            folder=str(self._folder.path),
            in_flight=sum(len(part.window) for part in self._parts),
            waiting=sum(part.window.waiting for part in self._parts),
            problem=problem,
        )
        cancelled = self._try("registry", lambda: self._registry.tell(report), otherwise=False)
        if "registry" not in self._away:
            self._clock.look(report.at_ms / 1000, time.monotonic())
        return cancelled

    # -- the end ------------------------------------------------------------------------

    def _wind_up(self, results: Results, source: int) -> None:
        if self._batch.status != "cancelling":
            self._batch.move("finalizing", time.time())
        if self._stop:
            why = BATCH_EXPIRED if self._stop == "expired" else BATCH_CANCELLED
            self._end_open_lines(results, source, why)
        self._write_down(results)  # if Redis is away now, jobs left in it expire by themselves
        self._batch.move(self._stop or "completed", time.time())
        self._folder.write(self._state)
        self._tell()

    def _end_open_lines(self, results: Results, source: int, why: LineError) -> None:
        for section in self._state.sections:
            for place in read_places(self._folder.index, section.first, section.count):
                if place.line not in results.done:
                    raw = os.pread(source, place.length, place.offset)
                    error = LineError(code=why.code, message=why.message, line=place.line)
                    results.failed_line(place.line, custom_id_of(raw, place.line), error)
