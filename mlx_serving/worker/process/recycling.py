"""When the engine child is replaced by plan, before what it leaks can kill it. Pure.

A process that serves for weeks collects memory that was not freed. On Metal that ends it: a process
may hold some 499,000 buffers of any size, and MLX does not say how many there are. So a child is
replaced after so many steps, tokens or hours, and when its memory stays high.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, Self
from zlib import crc32

if TYPE_CHECKING:
    from collections.abc import Callable

    from mlx_serving.common.settings import Settings

Reason = Literal["tokens", "steps", "hours", "memory"]
REASONS: Final[tuple[Reason, ...]] = ("tokens", "steps", "hours", "memory")
SPREAD: Final = 0.1  # of a rule, so that workers that started together are replaced apart
RECYCLE_AFTER_STEPS: Final = 400_000  # a leak of one buffer a step is survived
WINDOW_LOOKS: Final = 120  # a minute at two looks a second
LEAST_GROWTH_BYTES: Final = 512 << 20
GROWTH_FRACTION: Final = 0.05  # of the device's memory


@dataclass(frozen=True, slots=True)
class RecycleRules:
    """After how much a child is replaced; 0: never for this reason."""

    tokens: int = 0
    steps: int = 0
    hours: float = 0.0

    @classmethod
    def of(cls, settings: Settings, worker: str) -> Self:
        """Read them from the settings; each is up to a tenth less, by the worker's name."""
        share = 1 - SPREAD * (crc32(worker.encode()) % 1000) / 1000
        return cls(
            round(settings.engine.recycle_after_tokens * share),
            round(RECYCLE_AFTER_STEPS * share),
            settings.engine.recycle_after_hours * share,
        )


class MemoryFloor:
    """The least memory that a child used in the last minute, without its KV caches.

    What a step or a prompt takes is freed again and does not raise the floor; a leak does. The
    floor of the first whole minute is the base that later ones are compared with.
    """

    def __init__(self) -> None:
        self._seen: deque[int] = deque(maxlen=WINDOW_LOOKS)
        self._base: int | None = None

    def see(self, used_bytes: int) -> None:
        """Add one reading."""
        self._seen.append(used_bytes)
        if self._base is None and len(self._seen) == WINDOW_LOOKS:
            self._base = min(self._seen)

    def begin_again(self) -> None:
        """Forget all readings, because what the child holds changed on purpose."""
        self._seen.clear()
        self._base = None

    def grown(self, limit_bytes: int) -> bool:
        """Whether the floor rose by more than that of a sound process would."""
        if self._base is None:
            return False
        allowed = max(LEAST_GROWTH_BYTES, int(GROWTH_FRACTION * limit_bytes))
        return min(self._seen) - self._base > allowed


class Recycling:
    """Whether one child is old enough to be replaced."""

    def __init__(self, rules: RecycleRules, clock: Callable[[], float] = time.monotonic) -> None:
        self.rules = rules
        self._clock = clock
        self._born = clock()

    def due(self, *, tokens: float, steps: int, memory_grown: bool) -> Reason | None:
        """Return why the child is to be replaced now; None: it may go on."""
        rules = self.rules
        if memory_grown:
            return "memory"
        if rules.tokens and tokens >= rules.tokens:
            return "tokens"
        if rules.steps and steps >= rules.steps:
            return "steps"
        if rules.hours and self._clock() - self._born >= rules.hours * 3600:
            return "hours"
        return None
