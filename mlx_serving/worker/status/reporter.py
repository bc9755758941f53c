"""The child's side of health and metrics: looks at the worker's parts, tells the parent."""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

from mlx_serving.worker.models.loaded_models import Standing
from mlx_serving.worker.models.memory_keeper import MemoryState
from mlx_serving.worker.status.status import Snapshot, encode

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from multiprocessing.connection import Connection

    from mlx_serving.worker.status.counters import Measures

REPORT_SECONDS: Final = 0.5
LAST_WORD_SECONDS: Final = 1.0


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
        """The most that it may be now."""

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


class Vitals:
    """Takes snapshots of one child; nothing it does waits for the engine or for Redis."""

    def __init__(
        self,
        measures: Measures,
        runner: RunnerView,
        publisher: PublisherView,
        *,
        draining: Callable[[], bool],
        info: Callable[[], dict[str, str]],
        paused: Callable[[], tuple[str, ...]] = tuple,
        keeper: KeeperView | None = None,
    ) -> None:
        self._measures, self._runner, self._publisher = measures, runner, publisher
        self._draining, self._info, self._paused = draining, info, paused
        self._keeper = keeper
        self.standing: Callable[[], Standing] = Standing  # of the models
        self.facts: dict[str, str] = {}  # of the engine, once it is loaded
        self._failing_since: float | None = None
        self._stopping = False

    def stop(self) -> None:
        """From now on threads end because they should."""
        self._stopping = True

    def snapshot(self) -> Snapshot:
        """Look at everything once."""
        now = time.monotonic()
        measures, runner, publisher = self._measures, self._runner, self._publisher
        counts, histograms = measures.read()
        engine = runner.engine if runner.ready.is_set() else None
        models = self.standing()
        started = publisher.ident is not None
        memory = self._keeper.state if self._keeper else MemoryState()
        return Snapshot(
            phase=self._phase(),
            pid=os.getpid(),
            stall_seconds=runner.stall_seconds,  # before the age, see `EngineThread.time_left`
            engine_age=runner.stalled_for,
            engine_dead=runner.failure is not None,
            publisher_dead=started and not publisher.is_alive() and not self._stopping,
            main_age=now - measures.turned_at if started else 0.0,
            redis_age=now - measures.redis_answered_at if started else 0.0,
            redis_failing=self._failing(now),
            lease_age=now - measures.leased_at,
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
            recycling=self._keeper.due if self._keeper and self._draining() else "",
            info=self._info() | self.facts,
            queues=measures.queues,
            counts=counts,
            histograms=histograms,
        )

    def _phase(self) -> Literal["loading", "serving", "draining"]:
        if self._draining():
            return "draining"
        return "loading" if self._publisher.ident is None else "serving"

    def _failing(self, now: float) -> float:
        """How long calls have failed, as far as looking twice a second can tell."""
        if not (self._publisher.failing or self._measures.redis_failed):
            self._failing_since = None
            return 0.0
        self._failing_since = self._failing_since or now
        return now - self._failing_since


class Reporter(threading.Thread):
    """Sends snapshots to the parent. It alone waits where the parent does not read."""

    def __init__(self, vitals: Vitals, connection: Connection | None) -> None:
        super().__init__(name="reporter", daemon=True)
        self._vitals, self._connection = vitals, connection
        self._stopping = threading.Event()

    def run(self) -> None:
        """Report until stopped, once more then, or until the parent is gone."""
        if self._connection is None:
            return
        with self._connection as connection, suppress(OSError):
            while not self._stopping.is_set():
                connection.send_bytes(encode(self._vitals.snapshot()))
                self._stopping.wait(REPORT_SECONDS)
            connection.send_bytes(encode(self._vitals.snapshot()))

    def stop(self) -> None:
        """Send the last word, if that is possible at once."""
        self._stopping.set()
        self.join(LAST_WORD_SECONDS)
