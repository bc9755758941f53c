"""`mlx-serving top` on a real fleet: as the monitor user, on a terminal and into a pipe."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from mlx_serving.common.redis.local import LocalRedis
from mlx_serving.common.settings import load_settings
from mlx_serving.producer.client import Client
from tests.support.helpers import wait_until
from tests.support.paths import ROOT
from tests.support.redis_users import as_user
from tests.support.worker_process import InProcessWorker

if TYPE_CHECKING:
    from collections.abc import Iterator

USERS = ROOT / "ops" / "redis" / "users.acl"
TOP = [sys.executable, "-m", "mlx_serving", "top", "--interval", "0.2"]


@pytest.fixture(scope="module")
def server() -> Iterator[LocalRedis]:
    """A Redis with the monitor user, and a worker that runs three jobs of ten seconds."""
    monitor = next(u for u in USERS.read_text().splitlines() if u.startswith("user monitor"))
    with LocalRedis() as server, server.client() as client:
        client.execute_command("ACL", "SETUSER", "monitor", *monitor.split()[2:])
        with (
            InProcessWorker(server.url, "studio", rate=50.0),
            Client(settings=load_settings(redis__url=server.url)) as producer,
        ):
            job = {"model": "tally", "prompt": "x", "max_tokens": 5000}
            handles = producer.submit_many([job] * 3)
            wait_until(lambda: client.hget("mlxs:worker:studio", "rows") == b"3")
            yield server
            for handle in handles:
                handle.cancel()


@pytest.fixture
def environment(server: LocalRedis) -> dict[str, str]:
    return {
        **os.environ, "MLX_SERVING_REDIS_URL": as_user(server.url, "monitor"), "TERM": "xterm",
        "MLX_SERVING_REDIS_PASSWORD": "change-me-monitor",
        "COLUMNS": "140", "LINES": "30",
    }  # fmt: skip


def test_a_pipe_gets_lines(environment: dict[str, str]) -> None:
    done = subprocess.run([*TOP, "--count", "2"], env=environment, capture_output=True, text=True,
                          check=True, timeout=30)  # fmt: skip
    written = done.stdout.splitlines()
    assert (
        len([line for line in written if " 1 workers, rows 3/32, 0 queued, 3 running" in line]) == 2
    )
    assert len([line for line in written if line.startswith("worker studio tally: serving")]) == 2
    assert len([line for line in written if line.startswith("queue tally:default: 0 queued")]) == 2


def test_json_is_an_object_a_line(environment: dict[str, str]) -> None:
    done = subprocess.run([*TOP, "--count", "2", "--json"], env=environment, capture_output=True,
                          text=True, check=True, timeout=30)  # fmt: skip
    first, second = map(json.loads, done.stdout.splitlines())
    assert first["totals"]["rows"] == second["totals"]["rows"] == 3
    (worker,) = second["workers"]
    assert (worker["name"], worker["state"], worker["device"]) == ("studio", "serving", "simulated")
    assert worker["lease_age_ms"] < 5000
    assert worker["memory_bytes"] > 0
    assert second["queues"][0]["oldest_seconds"] > 0


def test_a_terminal_gets_a_table_and_q_ends_it(environment: dict[str, str]) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(TOP, env=environment, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    try:
        text = _read_until(ours, "studio", times=2)
        assert "3/32" in text
        assert "1 workers" in text
        os.write(ours, b"q")
        _read_until(ours, "", times=0)
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def _read_until(terminal: int, word: str, *, times: int) -> str:
    """What the terminal shows until a word came so often; with '', until it closes."""
    text, deadline = "", time.monotonic() + 20
    while not word or text.count(word) < times:
        assert time.monotonic() < deadline, text
        try:
            piece = os.read(terminal, 65_536)
        except OSError:  # Linux's end of a pty
            piece = b""
        if not piece:
            break
        text += piece.decode(errors="replace")
    return text
