"""Crashes and zombies (D1 to D6): kill -9, SIGSTOP, Redis away; nothing lost or doubled."""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING

import pytest

from mlx_serving.common.redis.local import LocalRedis
from tests.support.helpers import wait_until
from tests.support.worker_process import (
    LEASE_SECONDS,
    WorkerProcess,
    check_answers,
    decoded,
    job_events,
    submit,
    wait_until_decoded,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlx_serving import Client
    from mlx_serving.producer.handles import JobHandle

JOBS = 32


@pytest.fixture
def server() -> Iterator[LocalRedis]:
    with LocalRedis(appendonly="always") as server:
        yield server


def attempts(client: Client, handles: list[JobHandle]) -> list[int]:
    return [
        sum(event.type == "attempt" for event in job_events(client, handle.id))
        for handle in handles
    ]


def test_kill_9_of_a_worker_with_32_running_jobs(server: LocalRedis, client: Client) -> None:
    tokens = 150
    with WorkerProcess(server.url, "first", rate=20) as first:
        first.serving()
        handles = submit(client, JOBS, tokens)
        wait_until_decoded(client, handles, 5)
        with WorkerProcess(server.url, "second", rate=200) as second:
            second.serving()
            first.signal(signal.SIGKILL)
            time.monotonic()
            check_answers(client, handles, tokens)
            assert attempts(client, handles) == [2] * JOBS
            assert {client.status(h.id).attempts for h in handles} == {0}  # nobody is charged


def test_a_zombie_that_wakes_after_the_takeover_writes_nothing(
    server: LocalRedis, client: Client
) -> None:
    tokens = 120
    with WorkerProcess(server.url, "first", rate=50) as first:
        first.serving()
        handles = submit(client, 8, tokens)
        wait_until_decoded(client, handles, 5)
        first.signal(signal.SIGSTOP)
        with WorkerProcess(server.url, "second", rate=60) as second:
            second.serving()
            wait_until(lambda: attempts(client, handles) == [2] * 8, timeout=15)
            first.signal(signal.SIGCONT)
            check_answers(client, handles, tokens)
            owners = {e.worker for h in handles for e in job_events(client, h.id)} - {None}
            assert owners == {"first", "second"}
            assert {client.result(h.id).worker for h in handles} == {"second"}
            assert "job_lost" in first.log()
            # It goes on as a worker among others.
            more = submit(client, JOBS * 2, 30)
            check_answers(client, more, 30)


@pytest.mark.chaos
def test_a_mac_that_slept_alone_finishes_its_own_jobs(server: LocalRedis, client: Client) -> None:
    """It is the only worker: it reaps its own leases, and claims jobs that it still decodes."""
    tokens = 100
    with WorkerProcess(server.url, "only", rate=50, engine__stall_seconds=60) as only:
        only.serving()
        handles = submit(client, 8, tokens)
        wait_until_decoded(client, handles, 5)
        for _ in range(2):
            only.signal(signal.SIGSTOP)
            time.sleep(LEASE_SECONDS + 0.5)
            only.signal(signal.SIGCONT)
            time.sleep(0.2)
        check_answers(client, handles, tokens)


@pytest.mark.chaos
def test_a_redis_killed_and_restarted_in_the_middle(server: LocalRedis, client: Client) -> None:
    tokens = 200
    with (
        WorkerProcess(server.url, "first", rate=50) as first,
        WorkerProcess(server.url, "second", rate=50) as second,
    ):
        first.serving()
        handles = submit(client, 16, tokens)
        wait_until_decoded(client, handles, 5)
        second.serving()
        server.restart()
        check_answers(client, handles, tokens)
        # A restart takes no live worker's job from it.
        assert attempts(client, handles) == [1] * 16


@pytest.mark.chaos
def test_decode_goes_on_while_redis_is_away(server: LocalRedis, client: Client) -> None:
    tokens = 250
    with WorkerProcess(server.url, "only", rate=50) as only:
        only.serving()
        handles = submit(client, 8, tokens)
        wait_until_decoded(client, handles, 5)
        server.kill()
        time.sleep(3)
        before = time.monotonic()
        server.start()
        wait_until(lambda: min(decoded(client, handles)) > 120, timeout=3)
        # 3 s at 50 tokens a second were decoded meanwhile; waiting for them would take 2.4 s more.
        assert time.monotonic() - before < 2.2
        check_answers(client, handles, tokens)
        assert attempts(client, handles) == [1] * 8
