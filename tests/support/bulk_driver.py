"""Runs bulk files in the test's own process, and lets their runner die."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from mlx_serving.producer.batch import runner as runner_module
from mlx_serving.producer.batch import window_clock
from mlx_serving.producer.batch.runner import BulkRunner
from tests.support.bulk_files import read_jsonl, simulated_line, write_lines

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import redis

    from mlx_serving.producer.batch.api import Batches
    from mlx_serving.producer.batch.objects import Batch

QUEUE = "tally:bulk"


class Crash(Exception):  # noqa: N818 -- it is what happens
    """Stands in for a SIGKILL of the runner."""


def make_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runners write down and look more often."""
    monkeypatch.setattr(runner_module, "SYNC_SECONDS", 0.1)
    monkeypatch.setattr(runner_module, "SHORTEST_PAUSE", 0.01)
    monkeypatch.setattr(window_clock, "AGREE_SECONDS", 0.5)


def submitted(batches: Batches, tmp_path: Path, count: int, **options: Any) -> Batch:
    path = write_lines(tmp_path / "in.jsonl", map(simulated_line, range(1, count + 1)))
    return batches.submit(path, start=False, **options)


def output(batches: Batches, batch: Batch) -> list[dict[str, Any]]:
    return read_jsonl(batches.folder(batch.id).output)


def errors(batches: Batches, batch: Batch) -> list[dict[str, Any]]:
    return read_jsonl(batches.folder(batch.id).errors)


def job_keys(client: redis.Redis) -> list[bytes]:
    patterns = ("mlxs:job:*", "mlxs:ev:*", "rq:job:*", "rq:results:*")
    return [key for pattern in patterns for key in client.scan_iter(pattern)]


@contextmanager
def running(batches: Batches, batch: Batch) -> Iterator[list[Batch]]:
    """Run a batch in a thread; the list holds the batch once it has ended."""
    ended: list[Batch] = []
    thread = threading.Thread(target=lambda: ended.append(batches.run(batch.id)))
    thread.start()
    try:
        yield ended
    finally:
        thread.join(30)
    assert ended


def run_and_crash(batches: Batches, batch: Batch, turn: int, *, before: bool = False) -> None:
    """Run a batch until the runner dies in its nth turn, before or after what the turn does."""
    turns = iter(range(1, 1 << 30))
    real = BulkRunner._turn

    def dying(self: BulkRunner, results: Any) -> int:
        last = next(turns) == turn
        if last and before:
            raise Crash
        moved = real(self, results)
        if last:
            raise Crash
        return moved

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BulkRunner, "_turn", dying)
        with pytest.raises(Crash):
            batches.run(batch.id)
