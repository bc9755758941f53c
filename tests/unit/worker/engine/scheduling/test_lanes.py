"""Lanes inside the batch: who gives way, what a lane keeps, and that everybody gets his turn."""

from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_serving.common.queues import LANES, Lane
from mlx_serving.worker.engine.scheduling.limits import BatchSize
from mlx_serving.worker.engine.scheduling.prompt_queue import LaneTurns
from tests.support.scheduled_batch import ROWS, Batch, limits, request


def full(batch: Batch, lane: Lane = "bulk", prompt: int = 4, tokens: int = 50) -> Batch:
    """A batch that one lane fills and that decodes."""
    for number in count():
        if not batch.add(request(f"{lane}{number}", lane, prompt, tokens)):
            break
    for _ in range(batch.limits.batch.max_rows + 2):
        batch.step()
    return batch


def test_a_row_of_the_lowest_lane_gives_way_the_newest_first() -> None:
    batch = Batch(limits())
    for number, lane in enumerate(("bulk", "default", "bulk", "default", "bulk", "default")):
        assert batch.add(request(f"r{number}", lane, tokens=50))  # type: ignore[arg-type]
    for _ in range(8):
        batch.step()
    given: list[str] = []
    for number in range(4):
        assert batch.add(request(f"i{number}", "interactive"))
        lanes = (*batch.parked("bulk"), *batch.parked("default"))
        given += [row.request.id for row in lanes if row.request.id not in given]
    assert given == ["r4", "r2", "r5", "r3"], "and one row of each stays: its share"
    assert not batch.add(request("i4", "interactive"))


def test_none_gives_way_to_its_own_lane_or_a_lower_one() -> None:
    for lane in LANES:
        batch = full(Batch(limits()), lane)
        for other in LANES[LANES.index(lane) :]:
            assert not batch.add(request("other", other))


def test_rows_that_wait_give_way_before_those_that_decode() -> None:
    batch = Batch(limits())
    for number in range(5):
        batch.add(request(f"b{number}", "bulk", tokens=50))
    for _ in range(6):
        batch.step()
    batch.add(request("waits", "bulk"))
    assert batch.add(request("now", "interactive"))
    assert [row.request.id for row in batch.parked("bulk")] == ["waits"]


def test_nothing_new_of_a_lane_passes_its_parked_rows() -> None:
    batch = full(Batch(limits()))
    batch.add(request("now", "interactive", tokens=30))
    assert batch.scheduler.parked == 1
    batch.remove(batch.active("bulk")[0])
    assert not batch.add(request("new", "bulk"))
    batch.step()
    assert batch.scheduler.parked == 0


def test_the_highest_lane_goes_into_the_headroom_before_anybody_gives_way() -> None:
    batch = full(Batch(limits(headroom=2)))
    assert len(batch.active("bulk")) == ROWS
    assert all(batch.add(request(f"i{number}", "interactive")) for number in range(2))
    assert batch.scheduler.parked == 0
    assert batch.add(request("i2", "interactive"))
    assert batch.scheduler.parked == 1


def test_a_batch_beyond_its_rows_takes_nothing_of_lower_lanes_until_it_is_back() -> None:
    batch = full(Batch(limits(headroom=2)))
    batch.add(request("i0", "interactive", tokens=60))
    batch.remove(batch.active("bulk")[0])
    assert not batch.add(request("b", "bulk"))
    batch.remove(batch.active("bulk")[0])
    assert batch.add(request("b", "bulk"))


def test_a_lane_that_has_its_share_brings_the_batch_back_to_its_rows() -> None:
    batch = full(Batch(limits(headroom=2)))
    assert batch.add(request("d0", "default"))  # its share of six rows: into the headroom
    assert batch.add(request("i0", "interactive"))
    assert batch.scheduler.parked == 0
    assert batch.add(request("d1", "default"))
    assert batch.scheduler.parked == 3, "two rows beyond the batch, and one for it"
    assert sum(batch.scheduler.lane_rows.active) == ROWS


def test_what_a_lane_lacks_of_its_share_may_go_into_the_headroom() -> None:
    batch = full(Batch(limits(rows=30, headroom=4)), "interactive")
    assert len(batch.active("interactive")) == 34
    batch = full(Batch(limits(rows=30, headroom=4)), "default")
    assert all(batch.add(request(f"b{number}", "bulk")) for number in range(3))
    assert not batch.add(request("b3", "bulk"))
    assert batch.add(request("i", "interactive"))
    assert batch.scheduler.parked == 0


