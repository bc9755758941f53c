"""A worker is seen by RQ's tools and by ours for as long as it lives, whatever went before."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from rq import Worker

from mlx_serving.worker.rq_worker import BatchWorker

if TYPE_CHECKING:
    import redis

QUEUES = ("tally:interactive", "tally:bulk")
REASON = "RQ's hash of a worker expires by itself; its sets stay until somebody cleans them"

pytestmark = pytest.mark.may_leak(REASON)


def names(client: redis.Redis) -> list[str]:
    return [worker.name for worker in Worker.all(connection=client)]


def worker(client: redis.Redis, name: str = "mac") -> BatchWorker:
    return BatchWorker(QUEUES, name, client)


def beat(of: BatchWorker) -> None:
    of.beat(held=0, suspended=False)


def test_one_that_left_and_comes_back_under_its_name_is_seen(redis_client: redis.Redis) -> None:
    first = worker(redis_client)
    beat(first)
    first.leave()
    assert names(redis_client) == []
    second = worker(redis_client)
    beat(second)
    assert names(redis_client) == ["mac"]
    assert worker(redis_client, "other").peer_names() == {"mac"}


def test_one_that_was_killed_and_comes_back_under_its_name_is_seen(
    redis_client: redis.Redis,
) -> None:
    first = worker(redis_client)
    beat(first)  # and then it is killed: its hash lives on for a minute
    second = worker(redis_client)
    beat(second)
    assert names(redis_client) == ["mac"]


@pytest.mark.parametrize("queue", [None, *QUEUES])
def test_one_that_was_struck_off_a_list_comes_back_to_it(
    redis_client: redis.Redis, queue: str | None
) -> None:
    alive = worker(redis_client)
    beat(alive)
    key = "rq:workers" if queue is None else f"rq:workers:{queue}"
    assert redis_client.srem(key, alive.key) == 1
    beat(alive)
    assert redis_client.sismember(key, alive.key)
    assert names(redis_client) == ["mac"]
