"""The demo's worker: a process of its own, which ends with the demo."""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final, NoReturn

import redis

from mlx_serving.cli.overview import read_worker
from mlx_serving.common.errors import EngineError
from mlx_serving.common.interpreter import spawn_context
from mlx_serving.common.redis.connection import connect, resolve
from mlx_serving.worker.process.supervisor import run_worker

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import FrameType

    from mlx_serving.common.settings import Settings
    from mlx_serving.common.worker_record import WorkerRecord
    from mlx_serving.worker.models.loading import EngineSpec

POLL_SECONDS: Final = 0.05
STOP_SECONDS: Final = 15.0
LOG_LINES: Final = 12
ENDING_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def orderly_signals() -> Iterator[None]:
    """Unwind the stack at the first signal to end; ignore later ones during the clean-up."""

    def unwind(number: int, _frame: FrameType | None) -> NoReturn:
        for each in ENDING_SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        sys.exit(128 + number)

    before = {each: signal.signal(each, unwind) for each in ENDING_SIGNALS}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextmanager
def _signals_held() -> Iterator[None]:
    """Defer signals to end: a process that is being started would end with a traceback.

    Blocking them would not do: a signal goes to any thread that takes it, and runs in this one.
    """
    held: list[int] = []
    before = {
        each: signal.signal(each, lambda number, _frame: held.append(number))
        for each in ENDING_SIGNALS
    }
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    if held:
        signal.raise_signal(held[0])


def _serve(settings: Settings, model: str, spec: EngineSpec, name: str, log: Path) -> NoReturn:
    """Run a worker whose output, and its child's, goes to a file."""
    with log.open("ab", buffering=0) as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.exit(run_worker(settings, model, spec, name))


class DemoWorker:
    """One worker in a spawned process.

    `stop` may be called at any time, before and during `start` too: a signal can unwind the
    stack anywhere.
    """

    def __init__(self, settings: Settings, model: str, spec: EngineSpec, log: Path) -> None:
        self.name = f"demo-{os.getpid()}"
        self._endpoint = resolve(settings, model)
        self._log = log
        self._child_pid: int | None = None
        self._process = spawn_context().Process(
            target=_serve, args=(settings, model, spec, self.name, log), name="mlx-serving-worker"
        )

    def start(self) -> None:
        """Spawn it."""
        # A Ctrl-C goes to every process of the terminal: the worker inherits it blocked, and
        # ends when we say so.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            with _signals_held():
                self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    def stop(self) -> None:
        """Drain it, or kill it if that takes too long; idempotent."""
        if self._process.pid is None:
            return
        self._process.terminate()
        self._process.join(STOP_SECONDS)
        if self._process.is_alive():  # hung: don't wait for a hand-over
            self._process.kill()
            self._process.join()
            if self._child_pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(self._child_pid, signal.SIGKILL)

    def wait_until_ready(self, seconds: float) -> WorkerRecord:
        """Wait until the engine is loaded and the worker has registered.

        Raises:
            EngineError: it ended, or it is not up in time; `log` says more.

        """
        deadline = time.monotonic() + seconds
        with connect(self._endpoint) as client:
            while time.monotonic() < deadline:
                view = self._look(client)
                if view is not None:
                    self._child_pid = view.pid
                    return view
                if not self._process.is_alive():
                    status = self._process.exitcode
                    raise EngineError(f"the worker ended with status {status}")
                time.sleep(POLL_SECONDS)
        raise EngineError(f"the worker did not come up within {seconds:.0f} s")

    def log(self) -> str:
        """Last lines of its log."""
        if not self._log.exists():
            return ""
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-LOG_LINES:])

    def _look(self, client: redis.Redis) -> WorkerRecord | None:
        try:
            return read_worker(client, self._endpoint.keys, self.name)
        except redis.RedisError as error:
            raise EngineError(f"the demo's Redis does not answer: {error}") from None
