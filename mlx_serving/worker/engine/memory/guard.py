"""The memory guard: how much KV cache there is room for, and what to do when short. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mlx_serving.worker.engine.row import Request

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


RELAX_LOOKS: Final = 20  # so many looks without an out-of-memory error let twice as much in


class MemoryRoom:
    """Tells whether there is memory for a request beside those that are admitted.

    A prompt is computed into a cache of its own (which begins with the known blocks that are
    gathered for it) and then copied into the batch's: until then it is there twice. So a request
    needs its keys and values, and its prompt's once more.
    """

    def __init__(self, *, block_tokens: int = 0, overhead_tokens: int = 0) -> None:
        """Know no bound yet. For the arguments see `scheduler.SchedulerLimits`."""
        self._block_tokens, self._overhead = block_tokens, overhead_tokens
        self._room: int | None = None
        self._cap: int | None = None  # after an out-of-memory error
        self._quiet_looks = 0
        self.starved = False
        self.errors = 0  # out-of-memory errors so far

    @property
    def tokens(self) -> int | None:
        """KV tokens that there is memory for, copies included; None: nobody has looked."""
        bounds = [bound for bound in (self._room, self._cap) if bound is not None]
        return min(bounds, default=None)

    def look(self, tokens: int) -> None:
        """Take what the guard found, and be a little bolder again after a quiet time."""
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
        """Forget the errors: what caused them is gone."""
        self._cap = None

    def admits(self, choices: Sequence[Request], *, used: int, rows: int, kept: int) -> bool:
        """Say whether there is memory for these choices of one request.

        With `used` KV tokens reserved by `rows` rows, and `kept` in blocks that exist, those that
        no row uses included. Where the caches are empty the scheduler's budget alone decides,
        unless there is no memory at all: else a job that fits would wait for good.
        """
        bound = self.tokens
        if bound is None:
            return True
        if not rows and not kept:
            return self._room != 0
        needed = self._needed(choices, used=used, rows=rows)
        copies = max(len(request.prompt) + len(request.committed) for request in choices)
        admitted = max(needed, kept) + copies <= bound
        self.starved = not admitted and kept > used and (not rows or needed + copies <= bound)
        return admitted

    def _needed(self, choices: Sequence[Request], *, used: int, rows: int) -> int:
        widths = [request.kv_tokens + self._overhead for request in choices]
        if self._block_tokens:
            return used + sum(widths)
        return (rows + len(choices)) * max(used // rows, *widths)
