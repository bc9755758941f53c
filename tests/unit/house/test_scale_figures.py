"""What the scale benchmark makes of its counts: rates, loads of process groups, over linear."""

from __future__ import annotations

import pytest

from benchmarks.contract.scale import rate
from benchmarks.lib.process_cpu import GroupLoad, loads
from benchmarks.lib.scale_fleet import Counts
from benchmarks.lib.scale_report import Plan, Point, figures

QUIET = {"redis": GroupLoad(1, 0.5, 0.5), "workers": GroupLoad(10, 0.2, 0.7)}


def point(workers: int, tokens: float, name: str = "3/s a row", **load: GroupLoad) -> Point:
    return Point(
        name, workers, offered=0.0, streams=0, queued=0, tokens=tokens, events=tokens, jobs=0.0,
        gap_p50_ms=0.0, gap_p99_ms=0.0, backlog=0, commands=0.0, scripts=0.0, bytes_in=0.0,
        bytes_out=0.0, loads=QUIET | load,
    )  # fmt: skip


def test_a_rate_is_taken_between_a_processs_own_arrivals() -> None:
    """A consumer whose last token came earlier has a shorter window, not a lower rate."""
    before = [Counts(at=10.0, tokens=100), Counts(at=10.2, tokens=50), Counts()]
    after = [Counts(at=15.0, tokens=600), Counts(at=14.2, tokens=450), Counts(at=15.0, tokens=9)]
    assert rate(before, after, "tokens") == 100.0 + 100.0


def test_a_group_has_a_core_a_process() -> None:
    groups = {"redis": [1], "workers": [2, 3, 4, 5]}
    before = dict.fromkeys([1, 2, 3, 4, 5], 10.0)
    after = {1: 14.0, 2: 10.0, 3: 11.0, 4: 12.0, 5: 15.0}
    found = loads(before, after, groups, 10.0, machine_cores=16)
    assert found["redis"] == GroupLoad(1, 0.4, 0.4)
    assert found["workers"] == GroupLoad(4, 0.2, 0.5)
    assert loads(before, after, groups, 10.0, machine_cores=2)["workers"].cores == 2


@pytest.mark.parametrize(
    ("share", "busiest", "busy"), [(0.7, 0.7, False), (0.71, 0.71, True), (0.3, 0.75, True)]
)
def test_a_process_that_has_nothing_left_makes_its_group_busy(
    share: float, busiest: float, *, busy: bool
) -> None:
    assert GroupLoad(4, share, busiest).busy is busy


def test_linear_is_the_one_workers_figure_times_the_workers() -> None:
    one, many = figures([point(1, 190.0), point(8, 1500.0)])
    assert one.value == 190.0
    assert many.value == pytest.approx(1500.0 / (8 * 190.0))
    assert many.goal is not None


def test_a_busy_group_proves_nothing() -> None:
    busy = point(64, 100.0, redis=GroupLoad(1, 0.95, 0.95))
    assert not busy.proves
    (_, figure) = figures([point(1, 190.0), busy])
    assert figure.goal is None
    assert "over 70%" in figure.name


def test_other_stages_are_not_held_against_linear() -> None:
    points = [point(1, 190.0), point(64, 900.0, "bulk 30/s a row")]
    assert [figure.name for figure in figures(points)] == ["1 worker"]


def test_jobs_end_at_all_times() -> None:
    plan = Plan(tokens=64)
    lengths = [plan.job(n, stream=True).max_tokens for n in range(127)]
    assert sorted(lengths) == list(range(1, 128))  # the mean is 64
    assert plan.job(1, stream=False).lane == "bulk"
    assert plan.job(1, stream=False).stream is False
