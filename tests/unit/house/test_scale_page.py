"""The page on scale computes from its own figures, and names tests and commands that there are."""

from __future__ import annotations

import re

import pytest

from benchmarks.studies.capacity import (
    FLUSH_SECONDS,
    Cost,
    Mac,
    commits_a_row,
    events_a_row,
    table,
)
from mlx_serving.common.settings import Settings
from mlx_serving.worker.delivery.holdings import BULK_SECONDS, BULK_TOKENS
from tests.support.paths import ROOT
from tests.support.publisher_bench import Bench

PAGE = (ROOT / "docs" / "explanation" / "scale.md").read_text()
COSTS = re.compile(r"a worker ([\d.]+)% of a core; an event ([\d.]+) µs; a bulk commit ([\d.]+) µs")


def test_the_table_is_what_the_figures_give() -> None:
    found = COSTS.search(PAGE)
    assert found is not None
    worker, event, commit = map(float, found.groups())
    cost = Cost(worker / 100, event / 1e6, commit / 1e6)
    assert "\n".join(table(cost)) in PAGE


def test_tests_that_the_page_names_exist() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", PAGE)
    assert named
    assert [name for name in named if f"def {name}(" not in sources] == []


def test_the_model_flushes_as_the_worker_does() -> None:
    interval = Settings().worker.flush_interval_ms / 1000
    assert interval == FLUSH_SECONDS
    for rate in (5.0, 99.0, 149.0, 151.0, 240.0, 260.0):
        worker = Bench(flush_seconds=interval).publisher
        flushes = 0
        for step in range(121):
            worker._pace(100 + step / rate)
            flushes, worker._due = flushes + worker._due, False
        assert (flushes - 1) / 120 * rate == pytest.approx(events_a_row(rate))
    assert commits_a_row(1.0) == 1.0
    assert commits_a_row(20.0) == 1 / BULK_SECONDS
    assert commits_a_row(100.0) == 100.0 / BULK_TOKENS


def test_costs_are_fitted_from_the_stages() -> None:
    """Made from known costs: 0.2% a worker, 30 µs an event, 20 µs a bulk commit."""

    def stage(workers: int, events: float, share: float, tokens: float = 0.0) -> dict[str, object]:
        return {
            "name": "x", "workers": workers, "events": events, "tokens": tokens or events,
            "streams": 64 * workers, "loads": {"redis": {"share": share}},
        }  # fmt: skip

    shapes = [(1, 192.0), (64, 12_288.0), (64, 24_000.0)]
    streams = [stage(n, e, 0.002 * n + 30e-6 * e) for n, e in shapes]
    bulk = stage(64, 0.0, 0.002 * 64 + 20e-6 * 64 * 64 * 2, tokens=64 * 64 * 20.0)
    cost = Cost.fit([*streams, bulk])
    assert cost.per_worker == pytest.approx(0.002)
    assert cost.per_event == pytest.approx(30e-6)
    assert cost.per_commit == pytest.approx(20e-6)
    assert Mac(100, 10).streams_load(cost) == pytest.approx(0.002 + 100 * 30e-6)
