"""However `generate` is ended, it leaves no job: by a signal, a closed terminal, a closed pipe."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mlx_serving.cli.canceller import AGAIN_SECONDS, END_SECONDS
from mlx_serving.common.protocol.fields import JobField
from mlx_serving.common.protocol.keys import Keys
from mlx_serving.common.states import JobState
from mlx_serving.producer.client import Client
from tests.support.helpers import wait_until
from tests.support.lossy_proxy import LossyProxy, calls_of
from tests.support.paths import ROOT
from tests.support.scripted_worker import ScriptedWorker

if TYPE_CHECKING:
    from collections.abc import Iterator

    import redis

    from mlx_serving.common.redis.local import LocalRedis
    from tests.support.scripted_worker import Row

KEYS = Keys()
COMMAND = [sys.executable, "-m", "mlx_serving", "generate", "count from 0 to 999"]
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Makes its standard input the controlling terminal, as a terminal window does for its shell.
IN_TERMINAL = (
    "import fcntl, os, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "os.execv(sys.argv[1], sys.argv[1:])"
)


@pytest.fixture
def client(local_redis: LocalRedis, redis_client: redis.Redis) -> Iterator[Client]:
    del redis_client
    with Client(local_redis.url) as client:
        yield client


@pytest.fixture
def proxy(local_redis: LocalRedis, client: Client) -> Iterator[LossyProxy]:
    client.cancel(client.submit(model="tally", prompt="1").id)  # Redis has both scripts
    with LossyProxy(Path(local_redis.url.removeprefix("unix://").partition("?")[0])) as proxy:
        yield proxy


def start(
    client: Client,
    *before: str,
    out: int = subprocess.PIPE,
    stdin: int | None = None,
    url: str = "",
) -> subprocess.Popen[bytes]:
    environment = os.environ | {"MLX_SERVING_REDIS_URL": url or client.endpoint.url}
    return subprocess.Popen(
        [*before, *COMMAND], stdin=stdin, stdout=out, stderr=out, cwd=ROOT, env=environment
    )


def enqueued(client: Client) -> str:
    queue = KEYS.open("tally:interactive")
    ids: list[Any] = wait_until(lambda: client._redis.zrange(queue, 0, 0), timeout=60, what="a job")
    return bytes(ids[0]).decode()


def running(client: Client) -> Row:
    """Claim the job and say a word that its command has read."""
    job_id = enqueued(client)
    wait_until(lambda: client._redis.pubsub_numsub(KEYS.channel(job_id))[0][1] == 1, timeout=60)
    worker = ScriptedWorker(client._redis, client.keys)
    (row,) = worker.claim(queues=["tally:interactive"])
    row.attempt()
    row.say("0 ")
    return row


def say_and_look(row: Row) -> bool:
    """Say a word; whether the worker was told to end the job."""
    row.say("1 ")
    return bool(row.cancel_reason)


def end_when_cancelled(client: Client, row: Row) -> None:
    """Wait, as a worker does, until the job was told to end; say words meanwhile."""
    job_id = row.job.job_id
    reason = wait_until(lambda: client.status(job_id).cancel_reason, timeout=30, what="a cancel")
    assert reason == "cancelled_by_client"
    row.end(JobState.CANCELLED, "cancelled")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_cancels_a_queued_job(client: Client, number: signal.Signals) -> None:
    process = start(client)
    job_id = enqueued(client)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert b"Traceback" not in err
    assert client.status(job_id).state is JobState.CANCELLED


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_cancels_a_running_job(client: Client, number: signal.Signals) -> None:
    process = start(client)
    row = running(client)
    process.send_signal(number)
    end_when_cancelled(client, row)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert b"Traceback" not in err


def test_a_hangup_that_comes_twice_cancels_all_the_same(client: Client) -> None:
    process = start(client)
    row = running(client)
    for _ in range(5):
        process.send_signal(signal.SIGHUP)
    end_when_cancelled(client, row)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGHUP


@pytest.mark.parametrize("gap_s", [0.0, 0.01, 0.1])
def test_a_second_interrupt_leaves_once_the_cancel_is_sent(client: Client, gap_s: float) -> None:
    """A wrapper that forwards a Ctrl-C, which the terminal sent to the group, makes two."""
    process = start(client)
    row = running(client)
    process.send_signal(signal.SIGINT)
    time.sleep(gap_s)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert client.status(row.job.job_id).cancel_reason == "cancelled_by_client"
    assert process.returncode == 128 + signal.SIGINT
    assert b"Traceback" not in err


@pytest.mark.parametrize("numbers", [[signal.SIGINT] * 2, [signal.SIGTERM], [signal.SIGHUP], []])
def test_a_job_whose_enqueue_got_no_answer_is_cancelled(
    client: Client, proxy: LossyProxy, numbers: list[signal.Signals]
) -> None:
    """Redis ran it, and the command can't know. Without a signal, it fails."""
    proxy.lose_reply_to(calls_of("enqueue"), times=99, silently=bool(numbers))
    process = start(client, url=proxy.url)
    job_id = enqueued(client)
    wait_until(lambda: proxy.lost, timeout=30)
    for number in numbers:
        process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert client.status(job_id).state is JobState.CANCELLED
    assert process.returncode == (128 + numbers[0] if numbers else 1)
    assert b"Traceback" not in err
    assert numbers or b"queue_unavailable" in err


