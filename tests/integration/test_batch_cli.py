"""`mlx-serving batch` as a person types it."""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from mlx_serving.cli.batch_view import Pace, report_rows
from mlx_serving.cli.main import app
from mlx_serving.producer.batch.objects import Batch, RequestCounts
from mlx_serving.producer.batch.registry import Report
from tests.support.bulk_files import check_simulated, read_jsonl, simulated_line, write_lines
from tests.support.worker_process import WorkerProcess

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import redis
    from typer.testing import Result

    from mlx_serving.common.redis.local import LocalRedis

    Run = Callable[..., Result]


@pytest.fixture
def run(local_redis: LocalRedis, redis_client: redis.Redis) -> Run:
    def invoke(*words: Any, exit_code: int = 0, stdin: str | None = None) -> Result:
        command = ["batch", *map(str, words), "--redis-url", local_redis.url]
        result = CliRunner().invoke(app, command, input=stdin)
        assert result.exit_code == exit_code, (result.stdout, result.stderr, result.exception)
        return result

    del redis_client
    return invoke


@contextmanager
def worker(local_redis: LocalRedis) -> Iterator[None]:
    """Serve from a process of its own, whose log is not the command's output."""
    with WorkerProcess(local_redis.url, "w", 1000.0) as process:
        process.serving()
        yield
        process.terminate()
        assert process.exit_status() == 0


def test_submit_watch_results_and_errors(run: Run, local_redis: LocalRedis, tmp_path: Path) -> None:
    lines: list[Any] = [simulated_line(i) for i in range(1, 31)]
    lines[4]["body"]["top_p"] = 7
    for line in lines:
        line["body"]["model"] = "gpt-4o-mini"
    path = write_lines(tmp_path / "in.jsonl", lines)
    with worker(local_redis):
        submitted = run("submit", path, "--model-map", "gpt-4o-mini=tally")
        batch_id = submitted.stdout.strip()
        assert "30 lines, 1 refused" in submitted.stderr
        assert "user (29)" in submitted.stderr
        assert "line 5: body.top_p" in submitted.stderr
        watched = run("watch", batch_id)
    assert "29 of 30 · 1 failed" in watched.stderr
    out = tmp_path / "out.jsonl"
    assert "29 lines" in run("results", batch_id, "-o", out).stderr
    expected = [i for i in range(1, 31) if i != 5]
    check_simulated(read_jsonl(out), expected)
    printed = [json.loads(line) for line in run("results").stdout.splitlines()]
    check_simulated(printed, expected)
    assert "body.top_p" in run("errors", batch_id).stdout
    (error,) = map(json.loads, run("errors", path, "--json").stdout.splitlines())
    assert (error["custom_id"], error["error"]["line"]) == ("r-5", 5)
    shown = json.loads(run("status", "--json").stdout)
    assert (shown["id"], shown["status"]) == (batch_id, "completed")
    assert run("resume", batch_id).stdout.strip() == "completed"
    assert run("cancel", batch_id).stdout.strip() == "completed"
    assert batch_id in run("list").stdout


def test_prompts_from_standard_input_and_wait(
    run: Run, local_redis: LocalRedis, tmp_path: Path
) -> None:
    folder = tmp_path / "batch"
    with worker(local_redis):
        run(
            "submit", "-", "--model", "tally", "--max-tokens", 2, "--folder", folder, "--wait",
            stdin='"one"\n{"prompt": "two", "custom_id": "b"}\n',
        )  # fmt: skip
    found = {line["custom_id"] for line in read_jsonl(folder / "output.jsonl")}
    assert found == {"line-1", "b"}


def test_resume_in_the_foreground(run: Run, local_redis: LocalRedis, tmp_path: Path) -> None:
    from mlx_serving.common.settings import load_settings
    from mlx_serving.producer.client import Client

    path = write_lines(tmp_path / "in.jsonl", map(simulated_line, range(1, 6)))
    batch = Client(settings=load_settings(redis__url=local_redis.url)).batches.submit(
        path, start=False
    )
    with worker(local_redis):
        assert run("resume", batch.id, "--foreground").stdout.strip() == "completed"


def test_cancel_ends_what_no_worker_takes(run: Run, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in.jsonl", map(simulated_line, range(1, 6)))
    run("submit", path)
    assert run("cancel").stdout.strip() == "cancelling"
    watched = run("watch", exit_code=1)
    assert "cancelled" in watched.stderr


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["submit", "nowhere.jsonl"], 1),
        (["submit", "-", "--model-map", "gpt"], 2),
        (["submit", "-", "--completion-window", "soon"], 1),
        (["status", "batch_none"], 1),
        (["results", "batch_none"], 1),
    ],
)
def test_wrong_words_are_answered_in_a_line(run: Run, words: list[str], code: int) -> None:
    result = run(*words, exit_code=code)
    assert "Traceback" not in result.stderr


def test_a_file_without_a_good_line_fails(run: Run, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in.jsonl", [{"prompt": 7}])
    failed = run("submit", path, "--json", exit_code=1)
    assert json.loads(failed.stdout)["status"] == "failed"


def test_pace_is_of_the_last_half_minute() -> None:
    pace = Pace()
    for second in range(101):
        pace.mark(float(second), second * 2 if second <= 50 else 100 + (second - 50) * 4)
    assert pace.per_second == 4.0
    assert pace.left(14_400 * 4) == "4:00:00"
    assert Pace.left(_marked(0, 0), 5) == "-:--:--"


def _marked(*ended: int) -> Pace:
    pace = Pace()
    for second, count in enumerate(ended):
        pace.mark(float(second), count)
    return pace


def test_a_batch_without_a_runner_says_so() -> None:
    batch = Batch(
        id="batch_1", input_file_id="x", created_at=1, status="in_progress",
        request_counts=RequestCounts(5, 1, 0),
    )  # fmt: skip
    rows = dict(report_rows(Report(batch=batch, folder="f", age_s=60.0)))
    assert rows["status"] == "in_progress, no runner"
