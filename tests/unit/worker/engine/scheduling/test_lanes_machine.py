"""Lanes inside the batch under any order of jobs, steps and cut-offs."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mlx_serving.common.queues import LANES, Lane
from mlx_serving.worker.engine.interface import Request
from mlx_serving.worker.engine.row import Phase
from tests.support.scheduled_batch import ROWS, Batch, limits, request

_LAST = (Phase.PREFILLING, Phase.DECODING, Phase.WAITING)


class LanesMachine(RuleBasedStateMachine):
    """Any order of jobs, steps and cut-offs."""

    block = 0
    headroom = 0

    def __init__(self) -> None:
        super().__init__()
        self.batch = Batch(limits(capacity=240, block=self.block, headroom=self.headroom))
        self.count = 0

    @rule(
        lane=st.sampled_from(LANES),
        prompt=st.integers(1, 40),
        tokens=st.integers(1, 30),
        choices=st.integers(1, 2),
    )
    def add(self, lane: Lane, prompt: int, tokens: int, choices: int) -> None:
        self.count += 1
        asked = request(f"r{self.count}", lane, prompt, tokens, choices)
        if not self.batch.scheduler.fits(asked):
            return
        rank = LANES.index(lane)
        before = {low: self.batch.has_share(self.batch.active(low)) for low in LANES[rank + 1 :]}
        lacks = self.lacks(lane)
        if self.batch.add(asked):
            if rank and not lacks:
                active = sum(self.batch.scheduler.lane_rows.active)
                assert active <= ROWS, "headroom is for others"
            for low, had_share in before.items():
                assert not had_share or self.batch.has_share(self.batch.active(low))
        else:
            self.check_no_room(asked)

    def lacks(self, lane: Lane) -> bool:
        return len(self.batch.active(lane)) < self.batch.limits.batch.lane_min_rows

    def check_no_room(self, asked: Request) -> None:
        """No inversion: with every lane below cut down to its share, there is no room either."""
        rank, batch = asked.rank, self.batch
        below = LANES[rank + 1 :]
        owed = [
            low for low in below if batch.parked(low) and not batch.has_share(batch.active(low))
        ]
        if any(map(batch.parked, LANES[: rank + 1])) or batch.scheduler.parked or owed:
            return  # what is parked goes first, has its own bound, or comes back soon
        left = [row for lane in LANES[: rank + 1] for row in batch.active(lane)]
        for low in below:
            kept = sorted(batch.active(low), key=lambda row: (_LAST.index(row.phase), row.order))
            while kept and batch.has_share(kept[:-1]):
                kept.pop()
            left += kept
        kv_tokens = [row.kv_tokens for row in left] + asked.kv_tokens
        needed = batch.scheduler._reservation.alone(kv_tokens)
        beyond = rank == 0 or self.lacks(LANES[rank])
        most = ROWS + self.headroom if beyond else ROWS
        assert len(kv_tokens) > most or needed > 240

    @rule(steps=st.integers(1, 4))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.batch.step()

    @precondition(lambda self: bool(self.batch.rows))
    @rule(data=st.data())
    def cut_off(self, data: st.DataObject) -> None:
        self.batch.remove(data.draw(st.sampled_from(self.batch.rows)))

    @invariant()
    def within_bounds(self) -> None:
        scheduler, rows = self.batch.scheduler, self.batch.rows
        assert scheduler.kv_tokens_used <= 240
        assert scheduler.running + scheduler.waiting <= ROWS + self.headroom
        assert scheduler.parked <= ROWS
        assert scheduler.running + scheduler.waiting + scheduler.parked == len(rows)
        for rank, lane in enumerate(LANES):
            assert scheduler.lane_rows.active[rank] == len(self.batch.active(lane))
            assert scheduler.lane_rows.parked[rank] == len(self.batch.parked(lane))

    def teardown(self) -> None:
        """What is here comes to its end, parked or not, and leaves nothing behind."""
        for _ in range(3000):
            if not self.batch.rows:
                break
            self.batch.step()
        assert not self.batch.rows
        assert self.batch.scheduler.kv_tokens_used == 0


class PagedLanesMachine(LanesMachine):
    """The same over a paged cache."""

    block = 8


class HeadroomMachine(PagedLanesMachine):
    """The same with headroom."""

    headroom = 2


TestHeadroom = HeadroomMachine.TestCase
TestHeadroom.settings = settings(max_examples=20, stateful_step_count=30, deadline=None)
TestLanes = LanesMachine.TestCase
TestLanes.settings = settings(max_examples=20, stateful_step_count=30, deadline=None)
TestPagedLanes = PagedLanesMachine.TestCase
TestPagedLanes.settings = settings(max_examples=20, stateful_step_count=30, deadline=None)
