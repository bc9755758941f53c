"""The scale benchmark runs on real workers, and what it counts adds up."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.studies.redis_ceiling import ceilings
from tests.support.paths import ROOT

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.quiet  # a row that ended gives its place away before its end is written
@pytest.mark.slow
def test_a_small_fleet(tmp_path: Path) -> None:
    output = tmp_path / "scale.json"
    command = [
        sys.executable, "-m", "benchmarks.contract.scale", "--workers", "1,2", "--rows", "4",
        "--rate", "20", "--tokens", "10", "--bulk-tokens", "10", "--queued", "200", "--hosts", "2",
        "--consumers", "1", "--seconds", "2", "--bulk", "20", "--durable", "--output", str(output),
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=110
    )
    report: dict[str, Any] = json.loads(output.read_text())
    points = report["points"]
    assert [p["workers"] for p in points] == [1, 2, 2, 2]
    for point in points:
        assert 0.3 * point["offered"] < point["tokens"] < 1.2 * point["offered"]
        assert 0 < point["streams"] <= 4 * point["workers"]
        assert set(point["loads"]) == {"redis", "workers", "consumers"}
        assert point["commands"] > point["scripts"] > 0
    streamed, bulk = points[1], points[-1]
    assert streamed["events"] == pytest.approx(streamed["tokens"], rel=0.2)
    assert bulk["bytes_out"] < streamed["bytes_out"]  # nothing is published
    assert "P8 2 workers over linear" in done.stdout
    capacity = [sys.executable, "-m", "benchmarks.studies.capacity", str(output)]
    told = subprocess.run(capacity, cwd=ROOT, check=True, capture_output=True, text=True)
    assert "| a Mac | streams live | bulk |" in told.stdout


def test_redis_benchmark_runs_the_real_scripts() -> None:
    figures = {f.name: f.value for f in ceilings(rows=5, jobs=320, running=2000)}
    assert len(figures) == 5
    assert min(figures.values()) > 0
    rows, written = (
        figures["commit, 5 rows a call, rows"],
        figures["commit, 5 rows a call, written"],
    )
    assert 0.7 * rows < written <= rows  # most were new, each was written once
