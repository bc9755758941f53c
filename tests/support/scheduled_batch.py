"""A scheduler and what an engine would do with it; no device."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from mlx_serving.common.queues import Lane
from mlx_serving.worker.engine.interface import Request, RequestChoice, SamplingParams
from mlx_serving.worker.engine.row import Phase, Row
from mlx_serving.worker.engine.scheduling.limits import BatchSize, SchedulerLimits
from mlx_serving.worker.engine.scheduling.scheduler import Scheduler

if TYPE_CHECKING:
    from mlx_serving.worker.engine.scheduling.chunk import PrefillChunk

ROWS, CHUNK = 6, 16


def request(name: str, lane: Lane, prompt: int = 4, tokens: int = 8, choices: int = 1) -> Request:
    indices = tuple(map(RequestChoice, range(choices)))
    return Request(name, (1,) * prompt, SamplingParams(), tokens, choices=indices, lane=lane)


class Batch:
    """Rows that the scheduler let in, stepped by hand."""

    def __init__(self, limits: SchedulerLimits) -> None:
        self.limits = limits
        self.scheduler = Scheduler(limits)
        self.rows: list[Row] = []
        self.ended: list[str] = []
        self.chunks: list[PrefillChunk] = []

    def add(self, asked: Request) -> bool:
        if not self.scheduler.can_add(asked):
            return False
        parking = self.scheduler.find_room(asked)
        for row in parking.park:
            self.check_newest(row)
            self.scheduler.park(row)
        for row in parking.evict:
            self.scheduler.evict(row)
        self.rows += self.scheduler.add(asked)
        return True

    def check_newest(self, row: Row) -> None:
        """Of its lane, a row that loses as little and came later would have given way first."""
        assert not [
            other
            for other in self.rows
            if (other.request.lane, other.phase) == (row.request.lane, row.phase)
            and other.order > row.order
        ]

    def step(self) -> None:
        while (resumption := self.scheduler.next_parked()) is not None:
            for row in resumption.evict:
                self.scheduler.evict(row)
            row = resumption.resume
            earlier = [p for p in self.parked(row.request.lane) if p.order < row.order]
            assert not earlier, "within a lane, in the order of admission"
            self.scheduler.resume(row)
        chunk = self.scheduler.schedule_prefill()
        if chunk is not None:
            self.chunks.append(chunk)
            if self.scheduler.finish_prefill(chunk):
                self.scheduler.join(chunk.groups)
        for row in [row for row in self.rows if row.phase is Phase.DECODING]:
            row.tokens.append(1)
            if len(row.tokens) >= row.request.max_tokens:
                self.remove(row)

    def remove(self, row: Row) -> None:
        self.rows.remove(row)
        self.scheduler.remove(row)
        self.ended.append(row.request.id)

    def parked(self, lane: Lane) -> list[Row]:
        return [r for r in self.rows if r.phase is Phase.PARKED and r.request.lane == lane]

    def active(self, lane: Lane) -> list[Row]:
        return [r for r in self.rows if r.phase is not Phase.PARKED and r.request.lane == lane]

    def has_share(self, rows: Iterable[Row]) -> bool:
        widths = [self.scheduler._reservation._rounded(row.kv_tokens) for row in rows]
        return self.limits.is_share(len(widths), sum(widths))


def limits(
    rows: int = ROWS,
    capacity: int = 10_000,
    *,
    share: float = 0.1,
    block: int = 0,
    headroom: int = 0,
) -> SchedulerLimits:
    return SchedulerLimits(BatchSize(rows, share, headroom), capacity, CHUNK, 2, block)
