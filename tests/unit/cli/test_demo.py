"""The demo's parts without a worker: its jobs, its figures, its views."""

import io
import math
import os
import signal
from pathlib import Path

import pytest
from rich.console import Console

from mlx_serving.cli.demo.jobs import DEMO_JOBS, DemoJob
from mlx_serving.cli.demo.measure import Track, figures, percentile
from mlx_serving.cli.demo.process import DemoWorker, orderly_signals
from mlx_serving.cli.demo.run import describe, summary
from mlx_serving.cli.demo.view import LineView, TableView
from mlx_serving.common.events import ChoiceDelta, Event, end_event, reset_event, tokens_event
from mlx_serving.common.job.schema import GenerationJob
from mlx_serving.common.results import (
    ChoiceResult,
    FunctionResult,
    GenerationResult,
    ToolCallResult,
)
from mlx_serving.common.settings import load_settings
from mlx_serving.common.states import JobState
from mlx_serving.common.worker_record import WorkerRecord
from mlx_serving.worker.models.loading import EngineSpec


def _tokens(seq: int, text: str, count: int) -> Event:
    choices = [ChoiceDelta(0, text, list(range(count)))]
    return tokens_event(attempt=1, seq=seq, choices=choices)


def test_the_demo_has_eight_tasks_and_eight_settings() -> None:
    assert len(DEMO_JOBS) == 8
    assert len({job.name for job in DEMO_JOBS}) == 8
    assert len({job.settings for job in DEMO_JOBS}) == 8


@pytest.mark.parametrize("job", DEMO_JOBS, ids=lambda job: str(job.name))
def test_every_demo_job_is_one_that_a_client_takes(job: DemoJob) -> None:
    built = GenerationJob.build(**job.fields())
    assert built.queue == "tally:interactive"
    assert built.template_messages()[-1]["content"] == job.prompt


@pytest.mark.parametrize("job", DEMO_JOBS, ids=lambda job: str(job.name))
def test_only_the_right_answer_is_right(job: DemoJob) -> None:
    right = job.example.answer or " ".join(["0123456789"] * 6)
    assert job.is_right(right)
    assert not job.is_right(right[:-1])
    assert not job.is_right("")


def test_a_tools_reply_goes_into_the_next_turn() -> None:
    (job,) = [job for job in DEMO_JOBS if job.replies]
    call = ToolCallResult("c1", "function", FunctionResult("get_weather", '{"city": "Paris"}'))
    choice = ChoiceResult(index=0, tool_calls=[call], finish_reason="tool_calls")
    result = GenerationResult(id="j", state=JobState.FINISHED, choices=[choice])
    following = job.next_turn(result)
    assert following is not None
    messages = GenerationJob.build(**following).messages or ()
    assert [message.role for message in messages] == ["user", "assistant", "tool"]
    assert messages[2].tool_call_id == "c1"
    assert job.is_right('get_weather({"city": "Paris"}) → Paris: 21 degrees, clear')
    other = GenerationResult(id="j", state=JobState.FINISHED, choices=[ChoiceResult(index=0)])
    assert job.next_turn(other) is None


def test_a_track_measures_from_submit_to_each_delivery() -> None:
    track = Track(submitted_s=10.0)
    track.add(_tokens(1, "3", 1), 10.5)
    track.add(_tokens(2, " 4", 2), 10.6)
    track.add(end_event(attempt=1, seq=3, state="finished"), 10.9)
    assert (track.text, track.tokens, track.state) == ("3 4", 3, "finished")
    assert track.ttft_s == pytest.approx(0.5)
    ((gap, count),) = track.deliveries
    assert (round(gap, 6), count) == (0.1, 2)


def test_a_reset_takes_a_tracks_text_back() -> None:
    track = Track(submitted_s=10.0)
    for event in (_tokens(1, "3", 1), reset_event(), _tokens(1, "4", 1)):
        track.add(event, 10.5)
    assert track.text == "4"


def test_figures_count_each_token_of_a_delivery() -> None:
    fast, slow = Track(0.0), Track(0.0)
    for track, gap in ((fast, 0.1), (slow, 0.4)):
        track.add(_tokens(1, "a", 1), gap)
        track.add(_tokens(2, "b", 4), 2 * gap)
    total = figures([fast, slow])
    assert total.tokens == 10
    assert total.seconds == pytest.approx(0.8)
    assert total.tokens_per_second == pytest.approx(12.5)
    assert sorted(total.itl_s) == pytest.approx([0.025] * 4 + [0.1] * 4)
    assert total.gaps_s == pytest.approx([0.1, 0.4])


def test_figures_of_nothing_are_no_crash() -> None:
    assert figures([Track(0.0)]).tokens_per_second == 0.0
    assert "0 of 1 answers right" in summary([Track(0.0)], [False])


def test_percentile_is_the_nearest_rank() -> None:
    samples = [float(n) for n in range(1, 101)]
    assert percentile(samples, 0.5) == 50.0
    assert percentile(samples, 0.99) == 99.0
    assert percentile([7.0], 0.99) == 7.0
    assert math.isnan(percentile([], 0.5))


def test_lines_show_each_text_once_and_the_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    job, track = DEMO_JOBS[0], Track(0.0)
    view = LineView([job], [track])
    with view:
        for seq, text in enumerate(("3 4 5 6 ", "7 8 9 10 ", "11 12 13", " 14")):
            track.add(_tokens(seq, text, 1), 0.1)
            view.delivered(0, text)
        view.ended(0, right=False)
    lines = capsys.readouterr().out.splitlines()
    streamed = [line.partition("| ")[2] for line in lines if " | " in line]
    assert "".join(streamed) == "3 4 5 6 7 8 9 10 11 12 13 14"
    assert " = WRONG (greedy; 4 tokens" in lines[-1]


@pytest.mark.parametrize("width", [80, 140])
def test_the_table_shows_the_newest_text_at_any_width(width: int) -> None:
    tracks = [Track(0.0) for _ in DEMO_JOBS]
    tracks[0].add(_tokens(1, "x" * 500 + "\x1b[2Jnewest", 1), 0.2)
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    view = TableView(DEMO_JOBS, tracks, console)
    with view:
        view.ended(0, right=True)
    shown = console.file
    assert isinstance(shown, io.StringIO)
    text = shown.getvalue()
    assert "newest" in text
    assert "\x1b[2Jnewest" not in text
    assert "right" in text
    assert ("temperature=0.7" in text) == (width > 100)


def test_the_worker_is_described_with_device_and_acceleration() -> None:
    worker = WorkerRecord(
        name="w", model="tally", revision="abc", device="cpu: x",
        acceleration="detokenizer: twin (why)", kv_tokens_capacity=1000, pid=1,
    )  # fmt: skip
    line = describe(worker)
    assert "cpu: x" in line
    assert "detokenizer: twin (why)" in line


def test_a_signal_waits_until_the_worker_is_told_what_to_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    worker = DemoWorker(load_settings(), "tally", EngineSpec("simulated"), tmp_path / "log")
    told = []

    def start() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        told.append("all")

    monkeypatch.setattr(worker._process, "start", start)
    with orderly_signals(), pytest.raises(SystemExit) as ended:
        worker.start()
    assert (told, ended.value.code) == (["all"], 128 + signal.SIGTERM)
