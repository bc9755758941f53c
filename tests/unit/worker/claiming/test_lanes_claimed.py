"""Claims and the batch together: what is claimed is admitted, and no lane starves."""

import random
from collections import deque

import pytest

from mlx_serving.common.queues import LANES, Lane
from mlx_serving.worker.claiming.lane_claims import LaneClaim, LaneRoom
from mlx_serving.worker.engine.interface import Request
from mlx_serving.worker.engine.scheduling.limits import BatchSize, SchedulerLimits
from tests.support.scheduled_batch import Batch, request

CLAIM_MOST = 32


class Queues:
    """What waits in Redis, and a worker that claims of it."""

    def __init__(self, limits: SchedulerLimits) -> None:
        self.batch = Batch(limits)
        self.room = LaneRoom(limits.batch)
        self.waiting: dict[Lane, deque[Request]] = {lane: deque() for lane in LANES}
        self.refused = 0

    def turn(self) -> None:
        """Claim as long as there is room and something to claim, then step."""
        while claim := self.room.next_claim(self.batch.scheduler.lane_rows):
            claimed = self._take(claim)
            if not claimed or not self._admit(claimed):
                break
        self.batch.step()

    def _take(self, claim: LaneClaim) -> list[Request]:
        taken: list[Request] = []
        for lane in claim.lanes:
            while self.waiting[lane] and len(taken) < min(claim.most, CLAIM_MOST):
                taken.append(self.waiting[lane].popleft())
        return sorted(taken, key=lambda job: job.rank)

    def _admit(self, claimed: list[Request]) -> bool:
        for index, job in enumerate(claimed):
            if not self.batch.add(job):
                self.refused += len(claimed) - index
                for back in reversed(claimed[index:]):
                    self.waiting[back.lane].appendleft(back)
                return False
        return True


@pytest.mark.parametrize(("rows", "headroom"), [(64, 0), (64, 8), (16, 2), (8, 1)])
@pytest.mark.parametrize("lane", ["default", "bulk"])
def test_no_lane_starves_behind_an_endless_backlog_of_the_highest(
    lane: Lane, rows: int, headroom: int
) -> None:
    chance = random.Random(1)
    queues = Queues(SchedulerLimits(BatchSize(rows, 0.1, headroom), 10**6, 512, 2, 32))
    most = rows + headroom
    for step in range(3000):
        while len(queues.waiting["interactive"]) < most:
            tokens = chance.randint(16, 200)
            queues.waiting["interactive"].append(request(f"i{step}-{chance.random()}",
                                                         "interactive", 8, tokens))  # fmt: skip
        if step == 100:  # the batch is full of the others
            queues.waiting[lane] += [request(f"low{n}", lane, 8, 30) for n in range(50)]
        queues.turn()
        if sum(name.startswith("low") for name in queues.batch.ended) == 50:
            break
    else:
        pytest.fail("not all of the lane has ended")
    assert queues.refused == 0


@pytest.mark.parametrize("active", [{"interactive": 57, "default": 6, "bulk": 1}, {"bulk": 64}])
def test_what_is_claimed_for_the_headroom_is_admitted(active: dict[Lane, int]) -> None:
    queues = Queues(SchedulerLimits(BatchSize(64, 0.1, 8), 10**6, 512, 2, 32))
    for lane, count in active.items():
        for number in range(count):
            assert queues.batch.add(request(f"{lane}{number}", lane, 8, 500))
    for lane in LANES:
        queues.waiting[lane] += [request(f"{lane}-new{n}", lane) for n in range(20)]
    queues.turn()
    assert queues.refused == 0
    assert len(queues.batch.rows) > 64


def test_a_lane_with_few_rows_of_much_kv_has_its_share_and_more_room_in_the_headroom() -> None:
    """Claims count rows; the batch must not refuse what they bring for want of a row."""
    queues = Queues(SchedulerLimits(BatchSize(64, 0.1, 8), 10_000, 512, 2, 32))
    for number in range(3):
        assert queues.batch.add(request(f"long{number}", "bulk", 300, 100))
    for number in range(61):
        assert queues.batch.add(request(f"i{number}", "interactive", 4, 50))
    queues.waiting["bulk"] += [request(f"b{number}", "bulk") for number in range(4)]
    queues.turn()
    assert queues.refused == 0
    assert not queues.waiting["bulk"]
