"""Makes the worker's record: what it says of itself in Redis."""

from __future__ import annotations

import os
import time
from collections import deque
from typing import TYPE_CHECKING, Final

from mlx_serving import __version__
from mlx_serving.common.attempts import LIFE
from mlx_serving.common.queues import PROTOCOL
from mlx_serving.common.worker_record import WorkerRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mlx_serving.worker.status.status import Snapshot

TOKENS: Final = "generation_tokens"  # of `Counters`
RATE_SECONDS: Final = 10.0  # over which tokens/s are counted


def memory_bytes() -> int:
    """This machine's memory; 0 if the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 0


class Presence:
    """Makes the record from snapshots of the worker; only the main thread calls it.

    `models` are the aliases of all models that the worker serves, `batch_rows` the most rows that
    its batch takes.
    """

    def __init__(
        self,
        name: str,
        models: Sequence[str],
        batch_rows: int,
        snapshot: Callable[[], Snapshot],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self._model, self._batch_rows = ",".join(models), batch_rows
        self._memory_bytes = memory_bytes()
        self._snapshot, self._clock = snapshot, clock
        self._decoded: deque[tuple[float, float]] = deque()  # at, tokens since the start

    def record(self, *, suspended: bool = False) -> WorkerRecord:
        """The worker as it is now. `suspended`: it may not claim."""
        now = self._snapshot()
        return WorkerRecord(
            name=self.name,
            model=self._model,
            revision=now.info.get("revision", ""),
            device=now.info.get("device", ""),
            acceleration=now.info.get("acceleration", ""),
            memory_bytes=self._memory_bytes,
            batch_rows=self._batch_rows,
            protocol=PROTOCOL,
            version=__version__,
            pid=now.pid,
            life=LIFE,
            state=_state(now, suspended=suspended),
            reasons=_reasons(now),
            held=now.held,
            rows=now.running,
            waiting=now.waiting,
            parked=now.parked,
            kv_tokens_used=now.kv_used,
            kv_tokens_capacity=now.kv_capacity,
            tokens_per_second=self._rate(sum(now.counts.get(TOKENS, {}).values())),
            lease_age_ms=round(now.lease_age * 1000) if now.held else None,
            lease_failing=now.redis_failing > 0,
            memory_active_bytes=now.memory_active,
            memory_limit_bytes=now.memory_limit,
            resident=now.resident,
            loading=now.loading,
            unloadable=tuple(f"{model}: {reason}" for model, reason in now.failures.items()),
            capacities=now.capacities,
        )

    def _rate(self, tokens: float) -> float:
        """Tokens a second since the last call that is `RATE_SECONDS` ago, or since the first."""
        now = self._clock()
        self._decoded.append((now, tokens))
        while len(self._decoded) > 1 and now - self._decoded[1][0] >= RATE_SECONDS:
            self._decoded.popleft()
        at, before = self._decoded[0]
        return (tokens - before) / (now - at) if now > at else 0.0


def _state(now: Snapshot, *, suspended: bool) -> str:
    if now.phase != "serving":
        return now.phase
    return "paused" if now.paused else "suspended" if suspended else "serving"


def _reasons(now: Snapshot) -> tuple[str, ...]:
    short = ("memory_short",) if now.memory_short else ()
    return (*now.paused, *short, *(("recycling",) if now.recycling else ()))
