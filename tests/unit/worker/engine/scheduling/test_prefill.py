"""Which tokens a prefill chunk takes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from mlx_serving.common.queues import LANES, Lane
from mlx_serving.worker.engine.interface import Request, RequestChoice, SamplingParams
from mlx_serving.worker.engine.row import Phase, Row
from mlx_serving.worker.engine.scheduling.chunk import PrefillChunk
from mlx_serving.worker.engine.scheduling.limits import BatchSize, SchedulerLimits
from mlx_serving.worker.engine.scheduling.packing import PACKED_CONTEXT_CHUNKS, ChunkPacking
from mlx_serving.worker.engine.scheduling.prompt_queue import ROWS_PER_PROMPT
from mlx_serving.worker.engine.scheduling.scheduler import Scheduler


def chunks_of(contexts: list[int], chunk_tokens: int = 16) -> list[tuple[int, int, int]]:
    """(rows, start, length) of every chunk that prompts with these contexts take."""
    scheduler = Scheduler(SchedulerLimits(BatchSize(64), 100_000, chunk_tokens))
    for index, context in enumerate(contexts):
        scheduler.add(Request(str(index), (1,) * (context + 1), SamplingParams(), 4))
    chunks: list[PrefillChunk] = []
    while (chunk := scheduler.schedule_prefill()) is not None:
        chunks.append(chunk)
        scheduler.finish_prefill(chunk)
    return [(len(chunk.rows), chunk.start, chunk.length) for chunk in chunks]


def test_a_long_prompt_goes_alone_chunk_by_chunk() -> None:
    assert chunks_of([40]) == [(1, 0, 16), (1, 16, 16), (1, 32, 8)]


def test_short_prompts_share_a_chunk_that_their_padding_fits() -> None:
    assert chunks_of([4, 3, 4, 4]) == [(4, 0, 4)]
    assert chunks_of([4, 8, 4, 4]) == [(2, 0, 8), (2, 0, 4)]


def test_order_is_kept_even_where_another_order_would_pack_better() -> None:
    assert chunks_of([2, 40, 2]) == [(1, 0, 2), (1, 0, 16), (1, 16, 16), (1, 32, 8), (1, 0, 2)]


def test_one_token_prompts_need_no_forward_pass() -> None:
    assert chunks_of([0, 0, 0]) == [(3, 0, 0)]


def test_committed_tokens_are_prefilled_after_the_prompt() -> None:
    scheduler = Scheduler(SchedulerLimits(BatchSize(4), 1000, 16))
    choice = RequestChoice(0, committed=(7, 8))
    (row,) = scheduler.add(Request("a", (1, 2, 3), SamplingParams(), 8, choices=(choice,)))
    assert row.context(0, 16) == [1, 2, 3, 7]
    assert row.last_token == 8


def test_removing_the_prompt_in_flight_lets_the_next_one_start_afresh() -> None:
    scheduler = Scheduler(SchedulerLimits(BatchSize(4), 1000, 16))
    (first,) = scheduler.add(Request("a", (1,) * 40, SamplingParams(), 4))
    (second,) = scheduler.add(Request("b", (1,) * 40, SamplingParams(), 4))
    chunk = scheduler.schedule_prefill()
    assert chunk is not None
    scheduler.finish_prefill(chunk)
    assert (first.phase, second.phase) == (Phase.PREFILLING, Phase.WAITING)
    scheduler.remove(first)
    following = scheduler.schedule_prefill()
    assert following is not None
    assert (following.rows, following.start) == ((second,), 0)


def test_choices_of_one_request_are_one_prompt() -> None:
    scheduler = Scheduler(SchedulerLimits(BatchSize(64), 100_000, 16))
    choices = tuple(map(RequestChoice, range(5)))
    rows = scheduler.add(Request("n", (1,) * 9, SamplingParams(), 4, choices=choices))
    chunk = scheduler.schedule_prefill()
    assert chunk == PrefillChunk((tuple(rows),), 0, 8)
    assert scheduler.finish_prefill(chunk)
    assert scheduler.running == 5


def test_choices_that_resume_are_prompts_of_their_own() -> None:
    scheduler = Scheduler(SchedulerLimits(BatchSize(64), 100_000, 64))
    tails: list[tuple[int, ...]] = [(), (7,), (7, 8)]
    choices = tuple(RequestChoice(n, tail) for n, tail in enumerate(tails))
    rows = scheduler.add(Request("n", (1,) * 9, SamplingParams(), 4, choices=choices))
    chunk = scheduler.schedule_prefill()
    assert chunk == PrefillChunk(tuple((row,) for row in rows), 0, 10)


def busy_scheduler(rows: int, chunk_tokens: int = 64) -> Scheduler:
    """A scheduler with so many decoding rows."""
    scheduler = Scheduler(SchedulerLimits(BatchSize(200), 1_000_000, chunk_tokens))
    for index in range(rows):
        scheduler.add(Request(f"d{index}", (1,) * 3, SamplingParams(), 4))
    while (chunk := scheduler.schedule_prefill()) is not None:
        scheduler.finish_prefill(chunk)
    assert scheduler.running == rows
    return scheduler


def add_prompt(scheduler: Scheduler, name: str, context: int = 5, lane: Lane = "default") -> None:
    scheduler.add(Request(name, (1,) * (context + 1), SamplingParams(), 4, lane=lane))


def test_among_few_rows_a_prompt_waits_for_no_other() -> None:
    scheduler = busy_scheduler(2 * ROWS_PER_PROMPT - 1)
    add_prompt(scheduler, "a")
    assert scheduler.schedule_prefill() is not None


@pytest.mark.parametrize("lane", LANES)
def test_among_many_rows_a_prompt_waits_a_few_steps_for_others(lane: Lane) -> None:
    scheduler = busy_scheduler(3 * ROWS_PER_PROMPT)
    add_prompt(scheduler, "a", lane=lane)
    for _ in range({"interactive": 0, "default": 4, "bulk": 8}[lane]):
        assert scheduler.schedule_prefill() is None
    chunk = scheduler.schedule_prefill()
    assert chunk is not None
    assert len(chunk.rows) == 1


def test_it_waits_no_longer_than_for_enough_of_them() -> None:
    scheduler = busy_scheduler(3 * ROWS_PER_PROMPT)
    add_prompt(scheduler, "a")
    assert scheduler.schedule_prefill() is None
    add_prompt(scheduler, "b")
    assert scheduler.schedule_prefill() is None
    add_prompt(scheduler, "c")
    chunk = scheduler.schedule_prefill()
    assert chunk is not None
    assert len(chunk.rows) == 3


def test_a_prompt_beside_which_no_other_fits_does_not_wait() -> None:
    scheduler = busy_scheduler(3 * ROWS_PER_PROMPT)
    add_prompt(scheduler, "a", context=40)
    assert scheduler.schedule_prefill() is not None


def test_a_chunk_of_a_higher_lane_does_not_have_a_prompt_wait_anew() -> None:
    scheduler = busy_scheduler(3 * ROWS_PER_PROMPT)
    add_prompt(scheduler, "waits", lane="bulk")
    assert [scheduler.schedule_prefill() for _ in range(5)] == [None] * 5
    add_prompt(scheduler, "first", context=40, lane="interactive")
    while (chunk := scheduler.schedule_prefill()) is not None:
        assert [row.request.id for row in chunk.rows] == ["first"]
        scheduler.finish_prefill(chunk)
    assert [scheduler.schedule_prefill() for _ in range(2)] == [None] * 2
    assert scheduler.schedule_prefill() is not None


def test_a_prompt_that_has_begun_does_not_wait_between_its_chunks() -> None:
    scheduler = busy_scheduler(3 * ROWS_PER_PROMPT)
    add_prompt(scheduler, "a", context=200)
    for _ in range(4):
        chunk = scheduler.schedule_prefill()
        assert chunk is not None
        scheduler.finish_prefill(chunk)
    assert scheduler.running == 3 * ROWS_PER_PROMPT + 1


def go_together(rows: list[Row], limits: SchedulerLimits) -> bool:
    """Say, from all of them at once, whether the last one may share a chunk with the others."""
    chunk, block = limits.prefill_chunk_tokens, limits.kv_block_tokens
    cached = [row.prefill.cached_tokens for row in rows]
    least, most = min(cached), max(cached)
    longest = max(row.context_length for row in rows)
    end = (cached[-1] // block + 1) * block
    *firsts, needed = (row.context(0, end) for row in rows)
    return (
        most - least <= block
        and len(rows) * (longest - least) <= chunk
        and len(rows) * longest <= PACKED_CONTEXT_CHUNKS * chunk
        and not (len(needed) == end and needed in firsts)
    )


@given(st.lists(st.tuples(st.integers(2, 14), st.integers(0, 9), st.booleans()), min_size=1))
def test_each_prompt_is_judged_as_if_all_were_looked_at_anew(
    prompts: list[tuple[int, int, bool]],
) -> None:
    limits = SchedulerLimits(BatchSize(64), 100_000, 24, kv_block_tokens=4)
    packing = ChunkPacking(limits, limits.prefill_chunk_tokens, shares_blocks=True)
    packed: list[Row] = []
    for number, (length, found, own) in enumerate(prompts):
        tokens = (number if own else 7,) * length
        row = Row(Request(str(number), tokens, SamplingParams(), 4), RequestChoice())
        row.begin_prefill(min(found, row.context_length))
        assert packing.has_room_for((row,)) == (not packed or go_together([*packed, row], limits))
        if packing.has_room_for((row,)):
            packing.add((row,))
            packed.append(row)


def chunk_of(scheduler: Scheduler) -> list[str]:
    chunk = scheduler.schedule_prefill()
    assert chunk is not None
    scheduler.finish_prefill(chunk)
    return [row.request.id for row in chunk.rows]


def test_short_prompts_of_lower_lanes_ride_along_in_a_chunk_of_a_higher_one() -> None:
    scheduler = Scheduler(SchedulerLimits(BatchSize(40), 10_000, 512, first_chunk_tokens=512))
    add_prompt(scheduler, "b", 8, "bulk")
    add_prompt(scheduler, "long", 39, "bulk")
    add_prompt(scheduler, "behind", 3, "bulk")
    add_prompt(scheduler, "d", 32)
    add_prompt(scheduler, "i", 11, "interactive")
    assert chunk_of(scheduler) == ["i", "d", "b"]
    assert chunk_of(scheduler) == ["long", "behind"]


def test_no_more_ride_along_than_half_a_chunk_holds() -> None:
    scheduler = Scheduler(SchedulerLimits(BatchSize(40), 10_000, 512, first_chunk_tokens=512))
    for number in range(20):
        add_prompt(scheduler, f"b{number}", 7, "bulk")
    add_prompt(scheduler, "i", 63, "interactive")
    assert chunk_of(scheduler) == ["i", "b0", "b1", "b2"]


def test_nothing_rides_along_that_a_prompt_under_way_of_its_lane_comes_before() -> None:
    scheduler = Scheduler(SchedulerLimits(BatchSize(40), 10_000, 512, first_chunk_tokens=512))
    add_prompt(scheduler, "long", 600, "bulk")
    assert chunk_of(scheduler) == ["long"]
    add_prompt(scheduler, "b", 5, "bulk")
    add_prompt(scheduler, "i", 5, "interactive")
    assert chunk_of(scheduler) == ["i"]


def mixing(chunk: int = 512, reads: int = 1 << 17) -> Scheduler:
    return Scheduler(
        SchedulerLimits(
            BatchSize(40),
            10_000,
            chunk,
            kv_block_tokens=32,
            mixed_reads=reads,
            first_chunk_tokens=chunk,
        )
    )


def test_short_prompts_are_computed_by_the_decode_step_and_not_padded() -> None:
    scheduler = mixing()
    for name, length in (("a", 8), ("b", 200), ("c", 1), ("d", 64)):
        add_prompt(scheduler, name, length, "bulk")
    chunk = scheduler.schedule_prefill()
    assert chunk is not None
    assert chunk.mixed
    assert [row.request.id for row in chunk.rows] == ["a", "b", "c", "d"]
    assert scheduler.finish_prefill(chunk)
    assert scheduler.running == 4


@pytest.mark.parametrize(("chunk", "reads", "taken"), [(60, 1 << 17, 3), (512, 1600, 4)])
def test_a_decode_step_takes_so_many_tokens_and_reads(chunk: int, reads: int, taken: int) -> None:
    """Each prompt has 20 tokens to compute, which read 20 each at most."""
    scheduler = mixing(chunk, reads)
    for number in range(6):
        add_prompt(scheduler, str(number), 20)
    assert chunk_of(scheduler) == [str(number) for number in range(taken)]


def test_a_prompt_that_reads_too_much_has_chunks_and_those_behind_it_wait() -> None:
    scheduler = mixing(chunk=64, reads=64 * 64)
    add_prompt(scheduler, "long", 100)
    add_prompt(scheduler, "short", 5)
    seen = []
    while (chunk := scheduler.schedule_prefill()) is not None:
        seen.append(([row.request.id for row in chunk.rows], chunk.length, chunk.mixed))
        scheduler.finish_prefill(chunk)
    assert seen == [(["long"], 64, False), (["long"], 36, False), (["short"], 5, True)]


def test_choices_of_one_prompt_share_a_chunk() -> None:
    scheduler = mixing()
    request = Request("n", (1,) * 10, SamplingParams(), 4, lane="bulk")
    scheduler.add(replace(request, choices=tuple(map(RequestChoice, range(3)))))
    add_prompt(scheduler, "other", 9, "bulk")
    chunk = scheduler.schedule_prefill()
    assert chunk is not None
    assert not chunk.mixed
    assert [len(group) for group in chunk.groups] == [3, 1]


def test_a_decode_step_takes_lower_lanes_along_up_to_half_a_chunk() -> None:
    scheduler = mixing(chunk=100)
    for number in range(4):
        add_prompt(scheduler, f"b{number}", 15, "bulk")
    add_prompt(scheduler, "d", 15)
    add_prompt(scheduler, "i", 10, "interactive")
    assert chunk_of(scheduler) == ["i", "d", "b0"]
    assert chunk_of(scheduler) == ["b1", "b2", "b3"]
