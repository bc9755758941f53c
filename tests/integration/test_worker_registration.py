"""A worker is seen by RQ's tools and by ours for as long as it lives, whatever went before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from rq import Worker

from mlx_serving.cli.overview import look
from mlx_serving.common.protocol.client import Protocol
from mlx_serving.common.protocol.keys import Keys
from mlx_serving.common.protocol.quarantine import read_quarantined
from mlx_serving.common.worker_record import WorkerRecord
from mlx_serving.worker import rq_worker
from mlx_serving.worker.rq_worker import BatchWorker
from mlx_serving.worker.status import fleet
from mlx_serving.worker.status.fleet import Fleet
from mlx_serving.worker.status.presence import Presence
from mlx_serving.worker.status.status import Snapshot

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
    redis_client: redis.Redis, queue: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rq_worker, "LOOK_SECONDS", 0.0)
    alive = worker(redis_client)
    beat(alive)
    key = "rq:workers" if queue is None else f"rq:workers:{queue}"
    assert redis_client.srem(key, alive.key) == 1
    beat(alive)
    assert redis_client.sismember(key, alive.key)
    assert names(redis_client) == ["mac"]


@pytest.mark.parametrize("queue", [None, *QUEUES])
def test_a_list_of_another_type_stops_nobody(
    redis_client: redis.Redis, queue: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is moved aside, and the worker is on it again."""
    monkeypatch.setattr(rq_worker, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(fleet, "CHANGE_SECONDS", 0.0)
    alive = Fleet(
        Protocol(redis_client, Keys()), QUEUES, Presence("mac", ["tally"], 1, Snapshot), lambda: ()
    )
    alive.beat(held=0, suspended=False)
    key = "rq:workers" if queue is None else f"rq:workers:{queue}"
    redis_client.delete(key)
    redis_client.set(key, "not a set")
    alive.beat(held=1, suspended=False)
    assert names(redis_client) == ["mac"]
    assert redis_client.sismember(key, "rq:worker:mac")
    assert [moved.key for moved in read_quarantined(redis_client, Keys())] == [key]


def test_an_idle_beat_looks_at_the_lists_now_and_then(redis_client: redis.Redis) -> None:
    alive = worker(redis_client)
    beat(alive)
    before = redis_client.info("commandstats").get("cmdstat_sismember", {"calls": 0})["calls"]
    for _ in range(5):
        beat(alive)
    after = redis_client.info("commandstats").get("cmdstat_sismember", {"calls": 0})["calls"]
    assert after == before


@pytest.mark.parametrize("odd", ["a number", "another type"])
def test_a_record_that_cannot_be_read_is_left_out(redis_client: redis.Redis, odd: str) -> None:
    keys = Keys()
    others = [worker(redis_client, name) for name in ("good", "odd")]
    for other in others:
        beat(other)
    record = WorkerRecord(name="good", model="tally", state="serving", resident=("tally",))
    fields: dict[Any, Any] = record.to_hash()
    redis_client.hset(keys.worker("good"), mapping=fields)
    if odd == "a number":
        redis_client.hset(keys.worker("odd"), mapping=fields | {"rows": "1.5"})
    else:
        redis_client.set(keys.worker("odd"), "text")
    presence = Presence("mine", ["tally"], 1, Snapshot)
    mine = Fleet(Protocol(redis_client, keys), QUEUES, presence, lambda: ())
    assert mine.models_elsewhere() == {"tally"}
    assert [known.name for known in look(redis_client, keys).workers] == ["good"]
