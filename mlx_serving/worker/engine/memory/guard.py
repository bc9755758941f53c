"""The memory guard: how large KV caches may be, and what to do when memory is short. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

MARGIN: Final = 0.05  # of the limit: stays free when KV caches are as large as they may be
SHORT: Final = 0.025  # of the limit: if less than that is free, memory is short
SPIKE_LOOKS: Final = 120  # so many looks the largest temporary use of steps is remembered


class Relief(IntEnum):
    """What the guard has done to free memory; each level includes those before it."""

    NONE = 0
    TRIM = 1
    """MLX gave back the freed buffers that it keeps for reuse."""

    SHRINK = 2
    """Idle blocks of the prefix cache were evicted, and none are kept from now on."""

    REFUSE = 3
    """No request is admitted."""


@dataclass(frozen=True, slots=True)
class MemoryReading:
    """The memory of a device, in bytes.

    `active`: in arrays. `cached`: in freed buffers that MLX keeps. `peak`: the most that was active
    since the last reading. `limit`: the most that one process may hold. `available`: what the
    system can still give to any process, if the device shares the system's memory; else None.
    """

    active: int
    cached: int
    peak: int
    limit: int
    available: int | None = None

    @property
    def bound(self) -> int:
        """What may be active now: the limit, or less if other processes took the memory."""
        if self.available is None:
            return self.limit
        return min(self.limit, self.active + self.cached + self.available)


@dataclass(frozen=True, slots=True)
class KvUse:
    """What the KV caches hold, in bytes, those of prompts under way included.

    `starved`: a request found no memory because cached prefixes that no row uses took it.
    """

    nbytes: int = 0
    starved: bool = False


@dataclass(frozen=True, slots=True)
class Judgement:
    """What to do: carry out `relief`, and let KV caches hold `room_bytes`, copies included."""

    relief: Relief
    room_bytes: int


class MemoryGuard:
    """Judges readings; remembers the temporary memory of steps and the present relief."""

    def __init__(self) -> None:
        self.relief = Relief.NONE
        self._spikes: deque[int] = deque(maxlen=SPIKE_LOOKS)
        self._active = 0

    def judge(self, reading: MemoryReading, kv: KvUse) -> Judgement:
        """Judge one reading; the caller carries out the relief."""
        self._spikes.append(max(0, reading.peak - max(reading.active, self._active)))
        self._active = reading.active
        spike = max(self._spikes)
        spare = reading.bound - reading.active - spike
        self.relief = self._next(spare / max(1, reading.limit), starved=kv.starved)
        others = max(0, reading.active - kv.nbytes)  # weights, and all else that is not KV
        room = reading.bound - int(MARGIN * reading.limit) - others - spike
        return Judgement(self.relief, 0 if self.relief is Relief.REFUSE else max(0, room))

    def _next(self, spare: float, *, starved: bool) -> Relief:
        if spare < SHORT:
            return Relief(min(self.relief + 1, Relief.REFUSE))
        if starved and self.relief < Relief.SHRINK:
            return Relief(self.relief + 1)
        return Relief.NONE if spare >= MARGIN and not starved else self.relief


RELAX_LOOKS: Final = 20  # after so many looks without an out-of-memory error, the cap doubles


class MemoryRoom:
    """Tells whether there is memory for a request beside the admitted ones.

    A prompt is computed into a cache of its own (cached blocks are copied there first) and then
    copied into the batch's cache: during that copy it is there twice. So a request needs memory for
    its keys and values, and for those of its prompt once more.
    """

    def __init__(self, *, block_tokens: int = 0, overhead_tokens: int = 0) -> None:
        """Start without a bound. For the arguments see `limits.SchedulerLimits`."""
        self._block_tokens, self._overhead = block_tokens, overhead_tokens
        self._room: int | None = None
        self._cap: int | None = None  # after an out-of-memory error
        self._quiet_looks = 0
        self.starved = False
        self.errors = 0  # out-of-memory errors so far

    @property
    def tokens(self) -> int | None:
        """KV tokens that there is memory for, copies included; None: not known yet."""
        bounds = [bound for bound in (self._room, self._cap) if bound is not None]
        return min(bounds, default=None)

    def look(self, tokens: int) -> None:
        """Take the guard's bound; after some time without errors, double the cap."""
        self._room, self.starved = tokens, False
        self._quiet_looks += 1
        if self._cap is not None and self._quiet_looks >= RELAX_LOOKS:
            self._quiet_looks, self._cap = 0, 2 * self._cap
            if self._cap > tokens:
                self._cap = None

    def strike(self, used_tokens: int) -> None:
        """Note that the device ran out of memory with so many KV tokens reserved."""
        self.errors += 1
        self._cap, self._quiet_looks = used_tokens // 2, 0

    def forgive(self) -> None:
        """Lift the cap: the row that caused the errors has ended."""
        self._cap = None

    def admits(
        self, kv_tokens: Sequence[int], copied_tokens: int, *, used: int, rows: int, kept: int
    ) -> bool:
        """Say whether there is memory for a request; note if only idle prefixes are in the way.

        If the caches are empty, the scheduler's budget alone decides, unless there is no memory
        at all: else a job that fits would wait forever.

        Args:
            kv_tokens: the most KV tokens of each of the request's rows.
            copied_tokens: those of its prompt, which are there twice for a while.
            used: KV tokens reserved by admitted rows.
            rows: how many rows are admitted.
            kept: KV tokens of all blocks that exist, idle ones of the prefix cache included.
        """
        bound = self.tokens
        if bound is None:
            return True
        if not rows and not kept:
            return self._room != 0
        needed = self._needed(kv_tokens, used=used, rows=rows)
        admitted = max(needed, kept) + copied_tokens <= bound
        without_idle = not rows or needed + copied_tokens <= bound
        self.starved = not admitted and kept > used and without_idle
        return admitted

    def _needed(self, kv_tokens: Sequence[int], *, used: int, rows: int) -> int:
        widths = [tokens + self._overhead for tokens in kv_tokens]
        if self._block_tokens:
            return used + sum(widths)
        return (rows + len(widths)) * max(used // rows, *widths)
