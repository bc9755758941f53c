"""A primary that dies, and Sentinels that name another (D1, D2, D10).

No job that was acknowledged is lost, none is taken from a live worker, and no stream is spliced.
Both servers have `min-replicas-to-write 1`, so writes come back only when the old primary is back
as a replica: that, not the election, is most of the outage.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import pytest
import redis

from mlx_serving import Client
from mlx_serving.common.errors import QueueUnavailable
from mlx_serving.common.redis.connection import connect, resolve
from tests.support.helpers import wait_until
from tests.support.redis_trouble import Followers, Producer, check_results, check_view
from tests.support.sentinels import SentinelFleet
from tests.support.worker_process import WorkerProcess, quick_settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlx_serving.common.settings import Settings

pytestmark = [pytest.mark.chaos, pytest.mark.slow]

TOKENS, JOBS = 60, 40


@pytest.fixture
def fleet() -> Iterator[SentinelFleet]:
    with SentinelFleet() as fleet:
        yield fleet


@pytest.fixture
def settings(fleet: SentinelFleet) -> Settings:
    return quick_settings(fleet.url, **fleet.settings)


class Probe(threading.Thread):
    """Writes all the time; knows the longest time between two writes that went well."""

    def __init__(self, connection: redis.Redis) -> None:
        super().__init__(daemon=True)
        self._redis, self._over = connection, threading.Event()
        self.outage = 0.0

    def run(self) -> None:
        written = time.monotonic()
        while not self._over.wait(0.02):
            try:
                self._redis.set("probe", 1, ex=60)
            except redis.RedisError:
                continue
            self.outage = max(self.outage, time.monotonic() - written)
            written = time.monotonic()

    def stop(self) -> None:
        self._over.set()
        self.join()


def fail_over(fleet: SentinelFleet) -> None:
    """Kill the primary; start it again once another is named, as an init system does."""
    fleet.nodes[0].kill()
    wait_until(lambda: fleet.primary_ports() == {fleet.nodes[1].port}, timeout=15)
    fleet.nodes[0].start()


def test_a_failover_under_load(fleet: SentinelFleet, settings: Settings) -> None:
    with (
        Client(settings=settings) as client,
        WorkerProcess(fleet.url, "first", rate=10, batch__max_rows=24, **fleet.settings) as first,
        WorkerProcess(fleet.url, "second", rate=10, batch__max_rows=24, **fleet.settings) as second,
        connect(resolve(settings)) as connection,
    ):
        first.serving()
        second.serving()
        followers = Followers(client)
        probe = Probe(connection)
        probe.start()
        with Producer(client, JOBS, 0.05, max_tokens=TOKENS) as producer:
            wait_until(lambda: len(producer.acknowledged) >= JOBS // 2)
            for job_id in list(producer.acknowledged):
                followers.follow(job_id)
            wait_until(lambda: min(followers.tokens()) > 3)
            fail_over(fleet)
            producer.join(40)
        for job_id in producer.acknowledged[len(followers.events) :]:
            followers.follow(job_id)
        followers.finish()
        probe.stop()
        assert len(set(producer.acknowledged)) == JOBS
        assert {error.code for error in producer.refused} <= {QueueUnavailable.code}
        followers.check(TOKENS)
        check_results(client, producer.acknowledged, TOKENS)
        takeovers = sum(followers.attempts()) - JOBS
        print(f"outage for writers: {probe.outage:.1f} s; takeovers: {takeovers} of {JOBS}")  # noqa: T201 -- figures
        assert takeovers <= 1
        assert (first.process.poll(), second.process.poll()) == (None, None)
        assert connection.info("replication")["role"] == "master"
        check_view(connection, producer.acknowledged)


def test_a_producer_is_told_within_seconds_while_there_is_no_primary(
    fleet: SentinelFleet, settings: Settings
) -> None:
    with Client(settings=settings) as client:
        client.submit(model="tally", prompt="x", result_ttl=60)
        for node in fleet.nodes:
            node.kill()
        began = time.monotonic()
        with pytest.raises(QueueUnavailable) as raised:
            client.submit(model="tally", prompt="x", result_ttl=60)
        assert time.monotonic() - began < 10
        assert raised.value.retryable
