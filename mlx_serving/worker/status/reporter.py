"""The child's side of health and metrics: sends snapshots of the worker to the parent."""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

from mlx_serving.worker.status.status import Snapshot, encode

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from multiprocessing.connection import Connection

    from mlx_serving.worker.models.loaded_models import ModelsStatus
    from mlx_serving.worker.models.memory_keeper import MemoryState
    from mlx_serving.worker.status.counters import Counters

REPORT_SECONDS: Final = 0.5
LAST_SNAPSHOT_SECONDS: Final = 1.0  # that sending the last one may take


class RunnerView(Protocol):
    """What is read of `EngineThread`."""

    engine: Any
    failure: BaseException | None
    ready: threading.Event

    @property
    def stalled_for(self) -> float:
        """Seconds since the engine loop came round."""

    @property
    def stall_seconds(self) -> float:
        """The most that `stalled_for` may be now."""

    def unadmitted(self) -> Sequence[object] | None:
        """Requests that the engine has no room for."""


class PublisherView(Protocol):
    """What is read of `Publisher`."""

    failing: bool

    @property
    def backlog(self) -> int:
        """Decoded tokens that no flush has taken."""

    @property
    def ident(self) -> int | None:
        """None before it has started."""

    def held(self) -> Sequence[object]:
        """Jobs that are held."""

    def is_alive(self) -> bool:
        """Whether the thread runs."""


class KeeperView(Protocol):
    """What is read of `MemoryKeeper`."""

    state: MemoryState
    due: str


class ModelsView(Protocol):
    """What is read of `LoadedModels`."""

    def status(self) -> ModelsStatus:
        """Which models are in memory, and which could not be loaded."""


class Snapshotter:
    """Takes snapshots of one child; it never waits for the engine or for Redis.

    `paused` says why the worker may not claim now; (): it may.
    """

    def __init__(
        self,
        counters: Counters,
        runner: RunnerView,
        publisher: PublisherView,
        keeper: KeeperView,
        models: ModelsView,
        paused: Callable[[], tuple[str, ...]] = tuple,
    ) -> None:
        self._counters, self._runner, self._publisher = counters, runner, publisher
        self._keeper, self._models, self._paused = keeper, models, paused
        self._failing_since: float | None = None
        self._stopping = False

    def stop(self) -> None:
        """From now on it is no fault that a thread has ended."""
        self._stopping = True

    def snapshot(self) -> Snapshot:
        """Look at everything once."""
        now = time.monotonic()
        counters, runner, publisher = self._counters, self._runner, self._publisher
        counts, histograms = counters.read()
        engine = runner.engine if runner.ready.is_set() else None
        models, memory = self._models.status(), self._keeper.state
        started = publisher.ident is not None
        return Snapshot(
            phase=self._phase(),
            pid=os.getpid(),
            stall_seconds=runner.stall_seconds,  # before the age, see `EngineThread.time_left`
            engine_age=runner.stalled_for,
            engine_dead=runner.failure is not None,
            publisher_dead=started and not publisher.is_alive() and not self._stopping,
            main_age=now - counters.turned_at if started else 0.0,
            redis_age=now - counters.redis_answered_at if started else 0.0,
            redis_failing=self._failing(now),
            redis_evicts=counters.redis_evicts,
            lease_age=now - counters.leased_at,
            paused=self._paused(),
            held=len(publisher.held()),
            running=engine.running if engine else 0,
            waiting=engine.waiting + len(runner.unadmitted() or ()) if engine else 0,
            parked=engine.parked if engine else 0,
            kv_used=engine.kv_tokens_used if engine else 0,
            kv_capacity=engine.kv_tokens_capacity if engine else 0,
            resident=models.resident,
            loading=models.loading,
            capacities=dict(models.capacities),
            failures=dict(models.failures),
            backlog=publisher.backlog,
            memory_active=memory.active,
            memory_cached=memory.cached,
            memory_limit=memory.limit,
            memory_short=memory.refuses,
            recycling=self._keeper.due if counters.draining else "",
            info=dict(models.info),
            queues=counters.queues,
            counts=counts,
            histograms=histograms,
        )

    def _phase(self) -> Literal["loading", "serving", "draining"]:
        if self._counters.draining:
            return "draining"
        return "loading" if self._publisher.ident is None else "serving"

    def _failing(self, now: float) -> float:
        """Seconds for which calls to Redis have failed, as far as two looks a second can tell."""
        if not (self._publisher.failing or self._counters.redis_failed):
            self._failing_since = None
            return 0.0
        self._failing_since = self._failing_since or now
        return now - self._failing_since


class Reporter(threading.Thread):
    """Sends snapshots to the parent. No other thread waits if the parent does not read them."""

    def __init__(self, snapshot: Callable[[], Snapshot], connection: Connection | None) -> None:
        super().__init__(name="reporter", daemon=True)
        self._snapshot, self._connection = snapshot, connection
        self._stopping = threading.Event()

    def run(self) -> None:
        """Send snapshots until stopped, and a last one then; end early if the parent is gone."""
        if self._connection is None:
            return
        with self._connection as connection, suppress(OSError):
            while not self._stopping.is_set():
                connection.send_bytes(encode(self._snapshot()))
                self._stopping.wait(REPORT_SECONDS)
            connection.send_bytes(encode(self._snapshot()))

    def stop(self) -> None:
        """Have the last snapshot sent, if that is possible at once."""
        self._stopping.set()
        self.join(LAST_SNAPSHOT_SECONDS)
