"""Bulk files for programs: `client.batches`."""

from __future__ import annotations

import asyncio
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from mlx_serving.common.durable import sync_to_disk
from mlx_serving.common.errors import InvalidBatch, ResultTimeout
from mlx_serving.producer.batch.background import start_runner
from mlx_serving.producer.batch.folder import BatchFolder, BatchState, InputFile
from mlx_serving.producer.batch.naming import find_folder, find_report, folder_beside, new_id
from mlx_serving.producer.batch.objects import Batch
from mlx_serving.producer.batch.options import BatchOptions
from mlx_serving.producer.batch.registry import Registry, Report
from mlx_serving.producer.batch.result_file import whole_lines
from mlx_serving.producer.batch.runner import BulkRunner

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import BinaryIO

    from mlx_serving.common.settings import Settings
    from mlx_serving.producer.batch.feeder import Connect

POLL_SECONDS: Final = 0.2


class Batches:
    """Bulk files, each run by a process of its own; `Client.batches` gives one of these.

    A batch is named by its id, its folder, or the file that it was made of. Every call may raise
    QueueUnavailable if Redis is away, and BatchNotFound if no batch has that name.

    Args:
        settings: which Redis holds the reports on batches.
        connect: opens a client of the Redis that serves a model.

    """

    def __init__(self, settings: Settings, connect: Connect) -> None:
        self._settings, self._connect = settings, connect

    def submit(
        self,
        source: str | Path | BinaryIO,
        *,
        folder: str | Path | None = None,
        start: bool = True,
        progress: Callable[[int], object] | None = None,
        **options: Any,
    ) -> Batch:
        """Validate a file of requests and start to run it in the background.

        Args:
            source: a path, whose file may not be moved or changed until the batch has ended; or
                an open file, whose bytes are copied.
            folder: where state and results go; beside the file, or in the working directory.
            start: False leaves it to `run` or `resume`.
            progress: is called with the number of lines read so far.
            options: those of `BatchOptions`.

        Returns:
            the batch, `in_progress`, or `failed` if none of its lines can be run.

        Raises:
            InvalidBatch: an option is wrong, or the file can't be read.
            QueueUnavailable: Redis is away; nothing was written.

        """
        chosen = BatchOptions.build(**options)
        made = self._create(source, folder, chosen)
        with made.lock():
            batch = BulkRunner(made, self._settings, self._connect).validate(progress)
        return self._start(made) if start else batch

    def report(self, name: str | None = None) -> Report:
        """Read the runner's last report, from any machine; without a name, on the newest batch."""
        with Registry(self._settings) as registry:
            return find_report(name, registry)

    def reports(self) -> list[Report]:
        """Read the last report on each batch of the last 30 days."""
        with Registry(self._settings) as registry:
            return registry.reports()

    def status(self, name: str | None = None) -> Batch:
        """Read the batch object, from any machine."""
        return self.report(name).batch

    def wait(self, name: str | None = None, timeout: float | None = None) -> Batch:
        """Wait for its end, at most `timeout` seconds. Raises ResultTimeout."""
        until_s = None if timeout is None else time.monotonic() + timeout
        with Registry(self._settings) as registry:
            while not (batch := find_report(name, registry).batch).ended:
                if until_s is not None and time.monotonic() > until_s:
                    raise ResultTimeout
                time.sleep(POLL_SECONDS)
        return batch

    def cancel(self, name: str | None = None) -> Batch:
        """Ask its runner, on whichever machine, to cancel it; what has finished is kept.

        If the batch's folder is on this machine and it has no runner, one is started to end it.
        """
        with Registry(self._settings) as registry:
            report = registry.ask_to_cancel(find_report(name, registry).batch.id)
        if report.lies_here:
            self._start(BatchFolder(Path(report.folder)))
        return report.batch

    def resume(self, name: str | None = None) -> Batch:
        """Start a runner for a batch that has none; no effect if it has one.

        For a batch that has ended, Redis is told so again: its runner may not have reached Redis.
        """
        return self._start(self.folder(name))

    def run(self, name: str | None = None) -> Batch:
        """Run it in this process, to its end.

        Raises:
            InvalidBatch: another runner has it, or its input file was changed.

        """
        folder = self.folder(name)
        with folder.lock() as free:
            if not free:
                raise InvalidBatch(f"another process runs the batch in {folder.path}")
            return BulkRunner(folder, self._settings, self._connect).run()

    def results(self, name: str | None = None) -> Iterator[dict[str, Any]]:
        """Output lines so far, in the order in which they finished, as the OpenAI API has them."""
        folder = self.folder(name)
        return map(msgspec.json.decode, whole_lines(folder.output, folder.read().batch.id))

    def errors(self, name: str | None = None) -> Iterator[dict[str, Any]]:
        """Error lines so far, in the order in which they ended."""
        folder = self.folder(name)
        return map(msgspec.json.decode, whole_lines(folder.errors, folder.read().batch.id))

    def folder(self, name: str | None = None) -> BatchFolder:
        """Find its folder on this machine. Raises BatchNotFound if it is on another one."""
        with Registry(self._settings) as registry:
            return find_folder(name, registry)

    def _start(self, folder: BatchFolder) -> Batch:
        """Start a runner; it ends at once if another one holds the folder's lock."""
        batch = folder.read().batch
        if not batch.ended:
            start_runner(folder, self._settings)
            return batch
        with Registry(self._settings) as registry:
            registry.tell(Report(batch=batch, folder=str(folder.path)))
        return batch

    def _create(
        self, source: str | Path | BinaryIO, folder: str | Path | None, options: BatchOptions
    ) -> BatchFolder:
        batch_id = new_id()
        path = Path(source).absolute() if isinstance(source, str | Path) else None
        if path is not None and not path.is_file():
            raise InvalidBatch([("input", f"there is no file {path}")])
        with Registry(self._settings) as registry:
            now_s = registry.now_s()
        beside = folder_beside(path or Path("stdin.jsonl").absolute(), batch_id)
        made = BatchFolder.create(Path(folder).absolute() if folder else beside)
        if not isinstance(source, str | Path):
            with made.copied_input.open("wb") as copy:
                shutil.copyfileobj(source, copy)
                copy.flush()
                sync_to_disk(copy.fileno())
        batch = Batch(
            id=batch_id,
            input_file_id=str(path or made.copied_input),
            completion_window=options.completion_window,
            created_at=now_s,
            expires_at=now_s + options.window_seconds,
            metadata=options.metadata,
        )
        made.write(BatchState(batch=batch, options=options, input=InputFile(batch.input_file_id)))
        return made


