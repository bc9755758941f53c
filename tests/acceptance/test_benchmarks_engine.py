"""The engine's benchmark measures rows that are there, at any batch size and number of steps."""

import json
import sys
from pathlib import Path
from typing import Any, cast

import pytest

from benchmarks.contract import engine as benchmark
from benchmarks.lib.synthetic import build_model
from mlx_serving.worker.engine.kv.choice import choose_cache
from mlx_serving.worker.engine.kv.paged.cache import PagedCache
from mlx_serving.worker.engine.model_runner import ModelRunner


def test_the_published_command_runs_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = tmp_path / "engine.json"
    flags = ["--shape", "tiny", "--dtype", "float32", "--batch", "64", "--steps", "100"]
    monkeypatch.setattr(sys, "argv", ["engine", *flags, "--no-peer", "--output", str(report)])
    monkeypatch.setattr(benchmark, "copy_bandwidth", lambda: 1e9)  # two seconds of copies
    benchmark.main()
    figures = json.loads(report.read_text())
    for name in ("P1_greedy_over_bare", "P2_mixed_over_bare", "P3_first_over_steady"):
        assert figures[f"{name}[64]"] > 0


@pytest.mark.parametrize(("batch", "steps"), [(64, 1), (3, 10_000)])
def test_rows_fit_and_last_for_every_swap_of_settings(
    batch: int, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On blocks, as on a GPU: pools that grew beside each step made every swap be taken again."""
    monkeypatch.setattr(
        benchmark,
        "ModelRunner",
        lambda model: ModelRunner(model, choose_cache(model, kind="paged")),
    )
    model = build_model()
    case = benchmark.Case(model, model, 300, batch, steps)
    engine = benchmark.start_engine(case, [benchmark.GREEDY] * batch)
    runner = cast("Any", engine._runner)
    assert isinstance(runner._cache, PagedCache)
    benchmark._grow_pools(runner)
    before = runner.kv_bytes
    for _ in range(10 * benchmark.SWAPS_A_ROUND * 5):
        assert len(engine.step()) == batch
        assert runner.kv_bytes == before, "a swap beside this step would not count"
    assert runner._rows[0].request.max_tokens >= 3 * steps
