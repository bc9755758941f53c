"""The command line as a user runs it: a worker in one terminal, `generate` in another."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import redis

from mlx_serving.common.protocol.keys import Keys
from mlx_serving.common.redis.local import LocalRedis
from mlx_serving.common.states import JobState
from mlx_serving.producer.client import Client
from tests.support.helpers import wait_until
from tests.support.paths import ROOT

COMMAND = [sys.executable, "-m", "mlx_serving"]
KEYS = Keys()


@contextmanager
def worker(server: LocalRedis, *options: str) -> Iterator[subprocess.Popen[str]]:
    """A worker that has registered; it must drain and exit 0."""
    process = subprocess.Popen(
        [*COMMAND, "worker", "--name", "w", "--redis-url", server.url, *options],
        stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    try:
        with server.client() as client:
            wait_until(lambda: client.exists(KEYS.worker("w")), timeout=60, what="a worker")
        yield process
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.communicate()


def generate(server: LocalRedis, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, "generate", "--redis-url", server.url, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip


@pytest.fixture
def server(local_redis: LocalRedis, redis_client: redis.Redis) -> LocalRedis:
    """An emptied Redis."""
    del redis_client
    return local_redis


def test_two_terminals_count(server: LocalRedis) -> None:
    with worker(server):
        process = generate(server, "--model", "tally", "count from 3 to 12", "-v")
        out, err = process.communicate(timeout=60)
        example = subprocess.run(
            [sys.executable, "examples/enqueue.py"], capture_output=True, text=True, check=True,
            cwd=ROOT, env=os.environ | {"MLX_SERVING_REDIS_URL": server.url},
        ).stdout  # fmt: skip
        status = subprocess.run(
            [*COMMAND, "status", "--redis-url", server.url], capture_output=True, text=True,
            check=True, cwd=ROOT,
        ).stdout  # fmt: skip
    assert (process.returncode, out) == (0, "3 4 5 6 7 8 9 10 11 12\n")
    assert example == out
    assert "finished (stop)" in err
    assert "worker w" in err
    assert "detokenizer: " in status


def _streaming(server: LocalRedis) -> tuple[subprocess.Popen[str], str]:
    """A job in the middle of its stream, and its id."""
    process = generate(server, "count from 0 to 999", "--max-tokens", "100000")
    assert process.stdout is not None
    assert process.stdout.read(1)
    with server.client() as client:
        (job_id,) = client.zrange(KEYS.open("tally:interactive"), 0, -1)
    return process, job_id.decode()


def test_ctrl_c_cancels_the_job(server: LocalRedis) -> None:
    with worker(server, "--engine", "simulated", "--tokens-per-second", "50"):
        process, job_id = _streaming(server)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
        with Client(server.url) as client:
            result = client.result(job_id, timeout=1)  # it had ended when the command did
    assert process.returncode == 130
    assert result.state is JobState.CANCELLED
    assert f"cancelling {job_id}" in err
    assert "Traceback" not in err


def test_ctrl_c_before_any_worker_cancels_the_queued_job(server: LocalRedis) -> None:
    process = generate(server, "hello")
    with server.client() as client:
        queue = KEYS.open("tally:interactive")
        (job_id,) = wait_until(lambda: client.zrange(queue, 0, -1), what="an enqueued job")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    with Client(server.url) as client:
        assert client.status(job_id.decode()).state is JobState.CANCELLED
    assert process.returncode == 130
    assert "Traceback" not in err


def test_a_job_that_nobody_takes_does_not_wait_in_silence(server: LocalRedis) -> None:
    process = generate(server, "--model", "tolly", "hello")
    assert process.stderr is not None
    said = process.stderr.readline()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert said.startswith("waits in tolly:interactive: ")
    assert "mlx-serving status" in said
    assert process.returncode == 130


def test_a_reader_that_goes_away_cancels_the_job(server: LocalRedis) -> None:
    with worker(server, "--engine", "simulated", "--tokens-per-second", "50"):
        process, job_id = _streaming(server)
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        with process.stderr:
            assert "Traceback" not in process.stderr.read()
        assert process.wait(20) != 0
        with Client(server.url) as client:
            wait_until(lambda: client.status(job_id).state is JobState.CANCELLED)
