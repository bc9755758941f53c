"""The parent process: starts the engine child, judges how it died, restarts it, passes signals on.

It never imports MLX, so that a crash there can't reach it. It never forks: Metal is not fork-safe.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import structlog

from mlx_serving.common.interpreter import spawn_context
from mlx_serving.worker.process.child import ChildSpec, run_child
from mlx_serving.worker.process.crash import (
    EXIT_CONFIGURATION,
    Cause,
    classify,
    judge,
    loaded_at_death,
)
from mlx_serving.worker.process.inflight_file import InflightFile
from mlx_serving.worker.process.memory_pressure import default_probe
from mlx_serving.worker.process.verdicts import VerdictWriter
from mlx_serving.worker.status.monitor import Monitor

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.context import SpawnProcess
    from types import FrameType

    from mlx_serving.common.settings import Settings
    from mlx_serving.worker.models.loading import EngineSpec
    from mlx_serving.worker.process.memory_pressure import MemoryProbe

log = structlog.get_logger(__name__)

VERDICT_SECONDS: Final = 2.0  # that a parent, when it ends, waits for Redis to take verdicts
SLOTS_A_ROW: Final = 4  # of the in-flight file: rows, and jobs that ended but are not settled


def default_name() -> str:
    """A worker name that no other process has: host, process, four random hex digits."""
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"


@dataclass(slots=True)
class BackOff:
    """Seconds until the next start: doubled from death to death, until a child lived `healthy`.

    A death with jobs in hand does not count. If it charged them, the next batch is smaller or a
    job is dead, so such deaths come to an end by themselves; and a kill from outside may come at
    any time. Stalls count, because they charge nobody, and so do deaths while loading or idle: a
    restart may repeat them.
    """

    first: float = 0.5
    most: float = 30.0
    healthy: float = 60.0
    deaths: int = 0

    def after(self, lived: float, *, held_jobs: bool) -> float:
        """Return the pause after a child that lived so many seconds."""
        self.deaths = 1 if held_jobs or lived >= self.healthy else self.deaths + 1
        return float(min(self.most, self.first * 2 ** min(self.deaths - 1, 16)))


@dataclass(slots=True)
class EngineChild:
    """One run of the engine child."""

    process: SpawnProcess
    lifeline: Connection  # to the child; the child sees when it ends, which is when we do
    inflight: InflightFile
    started_at: float

    def close(self) -> None:
        """Free what the dead child's run took."""
        self.lifeline.close()
        self.inflight.close()
        self.process.close()


class Supervisor:
    """One worker's parent. Only the main thread calls `run`."""

    def __init__(
        self,
        settings: Settings,
        model: str,
        engine: EngineSpec,
        name: str,
        *,
        probe: MemoryProbe | None = None,
        back_off: BackOff | None = None,
    ) -> None:
        """Start nothing yet."""
        self._spec = ChildSpec(settings, model, name, engine)
        self._monitor = Monitor(settings, ",".join(engine.paths(model)), name)
        self._verdicts = VerdictWriter(settings, model, name, self._monitor.tracker.add_verdicts)
        self._probe = probe or default_probe()
        self._back_off = back_off or BackOff()
        self._context = spawn_context()
        self._child: EngineChild | None = None
        self._avoid: dict[str, None] = {}  # models over which a child died while it loaded them
        self._signals = 0
        self._telling = threading.Lock()
        self._stopped = threading.Event()
        self._woken, self._wake = os.pipe()
        self.restarts = 0

    def run(self) -> int:
        """Keep a child running until it drained; returns the exit status (128 + n for signal n)."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        threading.Thread(target=self._pass_on, name="signals", daemon=True).start()
        try:
            return self._run()
        finally:
            self._verdicts.finish(VERDICT_SECONDS)
            self._monitor.stop()

    def _run(self) -> int:
        while not self._signals:
            child = self._start()
            silenced = self._monitor.watch(child.process)
            code, lived = child.process.exitcode or 0, time.monotonic() - child.started_at
            cause = classify(code, memory_pressure=self._probe.pressed(), silenced=silenced)
            held_jobs = self._judge(child, cause)
            self._child = None
            child.close()
            over = cause in {Cause.DRAINED, Cause.CONFIGURATION} or self._signals > 0
            self._monitor.child_ended(cause.value, restarts=not over)
            if cause is Cause.CONFIGURATION and not self._signals:
                return EXIT_CONFIGURATION
            if over:
                return _exit_status(code, cause)
            self.restarts += 1
            if cause is Cause.RECYCLED:
                log.info("child_recycled", lived_seconds=round(lived, 1), restarts=self.restarts)
                continue
            held_jobs = held_jobs and cause is not Cause.STALLED
            pause = self._back_off.after(lived, held_jobs=held_jobs)
            log.error(
                "child_died", cause=cause.value, exit_code=code, lived_seconds=round(lived, 1),
                restarts=self.restarts, pause_seconds=pause,
            )  # fmt: skip
            self._stopped.wait(pause)
        return 0

    def _start(self) -> EngineChild:
        inflight = InflightFile(SLOTS_A_ROW * self._spec.settings.batch.max_rows)
        theirs, ours = self._context.Pipe(duplex=False)
        spec = ChildSpec(
            self._spec.settings, self._spec.model, self._spec.name, self._spec.engine,
            inflight.path, self._monitor.pipe(self._context), tuple(self._avoid),
        )  # fmt: skip
        process = self._context.Process(
            target=run_child, args=(spec, theirs), name="mlx-serving-engine"
        )
        self._probe.start()
        self._child = EngineChild(process, ours, inflight, time.monotonic())
        if self._signals:  # one came while there was no child to tell
            self._tell()
        process.start()
        theirs.close()
        self._monitor.child_started()
        return self._child

    def _judge(self, child: EngineChild, cause: Cause) -> bool:
        """Hand back the jobs that the child held; True if there are any."""
        rows = child.inflight.read()
        if cause.faults_load:
            self._avoid |= dict.fromkeys(loaded_at_death(rows))
        blamed = judge(rows, cause)
        self._verdicts.write(blamed)
        return bool(blamed)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        """Leave it to a thread: a handler may interrupt the log or whoever holds a lock."""
        os.write(self._wake, bytes([number]))

    def _pass_on(self) -> None:
        while True:
            for number in os.read(self._woken, 16):
                log.info("signal", name=signal.Signals(number).name)
                self._signals += 1
                self._stopped.set()
                self._tell()

    def _tell(self) -> None:
        """Tell the child through the pipe to drain, or to hand over after a second signal.

        Not by a signal: one that was sent to the whole process group must not count twice, and the
        child may not have its handlers yet.
        """
        with self._telling:
            if self._child is not None:
                with suppress(OSError):  # the child has just ended
                    self._child.lifeline.send("drain" if self._signals == 1 else "hand_over")


def _exit_status(code: int, cause: Cause) -> int:
    """The worker's exit status, by how its last child ended."""
    if cause is Cause.RECYCLED:  # told to end while it was about to be replaced: it drained
        return 0
    return code if code >= 0 else 128 - code


def run_worker(settings: Settings, model: str, engine: EngineSpec, name: str | None = None) -> int:
    """Run one worker until it is drained; returns the exit status (128 + n for signal n)."""
    return Supervisor(settings, model, engine, name or default_name()).run()
