"""Work beside the engine thread: its turns go on, and what it ends with arrives."""

from __future__ import annotations

import threading

import pytest

from mlx_serving.worker.engine.in_thread import in_thread
from mlx_serving.worker.models.loading import finish


def test_it_yields_until_the_work_is_done() -> None:
    gate = threading.Event()
    work = in_thread(lambda: (gate.wait(10), threading.current_thread().name)[1])
    for _ in range(5):
        next(work)
    gate.set()
    assert finish(work).startswith("loading")


def test_what_it_raises_arrives() -> None:
    def fail() -> None:
        raise FileNotFoundError("gone")

    with pytest.raises(FileNotFoundError, match="gone"):
        finish(in_thread(fail))
