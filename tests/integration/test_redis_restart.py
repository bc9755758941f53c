"""Redis goes away and comes back with all it acknowledged (AOF `always`): D1, D5, D10."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from mlx_serving.common.redis.local import LocalRedis
from tests.support.helpers import wait_until
from tests.support.redis_trouble import Followers, Producer, check_results, check_view
from tests.support.worker_process import LEASE_SECONDS, WorkerProcess, submit

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlx_serving import Client

pytestmark = pytest.mark.chaos


@pytest.fixture
def server() -> Iterator[LocalRedis]:
    with LocalRedis(appendonly="always") as server:
        yield server


def test_restarts_under_load(server: LocalRedis, client: Client) -> None:
    """Producers submit, workers decode and consumers follow through six kill -9 of Redis."""
    tokens, followers = 40, Followers(client)
    with (
        WorkerProcess(server.url, "first", rate=60) as first,
        WorkerProcess(server.url, "second", rate=60) as second,
    ):
        first.serving()
        second.serving()
        with Producer(client, 80, 0.06, max_tokens=tokens) as producer:
            for _ in range(6):
                time.sleep(0.8)
                server.restart()
                for job_id in producer.acknowledged[len(followers.events) :]:
                    followers.follow(job_id)
        for job_id in producer.acknowledged[len(followers.events) :]:
            followers.follow(job_id)
        assert len(set(producer.acknowledged)) == 80
        followers.finish()
        followers.check(tokens)
        check_results(client, producer.acknowledged, tokens)
        assert (first.process.poll(), second.process.poll()) == (None, None)
        with server.client() as connection:
            check_view(connection, producer.acknowledged)


@pytest.mark.slow
def test_restarts_take_no_job_from_a_live_worker(server: LocalRedis, client: Client) -> None:
    """D5: at most 1 of 32 is taken over; the last outage is longer than a lease."""
    tokens = 400
    with (
        WorkerProcess(server.url, "first", rate=20, batch__max_rows=16) as first,
        WorkerProcess(server.url, "second", rate=20, batch__max_rows=16) as second,
    ):
        first.serving()
        second.serving()
        handles = submit(client, 32, tokens)
        followers = Followers(client, handles)
        wait_until(lambda: min(followers.tokens()) > 5, timeout=20)
        for outage in (0.0, 0.0, LEASE_SECONDS / 2, LEASE_SECONDS + 1):
            server.kill()
            time.sleep(outage)
            server.start()
            time.sleep(LEASE_SECONDS)
        followers.finish()
        followers.check(tokens)
        check_results(client, followers.events, tokens)
        takeovers = sum(followers.attempts()) - 32
        print(f"takeovers after 4 restarts: {takeovers} of 32")  # noqa: T201 -- a figure
        assert takeovers <= 1
        assert (first.process.poll(), second.process.poll()) == (None, None)
        with server.client() as connection:
            check_view(connection, followers.events)
