"""Which lanes a worker claims from, and how much."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_serving.common.queues import LANES
from mlx_serving.worker.claiming.lane_claims import LaneClaim, LaneNews, LaneRoom
from mlx_serving.worker.engine.interface import LaneRows
from mlx_serving.worker.engine.scheduling.limits import BatchSize

ROOM = LaneRoom(BatchSize(64, 0.1))
NONE = (0, 0, 0)


def claim(
    active: tuple[int, ...],
    parked: tuple[int, ...] = NONE,
    room: LaneRoom = ROOM,
    **claimed: tuple[str, ...],
) -> tuple[tuple[str, ...], int] | None:
    found = room.next_claim(LaneRows(active, parked), **claimed)  # type: ignore[arg-type]
    return (found.lanes, found.most) if found else None


def test_an_empty_batch_takes_from_all_lanes_in_their_order() -> None:
    assert claim(NONE) == (LANES, 64)


def test_the_last_rows_go_first_to_lanes_that_have_less_than_their_share() -> None:
    assert claim((50, 0, 0)) == (("default", "bulk", "interactive"), 14)
    assert claim((50, 7, 0)) == (("bulk", "interactive", "default"), 7)
    assert claim((40, 7, 10)) == (LANES, 7)


def test_a_batch_full_of_bulk_takes_from_the_lanes_above() -> None:
    assert claim((0, 0, 64)) == (("interactive", "default"), 57)
    assert claim((50, 7, 7)) is None
    assert claim((20, 37, 7)) == (("interactive",), 30)


def test_a_lane_with_parked_rows_claims_nothing_nor_does_one_below() -> None:
    assert claim((10, 7, 40), (0, 0, 10)) == (("interactive", "default"), 7)
    assert claim((10, 20, 20), (0, 3, 0)) == (("interactive",), 14)


def test_rows_that_parked_ones_need_for_their_share_are_not_claimed() -> None:
    assert claim((60, 0, 3), (0, 0, 10)) is None
    assert claim((55, 0, 3), (0, 0, 10)) == (("default", "interactive"), 2)


def test_no_more_parked_rows_than_the_batch_holds() -> None:
    assert claim((0, 0, 64), (0, 0, 60)) == (("interactive", "default"), 4)


def test_jobs_in_hand_take_rows() -> None:
    assert claim((0, 0, 60), in_hand=("bulk", "bulk")) == (
        ("default", "interactive", "bulk"), 2,
    )  # fmt: skip
    assert claim((0, 0, 64), in_hand=("interactive",) * 56) == (("interactive", "default"), 1)


def test_while_a_job_waits_for_the_engine_only_higher_lanes_are_claimed() -> None:
    assert claim((0, 0, 10), in_line=("default",)) == (("interactive",), 53)
    assert claim((0, 0, 64), in_line=("bulk",)) == (("interactive", "default"), 57)
    assert claim((0, 0, 10), in_line=("bulk", "interactive")) is None


def test_headroom_is_for_the_highest_lane_and_for_what_another_lacks_of_its_share() -> None:
    room = LaneRoom(BatchSize(64, 0.1, 8))
    assert claim((0, 7, 57), room=room) == (("interactive", "default"), 50)
    assert claim((40, 17, 7), room=room) == (("interactive",), 18)
    assert claim((50, 7, 7), room=room) == (("interactive",), 8)
    assert claim((58, 7, 7), room=room) is None
    assert claim((64, 0, 0), room=room) == (("default", "bulk", "interactive"), 7)
    assert claim((67, 0, 3), room=room) == (("default", "bulk", "interactive"), 2)
    assert claim((57, 6, 1), room=room) == (("default", "bulk", "interactive"), 1)
    assert claim((0, 0, 64), room=room) == (("default", "interactive"), 7)
    assert claim((40, 7, 10), room=room) == (LANES, 7), "where rows are free, no more than these"
    assert claim((50, 0, 0), room=room) == (("default", "bulk", "interactive"), 14)
    assert claim((0, 7, 60), room=room) == (("interactive", "default"), 50), "one may give way"


def test_headroom_is_no_room_for_more_of_a_lane_that_has_its_share() -> None:
    room = LaneRoom(BatchSize(64, 0.0, 8))
    assert claim((0, 0, 64), (0, 0, 3), room=room) == (("interactive", "default"), 61)
    assert claim((64, 0, 0), room=room) == (("interactive",), 8)
    assert claim((0, 64, 0), (0, 1, 0), room=room) == (("interactive",), 63)
    assert claim((0, 0, 60), room=room) == (LANES, 4)


COUNTS = st.tuples(*[st.integers(0, 70)] * 3)
HANDS = st.lists(st.sampled_from(LANES), max_size=70)


@given(COUNTS, COUNTS, HANDS, st.lists(st.sampled_from(LANES), max_size=3), st.integers(0, 9))
def test_a_claim_never_asks_for_more_than_can_be_had(
    active: tuple[int, ...],
    parked: tuple[int, ...],
    in_hand: list[str],
    in_line: list[str],
    headroom: int,
) -> None:
    room = LaneRoom(BatchSize(64, 0.1, headroom))
    found = claim(active, parked, room, in_hand=tuple(in_hand), in_line=tuple(in_line))
    if found is None:
        return
    lanes, most = found
    assert most > 0
    rows = [n + [*in_hand, *in_line].count(lane) for n, lane in zip(active, LANES, strict=True)]
    lowest = max(LANES.index(lane) for lane in lanes)
    poor = all(lane == "interactive" or rows[LANES.index(lane)] < 7 for lane in lanes)
    free = max(0, 64 + (headroom if poor else 0) - sum(rows))
    assert most <= free or most <= free + sum(max(0, n - 7) for n in rows[lowest + 1 :])
    for lane in lanes:
        assert not any(parked[: LANES.index(lane) + 1])
        assert not any(LANES.index(other) <= LANES.index(lane) for other in in_line)


def test_a_claim_of_some_lanes_is_made_for_news_only() -> None:
    now = [7.0]
    news = LaneNews(1.0, lambda: now[0])
    some = LaneClaim(("interactive", "default"), 4)
    assert news.worth(None) is None
    assert news.worth(some) == some, "at first nothing is known"
    news.ask(some)
    assert news.worth(some) is None
    assert news.worth(LaneClaim(LANES, 2)) == LaneClaim(LANES, 2)
    news.note("tally:bulk")
    assert news.worth(some) is None
    news.note("tally:interactive")
    assert news.worth(some) == LaneClaim(("interactive",), 4)
    news.found_more(some)
    assert news.worth(some) == some
    news.ask(some)
    news.note("tally:default")
    assert news.worth(some) == LaneClaim(("default",), 4), "it came after the claim was sent"
    news.ask(some)
    now[0] = 8.0
    assert news.worth(some) == some, "a wake-up may be lost"


@pytest.mark.parametrize(("limit", "most"), [(3, 3), (4, 4), (5, 4)])
def test_a_claim_is_of_no_more_than_one_call_may_take(limit: int, most: int) -> None:
    assert LaneClaim(LANES, 4).up_to(limit) == LaneClaim(LANES, most)


def test_jobs_that_were_left_to_others_are_news_when_their_time_is_over() -> None:
    now = [0.0]
    news = LaneNews(10.0, lambda: now[0])
    some = LaneClaim(("interactive", "default"), 4)
    news.ask(some)
    assert news.due_in() == float("inf")
    news.expect(0)
    assert news.due_in() == float("inf"), "none was left"
    news.expect(0.5)
    news.expect(0.2)
    news.expect(0.4)
    assert news.due_in() == pytest.approx(0.2)
    assert news.worth(some) is None
    now[0] = 0.2
    assert news.worth(some) == some
    news.ask(some)
    news.expect(0.1)
    now[0] = 0.4
    assert news.due_in() == 0, "look at once,"
    assert news.due_in() == float("inf"), "and once: where there is no room to claim, too"
    assert news.worth(some) == some


def test_a_full_claim_is_news_of_the_lanes_that_it_did_not_look_through() -> None:
    news = LaneNews(10.0, lambda: 0.0)
    every, some = LaneClaim(LANES, 4), LaneClaim(("interactive", "bulk"), 4)
    news.ask(every)
    news.found_more(every, "default")
    assert news.worth(some) == LaneClaim(("bulk",), 4), "there was no interactive job left"
    news.ask(some)
    assert news.worth(some) is None, "nor a bulk one"
    news.ask(every)
    news.found_more(every, "default")
    assert news.worth(some) is None, "and nothing came in since"
    assert news.worth(LaneClaim(("default",), 4)) == LaneClaim(("default",), 4)
    news.note("tally:bulk")
    news.ask(every)
    news.found_more(every, "interactive")
    assert news.worth(some) == some, "the bulk job was not looked at yet"
    news.ask(every)
    news.found_more(every)
    assert news.worth(some) == some, "who knows"
