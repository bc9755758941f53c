"""The parent: spawns the engine child, passes signals on, ends with its status.

It never imports MLX, so that a crash there can't reach it, and never forks: Metal is not
fork-safe.
"""

from __future__ import annotations

import multiprocessing
import os
import secrets
import signal
import socket
from typing import TYPE_CHECKING

import structlog

from mlx_serving.worker.child import ChildSpec, run_child

if TYPE_CHECKING:
    from types import FrameType

    from mlx_serving.common.settings import Settings
    from mlx_serving.worker.loading import EngineSpec

log = structlog.get_logger(__name__)


def default_name() -> str:
    """A worker name that no other process has: host, process, four random hex digits."""
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}"


def run_worker(settings: Settings, model: str, engine: EngineSpec, name: str | None = None) -> int:
    """Run one worker until it is drained; returns the exit status (128 + n for signal n)."""
    context = multiprocessing.get_context("spawn")
    theirs, ours = context.Pipe(duplex=False)
    spec = ChildSpec(settings, model, name or default_name(), engine)
    process = context.Process(target=run_child, args=(spec, theirs), name="mlx-serving-engine")

    def forward(number: int, _frame: FrameType | None) -> None:
        log.info("signal", name=signal.Signals(number).name)
        if process.pid is not None and process.is_alive():
            os.kill(process.pid, signal.SIGTERM)

    process.start()
    theirs.close()
    signal.signal(signal.SIGTERM, forward)
    signal.signal(signal.SIGINT, forward)
    process.join()
    ours.close()
    code = process.exitcode or 0
    return code if code >= 0 else 128 - code
