"""Processes forked from one that has imported what they need, so that a start costs no imports.

The fork server is multiprocessing's own: a fresh interpreter with one thread, which imports no MLX.
A worker whose model is real is spawned, as in production, and never comes from here.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from multiprocessing import forkserver, get_context
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.paths import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from multiprocessing.context import ForkServerContext

IMPORTED = ("mlx_serving.worker.process.supervisor", "mlx_serving.worker.engine.simulated")
LOG_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_APPEND


class ForkedProcess:
    """Runs `target(*arguments)`; the methods are those of `subprocess.Popen`.

    It leads a process group of its own, and writes its output to the end of `log`.
    """

    def __init__(
        self, target: Callable[..., int], arguments: tuple[object, ...], log: Path
    ) -> None:
        context = get_context("forkserver")
        context.set_forkserver_preload([*IMPORTED, target.__module__])
        self._process = context.Process(
            target=_run, args=(target, arguments, str(log), dict(os.environ))
        )
        # The first start starts the server, which stands where it was started and imports from this
        # path: a test may stand in a hostile folder, with it on its path.
        path, sys.path[:] = sys.path[:], [p for p in sys.path if p and Path(p).exists()]
        try:
            with contextlib.chdir(ROOT):
                self._process.start()
        finally:
            sys.path[:] = path
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """The exit status, or None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; raises `subprocess.TimeoutExpired`."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired("a forked process", timeout)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Signal it, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL it, if it still runs."""
        self.send_signal(signal.SIGKILL)


def _run(
    target: Callable[..., int], arguments: tuple[object, ...], log: str, environ: Mapping[str, str]
) -> None:
    os.setpgid(0, 0)
    os.chdir(ROOT)  # the fork server stands where the first test started it
    os.environ.clear()
    os.environ.update(environ)
    write_to(log)
    raise SystemExit(target(*arguments))


def write_to(log: str) -> None:
    """Let this process write its output to the end of a file: it began with the fork server's."""
    file = os.open(log, LOG_FLAGS, 0o600)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    os.close(file)


def context_of_children() -> ForkServerContext:
    """Multiprocessing's context for children of a forked process: from the same fork server.

    Without that, multiprocessing would start another server for each of these processes.
    """
    vars(forkserver._forkserver)["ensure_running"] = lambda: None
    return get_context("forkserver")
