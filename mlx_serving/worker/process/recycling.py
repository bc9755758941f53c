"""When the engine child is replaced by plan, before its age can kill it. Pure.

A process that serves for weeks collects what nobody gave back. On Metal that ends it: a process may
hold some 499,000 buffers, however small, and MLX does not say how many there are. So a child is
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
SPREAD: Final = 0.1  # of a rule: workers that started together are not replaced together
RECYCLE_AFTER_STEPS: Final = 400_000  # a leak of one buffer a step is survived
WINDOW_LOOKS: Final = 120  # a minute at two looks a second
LEAST_GROWTH_BYTES: Final = 512 << 20
GROWTH_FRACTION: Final = 0.05  # of the device's memory


@dataclass(frozen=True, slots=True)
class RecycleRules:
    """After how much a child is replaced; 0: never for that."""

    tokens: int = 0
    steps: int = 0
    hours: float = 0.0

    @classmethod
    def of(cls, settings: Settings, worker: str) -> Self:
        """Read them from the settings, up to a tenth less by the worker's name."""
        share = 1 - SPREAD * (crc32(worker.encode()) % 1000) / 1000
        return cls(
            round(settings.engine.recycle_after_tokens * share),
            round(RECYCLE_AFTER_STEPS * share),
            settings.engine.recycle_after_hours * share,
        )


class MemoryFloor:
    """The least memory that a child used in the last minute, beside its KV caches.

    What a step or a prompt takes comes and goes, so that its floor stays; what grows is not given
    back. The first whole window is the base.
    """

    def __init__(self) -> None:
        self._seen: deque[int] = deque(maxlen=WINDOW_LOOKS)
        self._base: int | None = None

    def see(self, used_bytes: int) -> None:
        """Take one look."""
        self._seen.append(used_bytes)
        if self._base is None and len(self._seen) == WINDOW_LOOKS:
            self._base = min(self._seen)

    def begin_again(self) -> None:
        """Forget all: what the child holds changed on purpose."""
        self._seen.clear()
        self._base = None

    def grown(self, limit_bytes: int) -> bool:
        """Say whether the floor rose by more than a sound process would explain."""
        if self._base is None:
            return False
        allowed = max(LEAST_GROWTH_BYTES, int(GROWTH_FRACTION * limit_bytes))
        return min(self._seen) - self._base > allowed


class Recycling:
    """One child's age."""

    def __init__(self, rules: RecycleRules, clock: Callable[[], float] = time.monotonic) -> None:
        self.rules = rules
        self._clock = clock
        self._born = clock()

    def due(self, *, tokens: float, steps: int, memory_grown: bool) -> Reason | None:
        """Say why the child is to be replaced now; None: it may go on."""
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
