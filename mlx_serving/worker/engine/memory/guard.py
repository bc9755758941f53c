"""The memory guard's policy: how much KV cache there is room for now, and what to do when short.

Pure: it is told what the device and the engines hold, and answers. It is asked twice a second. When
memory is short it goes one step further at each look: freed buffers are given back, then prefixes
that no row uses, then no request is admitted until there is memory again. Rows that decode go on.
"""

from collections import deque
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

MARGIN: Final = 0.05  # of the limit: what stays free when KV caches are as full as they may be
SHORT: Final = 0.025  # of the limit: with less than that free, memory is short
SPIKE_LOOKS: Final = 120  # how long the most that steps and prompts took beside is remembered


class Relief(IntEnum):
    """How far the guard has gone; each step includes those before it."""

    NONE = 0
    TRIM = 1
    """MLX gave back the buffers that it keeps for the next use."""

    SHRINK = 2
    """Blocks of prefixes that no row uses were given up, and no new ones are kept."""

    REFUSE = 3
    """No request is admitted."""


@dataclass(frozen=True, slots=True)
class MemoryReading:
    """What a device says, in bytes.

    `active` is in arrays; `cached` are freed buffers that MLX keeps; `peak` is the most that was
    active since the last reading; `limit` is what one process may hold. `available` is what the
    system could still give anybody, where the device shares the system's memory; None: not known.
    """

    active: int
    cached: int
    peak: int
    limit: int
    available: int | None = None

    @property
    def bound(self) -> int:
        """What may be active now: the limit, or less where others took the memory."""
        if self.available is None:
            return self.limit
        return min(self.limit, self.active + self.cached + self.available)


@dataclass(frozen=True, slots=True)
class KvUse:
    """What the KV caches hold, in bytes, the prompts under way included.

    `starved`: a request found no memory while prefixes that no row uses took it.
    """

    nbytes: int = 0
    starved: bool = False


@dataclass(frozen=True, slots=True)
class Judgement:
    """`room_bytes`: what KV caches may hold in all, copies included. `relief`: see there."""

    relief: Relief
    room_bytes: int


class MemoryGuard:
    """Remembers what steps took beside the KV caches, and how far it has gone."""

    def __init__(self) -> None:
        self.relief = Relief.NONE
        self._spikes: deque[int] = deque(maxlen=SPIKE_LOOKS)
        self._active = 0

    def judge(self, reading: MemoryReading, kv: KvUse) -> Judgement:
        """Judge one look; carry out its relief where it is not `NONE`."""
        self._spikes.append(max(0, reading.peak - max(reading.active, self._active)))
        self._active = reading.active
        spike = max(self._spikes)
        spare = reading.bound - reading.active - spike
        self.relief = self._next(spare / max(1, reading.limit), starved=kv.starved)
        others = max(0, reading.active - kv.nbytes)  # weights, and whatever else is not KV
        room = reading.bound - int(MARGIN * reading.limit) - others - spike
        return Judgement(self.relief, 0 if self.relief is Relief.REFUSE else max(0, room))

    def _next(self, spare: float, *, starved: bool) -> Relief:
        if spare < SHORT:
            return Relief(min(self.relief + 1, Relief.REFUSE))
        if starved and self.relief < Relief.SHRINK:
            return Relief(self.relief + 1)
        return Relief.NONE if spare >= MARGIN and not starved else self.relief
