"""Watches the engine's memory and the child's age, in the engine thread, twice a second.

It reads the device's memory, asks the guard what to do, and does it. It tells the worker's main
loop when the child is to be replaced.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import structlog

from mlx_serving.worker.engine.memory.guard import KvUse, MemoryGuard, Relief
from mlx_serving.worker.process.recycling import MemoryFloor, Recycling

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mlx_serving.worker.engine.memory.device import DeviceMemory
    from mlx_serving.worker.engine.memory.kv_caches import KvMemory
    from mlx_serving.worker.status.counters import Counters

log = structlog.get_logger(__name__)

LOOK_SECONDS: Final = 0.5
TOKENS: Final = "generation_tokens"  # of `Counters`


@dataclass(frozen=True, slots=True)
class MemoryState:
    """The worker's memory as its status says it, in bytes."""

    active: int = 0
    cached: int = 0
    limit: int = 0  # the most that may be active now
    relief: Relief = Relief.NONE

    @property
    def refuses(self) -> bool:
        """Whether no request is admitted for lack of memory."""
        return self.relief is Relief.REFUSE


class MemoryKeeper:
    """Only the engine thread calls it; any thread may read `state` and `due`.

    `on_due(reason)` is called once the child is to be replaced, and again at each later look.
    """

    def __init__(
        self,
        counters: Counters,
        recycling: Recycling,
        on_due: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._counters, self._recycling, self._on_due = counters, recycling, on_due
        self._clock = clock
        self._device: DeviceMemory | None = None
        self._caches: Callable[[], Sequence[KvMemory]] = tuple
        self._seen: list[KvMemory] = []
        self._guard = MemoryGuard()
        self._floor = MemoryFloor()
        self._looked_at = float("-inf")
        self._errors = 0
        self.state = MemoryState()
        self.due = ""  # why the child is to be replaced

    def watch(
        self, device: DeviceMemory | None, caches: Callable[[], Sequence[KvMemory]] = tuple
    ) -> None:
        """Watch this device and these caches; without a device, watch the child's age alone."""
        self._device, self._caches = device, caches

    def tend(self, steps: int) -> None:
        """Look if the last look is half a second ago. `steps`: what the engine has done so far.

        It is called between steps, because it may move blocks.
        """
        now = self._clock()
        if now - self._looked_at < LOOK_SECONDS:
            return
        self._looked_at = now
        grown = self._look() if self._device is not None else False
        due = self._recycling.due(
            tokens=self._counters.total(TOKENS), steps=steps, memory_grown=grown
        )
        if due is not None:
            self.due = due
            self._on_due(due)

    def _look(self) -> bool:
        """Do as the guard says; True if memory grew that no cache accounts for."""
        assert self._device is not None  # noqa: S101 -- `tend` asks
        caches = list(self._caches())
        if caches != self._seen:  # models came or went
            self._floor.begin_again()
        self._seen = caches
        uses = [cache.use for cache in caches]
        kv_bytes = sum(use.nbytes for use in uses)
        reading = self._device.read()
        before = self._guard.relief
        judged = self._guard.judge(
            reading, KvUse(kv_bytes, starved=any(use.starved for use in uses))
        )
        for cache, use in zip(caches, uses, strict=True):
            # Each may take what it has, and all the room that no cache has taken.
            cache.allow(max(0, judged.room_bytes - kv_bytes + use.nbytes))
        self._relieve(before, judged.relief)
        self._count_errors()
        self.state = MemoryState(reading.active, reading.cached, reading.bound, judged.relief)
        self._floor.see(reading.active - kv_bytes)
        return self._floor.grown(reading.limit)

    def _count_errors(self) -> None:
        errors = sum(cache.room.errors for cache in self._seen)
        if errors > self._errors:
            log.warning("device_out_of_memory", errors=errors - self._errors)
            self._counters.count("memory_errors", by=errors - self._errors)
        self._errors = errors

    def _relieve(self, before: Relief, now: Relief) -> None:
        if now is not before:
            level = log.info if now < before else log.warning
            level("memory_relief", relief=now.name.lower(), before=before.name.lower())
            self._counters.count("memory_relief", now.name.lower())
        if now >= Relief.SHRINK > before:
            for cache in self._seen:
                cache.shrink()
        elif before >= Relief.SHRINK > now:
            for cache in self._seen:
                cache.restore()
        if now is not Relief.NONE:
            assert self._device is not None  # noqa: S101 -- `tend` asks
            self._device.trim()
