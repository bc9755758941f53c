"""Ends the engine child when its engine hangs or its publisher is dead."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING, Final

import structlog

from mlx_serving.worker.process.crash import EXIT_ENGINE, EXIT_STALLED

if TYPE_CHECKING:
    from mlx_serving.worker.delivery.publisher import Publisher
    from mlx_serving.worker.engine_thread import EngineThread

log = structlog.get_logger(__name__)

WATCH_SECONDS: Final = 0.5
LAST_WRITE_SECONDS: Final = 1.0  # that a stalled worker's publisher gets for what was decoded


class Watchdog(threading.Thread):
    """A worker whose engine hangs holds leases and decodes nothing, so its process ends.

    The process is gone within the stall time: the watchdog looks often, and acts a little before.
    """

    def __init__(self, runner: EngineThread, publisher: Publisher, stall_seconds: float) -> None:
        super().__init__(name="watchdog", daemon=True)
        self._runner, self._publisher = runner, publisher
        self._pause = min(WATCH_SECONDS, 0.05 * stall_seconds)
        self._last_write = min(LAST_WRITE_SECONDS, 0.1 * stall_seconds)

    def run(self) -> None:
        """Look until the process ends."""
        runner, publisher = self._runner, self._publisher
        while True:
            before = time.monotonic()
            time.sleep(self._pause)
            if time.monotonic() - before > 2 * WATCH_SECONDS:
                continue  # the whole process slept: give the engine time to continue
            dead = publisher.ident is not None and not publisher.is_alive()
            if dead and not runner.halted.is_set():
                log.critical("publisher_dead")
                os._exit(EXIT_ENGINE)
            if runner.time_left <= self._pause + self._last_write:
                log.critical("engine_stalled", seconds=round(runner.stalled_for, 1))
                self._write_what_was_decoded()
                os._exit(EXIT_STALLED)

    def _write_what_was_decoded(self) -> None:
        """Let the publisher write, for at most the time of the last write."""
        timeout = self._last_write
        writing = threading.Thread(target=self._publisher.drain, args=(timeout,), daemon=True)
        writing.start()
        writing.join(timeout)