@pytest.mark.parametrize("number", SIGNALS)
def test_a_dead_worker_does_not_hold_a_command_that_was_told_to_end(
    client: Client, number: signal.Signals
) -> None:
    process = start(client)
    row = running(client)
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert client.status(row.job.job_id).cancel_reason == "cancelled_by_client"


def test_a_second_sigterm_does_not_wait_for_the_end_of_a_cancelled_job(client: Client) -> None:
    process = start(client)
    row = running(client)
    process.send_signal(signal.SIGTERM)
    wait_until(lambda: client.status(row.job.job_id).cancel_reason, timeout=30)
    time.sleep(AGAIN_SECONDS)
    process.send_signal(signal.SIGTERM)
    began_s = time.monotonic()
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert time.monotonic() - began_s < END_SECONDS - AGAIN_SECONDS - 1


def test_a_cancel_that_redis_refuses_holds_nobody(client: Client) -> None:
    process = start(client)
    row = running(client)
    user = client._redis.acl_whoami()
    try:
        client._redis.execute_command("ACL", "SETUSER", user, "-evalsha", "-eval")
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=30)
    finally:
        client._redis.execute_command("ACL", "SETUSER", user, "+@all")
    row.end()
    assert process.returncode == 128 + signal.SIGTERM
    assert b"not cancelled: redis_no_permission: " in err


@pytest.mark.parametrize("numbers", [[signal.SIGTERM], [signal.SIGINT] * 2])
def test_a_silent_redis_holds_nobody(
    client: Client, proxy: LossyProxy, numbers: list[signal.Signals]
) -> None:
    process = start(client, url=proxy.url)
    row = running(client)
    with proxy.blackhole():
        for number in numbers:
            process.send_signal(number)
        process.communicate(timeout=30)
    row.end()
    assert process.returncode == 128 + numbers[0]


def test_nohup_is_obeyed(client: Client) -> None:
    process = start(client, "nohup")
    row = running(client)
    process.send_signal(signal.SIGHUP)
    row.say("1")
    row.end()
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, b"0 1\n")


@pytest.mark.parametrize("controlling", [True, False])
def test_a_closed_terminal_cancels(client: Client, *, controlling: bool) -> None:
    """With a hangup if it was the controlling terminal; by failing writes if it was not."""
    ours, theirs = os.openpty()
    before = (sys.executable, "-c", IN_TERMINAL) if controlling else ()
    process = start(client, *before, out=theirs, stdin=theirs)
    os.close(theirs)
    row = running(client)
    assert os.read(ours, 1)
    os.close(ours)
    if not controlling:
        row.say("1 ")
    end_when_cancelled(client, row)
    assert process.wait(60) == (128 + signal.SIGHUP if controlling else 1)


def test_a_reader_that_has_enough_cancels(client: Client) -> None:
    process = start(client, "sh", "-c", '"$@" | head -c 1', "sh")
    row = running(client)
    assert process.stdout is not None
    assert process.stdout.read(1) == b"0"  # head leaves
    wait_until(lambda: say_and_look(row), timeout=30)
    end_when_cancelled(client, row)
    _, err = process.communicate(timeout=60)
    assert b"Traceback" not in err


def test_what_can_t_be_caught_is_bounded(client: Client) -> None:
    process = start(client)
    job_id = enqueued(client)
    process.kill()
    process.communicate(timeout=60)
    abandon_ms = client._redis.hget(KEYS.job(job_id), JobField.ABANDON_MS)
    assert abandon_ms == b"30000"
    client.cancel(job_id)