class AsyncBatches:
    """The asyncio twin of `Batches`: each call runs in a thread, since files block."""

    def __init__(self, settings: Settings, connect: Connect) -> None:
        self._batches = Batches(settings, connect)

    async def submit(self, source: str | Path | BinaryIO, **options: Any) -> Batch:
        """See :meth:`Batches.submit`."""
        return await asyncio.to_thread(self._batches.submit, source, **options)

    async def status(self, name: str | None = None) -> Batch:
        """See :meth:`Batches.status`."""
        return await asyncio.to_thread(self._batches.status, name)

    async def wait(self, name: str | None = None, timeout: float | None = None) -> Batch:  # noqa: ASYNC109 -- as the sync twin
        """See :meth:`Batches.wait`."""
        until_s = None if timeout is None else time.monotonic() + timeout
        while not (batch := await self.status(name)).ended:
            if until_s is not None and time.monotonic() > until_s:
                raise ResultTimeout
            await asyncio.sleep(POLL_SECONDS)
        return batch

    async def cancel(self, name: str | None = None) -> Batch:
        """See :meth:`Batches.cancel`."""
        return await asyncio.to_thread(self._batches.cancel, name)

    async def resume(self, name: str | None = None) -> Batch:
        """See :meth:`Batches.resume`."""
        return await asyncio.to_thread(self._batches.resume, name)

    async def results(self, name: str | None = None) -> Iterator[dict[str, Any]]:
        """See :meth:`Batches.results`; the lines are read as they are asked for."""
        return await asyncio.to_thread(self._batches.results, name)

    async def errors(self, name: str | None = None) -> Iterator[dict[str, Any]]:
        """See :meth:`Batches.errors`."""
        return await asyncio.to_thread(self._batches.errors, name)
