"""The benchmarks run and say something plausible; what they say is not judged here."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.__main__ import BENCHMARKS, chosen
from benchmarks.contract.dispatch import figures as dispatch_figures
from benchmarks.contract.latency import Samples
from benchmarks.contract.latency import figures as latency_figures
from benchmarks.contract.streaming import Run
from benchmarks.contract.streaming import figures as streaming_figures
from benchmarks.lib.harness import Figure, Goal
from benchmarks.peers.streams import Bout, Heard, Pass, requests
from benchmarks.peers.streams import figures as server_figures
from benchmarks.studies import affinity
from benchmarks.studies.job_cost import PHASES
from benchmarks.studies.job_cost import measure as job_cost
from benchmarks.studies.timeline import Stopwatches, shares
from tests.support.paths import ROOT

if TYPE_CHECKING:
    from pathlib import Path


def by_name(figures: list[Figure]) -> dict[str, Figure]:
    return {figure.name: figure for figure in figures}


def quick_run(path: Path, only: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks", "--quick", "--only", only]
    done = subprocess.run(
        [*command, "--output", str(path)], cwd=ROOT, check=True, capture_output=True, text=True,
        timeout=110,
    )  # fmt: skip
    written: dict[str, Any] = json.loads(path.read_text())
    for figures in written["benchmarks"].values():
        assert all(figure["name"] in done.stdout for figure in figures)
    return written


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a quick run of the queue's benchmarks writes."""
    return quick_run(tmp_path_factory.mktemp("benchmarks") / "report.json", "p4,p6,p7")


def test_peers_run_beside_the_engine(tmp_path: Path) -> None:
    report = quick_run(tmp_path / "report.json", "churn,ragged,server,timeline")["benchmarks"]
    figures = {figure["name"]: figure for some in report.values() for figure in some}
    assert all(figure["value"] > 0 for name, figure in figures.items() if "cold" not in name)
    gated = {name for name, figure in figures.items() if figure["goal"]}
    assert gated == {
        "one setting: engine over BatchGenerator",
        "engine, one row of 600: step over all short",
        "engine, one row of 600: peak allocated over live",
    }


def test_a_quick_run_writes_every_figure(report: dict[str, Any]) -> None:
    assert report["quick"] is True
    assert set(report["benchmarks"]) == {BENCHMARKS[name][0] for name in ("p4", "p6", "p7")}
    for figures in report["benchmarks"].values():
        assert all(figure["value"] > 0 and figure["rounds"] for figure in figures)


def test_goals_are_judged(report: dict[str, Any]) -> None:
    gated = [f for figures in report["benchmarks"].values() for f in figures if f["goal"]]
    assert [f["name"][:2] for f in gated] == ["P4", "P4", "P6", "P6", "P7"]
    assert all(isinstance(f["met"], bool) for f in gated)


def test_every_stream_arrives_whole(report: dict[str, Any]) -> None:
    figures = {f["name"]: f["value"] for f in report["benchmarks"][BENCHMARKS["p4"][0]]}
    assert figures["streams equal to in-process, token by token"] == 8


def test_a_job_is_started_before_its_first_event(report: dict[str, Any]) -> None:
    figures = {f["name"]: f["value"] for f in report["benchmarks"][BENCHMARKS["p7"][0]]}
    assert figures["enqueue → started, p50"] < figures["enqueue → first event, p50"]


def test_dispatch_ratios_are_taken_within_a_round() -> None:
    speeds = {"ours": [10.0, 40.0, 30.0], "simple": [1.0, 2.0, 3.0], "bare": [20.0, 80.0, 100.0]}
    figures = by_name(dispatch_figures(speeds))
    assert figures["P6 worker over SimpleWorker"].rounds == (10.0, 20.0, 10.0)
    assert figures["P6 worker over SimpleWorker"].value == 10.0
    assert figures["P6 worker over bare BLMPOP"].value == 0.5


def test_a_job_costs_something_in_each_phase() -> None:
    figures = by_name(job_cost(jobs=64, rounds=1))
    phases = [figures[f"{phase}, p50"].value for phase in PHASES]
    assert min(phases) > 0
    assert figures["all, p50"].value > max(phases)


def test_latency_compares_medians_of_a_round() -> None:
    rounds = [Samples([10.0, 20.0, 900.0], [40.0, 60.0, 80.0], [100.0, 100.0, 100.0])]
    figures = by_name(latency_figures(rounds))
    assert figures["P7 started over bare, p50"].value == 3.0
    assert figures["first event over bare, p50"].value == 5.0


