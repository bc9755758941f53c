"""What the engine child tells its parent about itself, and what the parent makes of it.

The child sends a snapshot about twice a second, through a pipe. The parent keeps the last one. Each
child counts from zero; the parent adds up the counts of all children.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

import msgspec

from mlx_serving.worker.status.counters import BUCKETS, Counts, Histograms

if TYPE_CHECKING:
    from collections.abc import Callable

ChildState = Literal["starting", "up", "restarting", "recycling", "gone"]

RECYCLED: Final = "recycled"  # how a child ended that is replaced by plan


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """A child's state now, and its counts since it began. Ages and times are in seconds."""

    phase: Literal["loading", "serving", "draining"] = "loading"
    pid: int = 0
    engine_age: float = 0.0  # since the engine loop came round
    stall_seconds: float = 0.0  # the most that `engine_age` may be now
    engine_dead: bool = False
    publisher_dead: bool = False
    main_age: float = 0.0  # since the main loop came round
    redis_age: float = 0.0  # since Redis answered
    redis_failing: float = 0.0  # how long calls have failed; 0: the last one did not
    redis_evicts: bool = False  # whether Redis deletes keys when it is full
    lease_age: float = 0.0  # since Redis last granted or renewed a lease
    paused: tuple[str, ...] = ()  # why the worker may not claim, see `conditions`
    held: int = 0  # jobs of which it holds the lease
    running: int = 0  # rows in the decode batch
    waiting: int = 0  # rows claimed that are not in it yet
    parked: int = 0  # rows that left it in favour of others
    kv_used: int = 0  # KV tokens that admitted rows reserve
    kv_capacity: int = 0  # KV tokens that rows may reserve
    resident: tuple[str, ...] = ()  # models in memory, as the next three in `ModelsStatus`
    loading: str = ""
    capacities: dict[str, int] = msgspec.field(default_factory=dict)
    failures: dict[str, str] = msgspec.field(default_factory=dict)
    backlog: int = 0  # decoded tokens that no flush has taken
    memory_active: int = 0  # bytes in arrays
    memory_cached: int = 0  # bytes in freed buffers that MLX keeps
    memory_limit: int = 0  # bytes that may be active now
    memory_short: bool = False  # whether no request is admitted for lack of memory
    recycling: str = ""  # why this child is about to be replaced
    info: dict[str, str] = msgspec.field(default_factory=dict)  # what the engine runs on
    queues: dict[str, tuple[int, float]] = msgspec.field(default_factory=dict)  # see `Counters`
    counts: Counts = msgspec.field(default_factory=dict)
    histograms: Histograms = msgspec.field(default_factory=dict)


encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(Snapshot).decode


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """All that the parent knows at one moment. `silent_for`: seconds since the last snapshot."""

    child: ChildState
    snapshot: Snapshot
    silent_for: float
    restarts: int
    exits: dict[str, int]  # how children ended → how often
    verdicts: dict[str, int]  # what crashes meant for jobs → how often
    counts: Counts
    histograms: Histograms


class Totals:
    """Sums of the counts of several children."""

    def __init__(self) -> None:
        self._counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._histograms: dict[str, tuple[list[int], float]] = {
            name: ([0] * (len(bounds) + 1), 0.0) for name, bounds in BUCKETS.items()
        }

    def add(self, counts: Counts, histograms: Histograms) -> None:
        """Add what one child counted in its life."""
        for name, by_label in counts.items():
            for label, count in by_label.items():
                self._counts[name][label] += count  # type: ignore[assignment]
        for name, (buckets, total) in histograms.items():
            mine, sum_of_mine = self._histograms[name]
            self._histograms[name] = (
                [a + b for a, b in zip(mine, buckets, strict=True)],
                sum_of_mine + total,
            )

    def read(self) -> tuple[Counts, Histograms]:
        """Copy of the sums."""
        return {name: dict(c) for name, c in self._counts.items()}, dict(self._histograms)


class StatusTracker:
    """Keeps what the parent knows of its children. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._ended = Totals()
        self._child: ChildState = "starting"
        self._snapshot = Snapshot()
        self._heard_at = clock()
        self._exits: Counter[str] = Counter()
        self._verdicts: Counter[str] = Counter()
        self._started = 0
        self._planned = False  # whether the last child ended to be replaced

    def begin(self) -> None:
        """Note that a new child starts."""
        with self._lock:
            self._started += 1
            again: ChildState = "recycling" if self._planned else "restarting"
            self._child = "starting" if self._started == 1 else again
            self._snapshot = Snapshot()
            self._heard_at = self._clock()

    def receive(self, snapshot: Snapshot) -> None:
        """Take a child's snapshot."""
        with self._lock:
            self._snapshot, self._heard_at = snapshot, self._clock()
            if snapshot.phase != "loading":
                self._child = "up"

    def end(self, cause: str, *, restarts: bool) -> None:
        """Note that the child is gone, how it ended, and whether another one will start."""
        with self._lock:
            self._ended.add(self._snapshot.counts, self._snapshot.histograms)
            # Its state ended with it; the queues and what it ran on are still as it said.
            self._snapshot = Snapshot(info=self._snapshot.info, queues=self._snapshot.queues)
            self._exits[cause] += 1
            self._planned = cause == RECYCLED
            again: ChildState = "recycling" if self._planned else "restarting"
            self._child = again if restarts else "gone"

    def add_verdicts(self, outcomes: dict[str, int]) -> None:
        """Add what a crash meant for jobs: outcome → how many jobs."""
        with self._lock:
            self._verdicts.update(outcomes)

    def excuse(self) -> None:
        """Forget how long the child was silent, because this process slept too."""
        with self._lock:
            self._heard_at = self._clock()

    def status(self) -> WorkerStatus:
        """What is known now."""
        with self._lock:
            totals = Totals()
            totals.add(*self._ended.read())
            totals.add(self._snapshot.counts, self._snapshot.histograms)
            return WorkerStatus(
                self._child, self._snapshot, self._clock() - self._heard_at,
                max(0, self._started - 1), dict(self._exits), dict(self._verdicts),
                *totals.read(),
            )  # fmt: skip
