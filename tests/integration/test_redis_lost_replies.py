"""Replies that get lost, on every call that a worker or a producer makes: each runs once (D1)."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from mlx_serving import Client, JobState
from mlx_serving.common.redis.local import LocalRedis
from tests.support.helpers import wait_until
from tests.support.lossy_proxy import LossyProxy, calls_of
from tests.support.redis_trouble import Followers, Producer, check_results, check_view
from tests.support.worker_process import (
    LEASE_SECONDS,
    InProcessWorker,
    WorkerProcess,
    quick_settings,
    submit,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.chaos

TOKENS = 40


@pytest.fixture
def server() -> Iterator[LocalRedis]:
    with LocalRedis() as server:
        yield server


@pytest.mark.parametrize(
    ("script", "rate", "tokens"),
    [
        ("claim", 30, TOKENS),
        ("commit", 30, TOKENS),
        ("renew", 3, 8),  # slower than leases are renewed: each commit renews one, too
        ("reap", 30, TOKENS),
    ],
)
def test_a_worker_that_loses_replies(
    server: LocalRedis, proxy: LossyProxy, client: Client, script: str, rate: float, tokens: int
) -> None:
    """Eight in a row of one kind, in the middle of the work."""
    with WorkerProcess(proxy.url, "only", rate=rate, batch__max_rows=8) as worker:
        worker.serving()
        followers = Followers(client, submit(client, 16, tokens))
        wait_until(lambda: sum(followers.tokens()) > 8, timeout=20)
        proxy.lose_reply_to(calls_of(script), times=8)
        followers.finish()
        assert proxy.lost > 0
        followers.check(tokens)
        check_results(client, followers.events, tokens)
        assert worker.process.poll() is None
        with server.client() as connection:
            check_view(connection, followers.events)


@pytest.mark.parametrize("script", ["commit", "release"])
def test_a_drain_that_loses_replies(
    server: LocalRedis, proxy: LossyProxy, client: Client, script: str
) -> None:
    """What it hands over is queued at once, and ends elsewhere."""
    with WorkerProcess(proxy.url, "first", rate=20, worker__drain_seconds=0) as first:
        first.serving()
        followers = Followers(client, submit(client, 8, TOKENS))
        wait_until(lambda: min(followers.tokens()) > 3, timeout=20)
        proxy.lose_reply_to(calls_of(script), times=2)
        first.terminate()
        assert first.exit_status() == 0
        assert {client.status(job_id).state for job_id in followers.events} == {JobState.QUEUED}
        with WorkerProcess(server.url, "second", rate=100) as second:
            second.serving()
            followers.finish()
        followers.check(TOKENS)
        assert {client.status(job_id).attempts for job_id in followers.events} == {0}
        with server.client() as connection:
            check_view(connection, followers.events)


def test_jobs_whose_claim_lost_its_reply_are_recognised(proxy: LossyProxy, client: Client) -> None:
    """Redis gave them to this worker, which never learned it: it need not wait for the lease."""
    with InProcessWorker(proxy.url, rate=200, worker__lease_seconds=10):
        client.result(submit(client, 1, 2)[0].id, timeout=10)  # it serves
        proxy.lose_reply_to(calls_of("claim"))
        wait_until(lambda: not proxy.losing)  # an idle one claims every second
        proxy.lose_reply_to(calls_of("claim"))
        submitted = time.monotonic()
        handles = submit(client, 8, TOKENS)
        order = [handle.id for handle in handles]
        followers = Followers(client, handles)
        wait_until(lambda: min(followers.tokens()) > 0, timeout=15)
        seconds = time.monotonic() - submitted
        followers.finish()
        followers.check(TOKENS)
        assert proxy.lost == 2
        print(f"first tokens after a lost claim: {seconds:.2f} s")  # noqa: T201 -- a figure
        assert seconds < LEASE_SECONDS
        started = [client.status(job_id).first_token_ms for job_id in order]
        assert max(started) - min(started) < 1000


def test_a_producer_that_loses_replies(
    server: LocalRedis, proxy: LossyProxy, client: Client
) -> None:
    """Every second enqueue loses its reply; each job is there once."""
    with (
        WorkerProcess(server.url, "only", rate=200) as worker,
        Client(settings=quick_settings(proxy.url)) as producing,
    ):
        worker.serving()
        ids: list[str] = []
        for _ in range(10):
            proxy.lose_reply_to(calls_of("enqueue"))
            with Producer(producing, 2, 0, max_tokens=TOKENS) as producer:
                pass
            ids += producer.acknowledged
        assert proxy.lost == 10
        check_results(client, ids, TOKENS)
        with server.client() as connection:
            check_view(connection, ids)


def test_a_cancel_that_loses_its_reply(
    server: LocalRedis, proxy: LossyProxy, client: Client
) -> None:
    with (
        WorkerProcess(server.url, "only", rate=20) as worker,
        Client(settings=quick_settings(proxy.url)) as producing,
    ):
        worker.serving()
        followers = Followers(client, submit(client, 4, 1000))
        wait_until(lambda: min(followers.tokens()) > 1, timeout=20)
        for job_id in followers.events:
            proxy.lose_reply_to(job_id.encode())
            assert producing.cancel(job_id) in {JobState.RUNNING, JobState.CANCELLED}
        followers.finish()
        assert proxy.lost == 4
        assert {client.status(job_id).state for job_id in followers.events} == {JobState.CANCELLED}
        assert [events[-1].state for events in followers.events.values()] == ["cancelled"] * 4
