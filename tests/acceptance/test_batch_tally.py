"""Bulk files through two workers with Tally, while feeder, collector and workers are killed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mlx_serving.common.settings import load_settings
from mlx_serving.producer.client import Client
from tests.chaos.bulk import run
from tests.support.bulk_files import text_of
from tests.support.figures import show
from tests.support.paths import ROOT
from tests.support.worker_process import WorkerProcess

if TYPE_CHECKING:
    import redis

    from mlx_serving.common.redis.local import LocalRedis


def test_every_line_is_answered_once_and_right_under_three_kills() -> None:
    report = run(360, 3, small=True)
    show(str(report))
    assert report.problems == []
    assert report.kills.total() == 3


@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_ten_thousand_lines_under_ten_kills() -> None:
    report = run(10_000, 10)
    show(str(report))
    assert report.problems == []
    assert report.kills.total() == 10
    assert report.rss_growth < 0.05


def test_the_example_of_the_bulk_page(
    local_redis: LocalRedis, redis_client: redis.Redis, tmp_path: Path
) -> None:
    path = Path(shutil.copy(ROOT / "examples" / "requests.jsonl", tmp_path))
    batches = Client(settings=load_settings(redis__url=local_redis.url)).batches
    with WorkerProcess(local_redis.url, "w", None) as worker:
        worker.serving()
        batch = batches.submit(path, model_map={"gpt-4o-mini": "tally"})
        assert batches.wait(batch.id, timeout=60).status == "completed"
    answers = {line["custom_id"]: text_of(line) for line in batches.results(batch.id)}
    assert answers == {
        "count": "3 4 5 6 7 8 9 10 11 12",
        "sort": "7 15 42 58 93",
        "reverse": "teiuq",
        "echo": "Grüße 東京 🎲 42!",
        "json": '{"name": "Ann", "age": 34, "city": "Oslo"}',
    }
    (error,) = batches.errors(batch.id)
    assert (error["custom_id"], error["error"]["param"]) == ("refused", "body.reasoning_effort")
    redis_client.flushall()
