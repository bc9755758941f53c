"""The scheduler under any order of adds, chunks and removals."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mlx_serving.worker.engine.interface import Request, RequestChoice, SamplingParams
from mlx_serving.worker.engine.row import Phase, Row
from mlx_serving.worker.engine.scheduling.limits import BatchSize, SchedulerLimits
from mlx_serving.worker.engine.scheduling.scheduler import Scheduler

ROWS, CAPACITY, CHUNK, OVERHEAD = 6, 400, 16, 3


class SchedulerMachine(RuleBasedStateMachine):
    """Compares with a plain list of rows in order of arrival. Rows are padded to the longest."""

    block_tokens = 0

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(
            SchedulerLimits(BatchSize(ROWS), CAPACITY, CHUNK, OVERHEAD, self.block_tokens)
        )
        self.rows: list[Row] = []
        self.computed: dict[Row, int] = {}
        self.started: list[Row] = []
        self.count = 0

    @rule(
        prompt=st.integers(1, 60),
        max_tokens=st.integers(1, 60),
        committed=st.lists(st.integers(0, 30), min_size=1, max_size=3),
    )
    def add(self, prompt: int, max_tokens: int, committed: list[int]) -> None:
        """Add as many choices as `committed` has entries."""
        self.count += 1
        choices = tuple(
            RequestChoice(index, (2,) * min(tokens, max_tokens - 1))
            for index, tokens in enumerate(committed)
        )
        request = Request(
            f"r{self.count}", (1,) * prompt, SamplingParams(), max_tokens, choices=choices
        )
        if self.scheduler.can_add(request):
            assert self.scheduler.fits(request)
            added = self.scheduler.add(request)
            self.rows += added
            self.computed |= dict.fromkeys(added, 0)

    @rule()
    def prefill(self) -> None:
        chunk = self.scheduler.schedule_prefill()
        pending = [row for row in self.rows if row.phase is not Phase.DECODING]
        if chunk is None:
            assert not pending
            return
        assert chunk.rows[0] is pending[0], "first in, first out"
        assert list(chunk.rows) == pending[: len(chunk.rows)]
        computed = len(chunk.groups) * chunk.length
        assert computed <= CHUNK, "decoding rows wait for one chunk at most"
        for row in chunk.rows:
            assert chunk.start == self.computed[row], "nothing is skipped or computed twice"
            tokens = row.context(chunk.start, chunk.start + chunk.length)
            self.computed[row] += len(tokens)
            if row not in self.started:
                self.started.append(row)
        for group in chunk.groups:
            assert {row.request.id for row in group} == {group[0].request.id}
            assert all(row.context(0, 99) == group[0].context(0, 99) for row in group)
        done = self.scheduler.finish_prefill(chunk)
        for row in chunk.rows:
            assert done == (row.phase is Phase.DECODING)
            assert row.prefill.prefilled_tokens == self.computed[row]
            if done:
                assert self.computed[row] == row.context_length
        assert done or len(chunk.groups) == 1, "only a prompt on its own takes several chunks"

    @precondition(lambda self: bool(self.rows))
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        row = data.draw(st.sampled_from(self.rows))
        self.rows.remove(row)
        self.scheduler.remove(row)
        self.scheduler.remove(row)  # idempotent

    @invariant()
    def counts_agree(self) -> None:
        decoding = sum(row.phase is Phase.DECODING for row in self.rows)
        assert self.scheduler.running == decoding
        assert self.scheduler.waiting == len(self.rows) - decoding
        assert self.scheduler.has_work == bool(self.rows)
        assert self.scheduler.kv_tokens_used == self.reserved()
        assert self.scheduler.kv_tokens_used <= CAPACITY
        assert len(self.rows) <= ROWS

    def reserved(self) -> int:
        widths = [row.kv_tokens + OVERHEAD for row in self.rows]
        return len(widths) * max(widths, default=0)

    def teardown(self) -> None:
        """Nothing starves: as many chunks as there are tokens bring every row to decoding."""
        for _ in range(sum(row.context_length for row in self.rows) + len(self.rows)):
            chunk = self.scheduler.schedule_prefill()
            if chunk is None:
                break
            self.scheduler.finish_prefill(chunk)
        assert all(row.phase is Phase.DECODING for row in self.rows)


class PagedSchedulerMachine(SchedulerMachine):
    """The same over a paged cache: every row takes blocks of its own."""

    block_tokens = 8

    def reserved(self) -> int:
        return sum(-(-(row.kv_tokens + OVERHEAD) // 8) * 8 for row in self.rows)


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPagedScheduler = PagedSchedulerMachine.TestCase
TestPagedScheduler.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