def test_streaming_counts_tokens_between_the_first_and_the_last_arrival() -> None:
    bare = Run(arrivals=[[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]], tokens=[[1, 2, 3], [4, 5, 6]])
    streams = Run(arrivals=[[10.0, 14.0], [10.0, 11.0, 12.0]], tokens=[[1, 2, 3], [4, 5, 7]])
    figures = by_name(streaming_figures([(bare, streams)]))
    assert figures["in-process engine"].value == 3.0
    assert figures["P4 through Redis over in-process"].value == 0.5
    assert figures["streams equal to in-process, token by token"].value == 1
    assert figures["P4 inter-token gap, p99 in steps"].value == pytest.approx(3.94)


def heard(first: float, last: float, tokens: int) -> Heard:
    return Heard(asked=0.0, first=first, last=last, tokens=tokens)


def test_a_server_is_compared_within_a_round() -> None:
    ours, theirs = Pass([heard(1, 2, 10), heard(1, 4, 30)]), Pass([heard(4, 5, 8), heard(4, 8, 12)])
    cold = Pass([heard(1, 14, 40)])
    figures = by_name(server_figures(Bout(1, (ours, cold), (ours, ours), [(ours, theirs)] * 3)))
    assert figures["1 setting: through Redis"].value == 10.0
    assert figures["1 setting: tokens/s over mlx_lm.server"].value == 4.0
    assert figures["1 setting: tokens/s over mlx_lm.server"].goal == Goal("≥", 1.3)
    assert figures["1 setting: TTFT p50 over mlx_lm.server"].value == 0.25
    assert figures["1 setting: cold cost, mlx_lm.server"].value == 10.0


@pytest.mark.parametrize("settings", [0, 1, 8])
def test_streams_share_as_many_settings_as_asked(settings: int) -> None:
    asked = requests(64, 16, settings, 0)
    pairs = {(fields["temperature"], fields.get("top_p")) for fields in asked}
    assert len(pairs) == max(settings, 1)
    assert len({fields["prompt"] for fields in asked}) == 64
    assert not any("seed" in fields for fields in asked)


def test_a_stopwatch_sums_calls_until_its_lap() -> None:
    watches = Stopwatches()
    double = watches.around(lambda value: 2 * value, "double")
    assert [double(1), double(2)] == [2, 4]
    assert watches.lap()["double"] > 0
    assert watches.lap() == {}


def test_a_threads_share_is_of_the_samples_that_hold_the_interpreter() -> None:
    raw = (
        "thread (1): engine;step;decode 30\nthread (1): engine;step 30\nthread (2): publisher 20\n"
    )
    figures = by_name(shares(raw))
    assert figures["samples that hold the interpreter lock"].value == 80
    assert figures["of them: engine"].value == 0.75


def test_what_chats_computed_is_what_no_cache_gave() -> None:
    turns = [
        affinity.Turn(0, first=0.3, queued=0.001, prompt=100, cached=0),
        affinity.Turn(1, first=0.1, queued=0.150, prompt=200, cached=150),
        affinity.Turn(2, first=0.2, queued=0.002, prompt=300, cached=250),
    ]
    figures = by_name(affinity.figures("on", [turns]))
    assert figures["on: computed"].value == 200
    assert figures["on: prompt tokens found"].value == pytest.approx(400 / 600)
    assert figures["on: prompt tokens found, later"].value == pytest.approx(400 / 500)
    assert figures["on: TTFT p50"].value == pytest.approx(200)
    assert figures["on: TTFT p50 later"].value == pytest.approx(150)
    assert figures["on: queued p50"].value == pytest.approx(2)


def test_a_figure_is_read_back_as_it_was_written() -> None:
    figure = Figure.median("P9", [1.0, 2.0, 4.0], "×", Goal("≥", 1.3))
    assert Figure.from_json(json.loads(json.dumps(figure.as_json()))) == figure


def test_a_goal_is_met_at_its_bound() -> None:
    assert Goal("≥", 8).met_by(8.0)
    assert not Goal("≥", 8).met_by(7.99)
    assert Goal("≤", 4).met_by(4.0)
    assert not Goal("≤", 4).met_by(4.01)


def test_benchmarks_are_chosen_by_name_or_number() -> None:
    assert chosen("") == list(BENCHMARKS)
    assert chosen("P6, p1,p2") == ["p6", "engine"]
    with pytest.raises(ValueError, match="no benchmark p9"):
        chosen("p6,p9")