def test_headroom_is_no_memory() -> None:
    batch = full(Batch(limits(capacity=6 * 56, headroom=2)))
    assert batch.add(request("i", "interactive", 4, 50))
    assert batch.scheduler.parked == 1


def test_kv_is_dropped_only_where_the_budget_asks_for_it() -> None:
    batch = full(Batch(limits(capacity=6 * 56, block=1)))
    assert batch.add(request("small", "interactive", 4, 30))
    (kept,) = batch.parked("bulk")
    assert batch.scheduler._reservation.keeps(kept)
    assert batch.add(request("large", "interactive", 60, 40))
    assert not batch.scheduler._reservation.keeps(kept)


def test_a_lane_that_others_filled_gets_its_share_back_as_rows_end() -> None:
    batch = full(Batch(limits(rows=30)))
    added = [
        batch.add(request(f"i{number}", "interactive", tokens=5 + number)) for number in range(40)
    ]
    assert sum(added) == 27, "three rows of thirty stay"
    batch.remove(batch.active("bulk")[0])
    assert not batch.add(request("late", "interactive")), "the free row is bulk's"
    batch.step()
    assert len(batch.active("bulk")) == 3


def test_without_a_share_all_rows_give_way() -> None:
    batch = full(Batch(limits(share=0.0)))
    assert all(batch.add(request(f"i{number}", "interactive")) for number in range(ROWS))
    assert batch.scheduler.parked == ROWS


@pytest.mark.parametrize(("rows", "least"), [(1, 0), (2, 0), (3, 1), (10, 1), (64, 7)])
def test_a_share_leaves_room_for_others(rows: int, least: int) -> None:
    assert BatchSize(rows, 0.1).lane_min_rows == least


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="lane_min_share must be at least 0 and under 1"):
        limits(share=share)


def test_a_long_prompt_of_bulk_is_set_aside_for_a_prompt_of_a_higher_lane() -> None:
    batch = Batch(limits())
    batch.add(request("long", "bulk", prompt=100))
    batch.step()
    batch.add(request("now", "interactive", prompt=10))
    for _ in range(3):
        batch.step()
    assert [(c.rows[0].request.id, c.start) for c in batch.chunks] == [
        ("long", 0), ("now", 0), ("long", 16), ("long", 32),
    ]  # fmt: skip


@given(
    st.lists(st.sets(st.sampled_from(range(3)), min_size=1), max_size=120),
    st.sampled_from([0.1, 0.25, 0.4]),
)
def test_each_lane_that_waits_gets_its_share_of_the_turns(
    waiting: list[set[int]], share: float
) -> None:
    turns = LaneTurns(share)
    passed = [0, 0, 0]
    for ranks in waiting:
        turn = turns.next(ranks)
        turns.take(turn, ranks)
        assert turn in ranks
        if turn != min(ranks):
            assert passed[turn] >= 1 / share - 1, "a turn out of order is due"
        for rank in range(3):
            passed[rank] = passed[rank] + 1 if rank in ranks - {turn} else 0
        for rank in (1, 2):
            assert passed[rank] <= -(-1 // share) + 1, "one lane may be due before it"


JOBS = st.lists(
    st.tuples(st.sampled_from(LANES[1:]), st.integers(1, 40), st.integers(1, 12)),
    min_size=1, max_size=8,
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(JOBS, st.integers(1, 40), st.integers(1, 8), st.sampled_from([0, 8]), st.integers(0, 2))
def test_nobody_starves_under_endless_traffic_of_the_highest_lane(
    jobs: list[tuple[Lane, int, int]], prompt: int, tokens: int, block: int, headroom: int
) -> None:
    batch = Batch(limits(capacity=400, block=block, headroom=headroom))
    left = [request(f"b{n}", lane, size, length) for n, (lane, size, length) in enumerate(jobs)]
    names = {job.id for job in left}
    for step in count():
        left = [job for job in left if not batch.add(job)]
        while batch.add(request(f"i{step}-{len(batch.rows)}", "interactive", prompt, tokens)):
            pass
        batch.step()
        if names <= set(batch.ended):
            break
        assert step < 2500
