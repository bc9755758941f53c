"""Two workers: a conversation stays where it is while there is room, and never waits long."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from mlx_serving import Client
from mlx_serving.common.job.schema import GenerationJob
from mlx_serving.common.protocol.keys import Keys
from mlx_serving.producer.marks import marks
from mlx_serving.worker import dispatcher
from tests.support.helpers import wait_until
from tests.support.worker_process import (
    InProcessWorker,
    check_answers,
    job_events,
    quick_settings,
    submit,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    import redis

    from mlx_serving.common.redis.local import LocalRedis
    from mlx_serving.producer.handles import JobHandle

BOUND_MS = 150
SYSTEM = "You answer politely. " * 40
KEYS = Keys()


@pytest.fixture
def client(settled_redis: LocalRedis) -> Iterator[Client]:
    with Client(settings=quick_settings(settled_redis.url)) as client:
        yield client


def turn(client: Client, talk: int, number: int, tokens: int = 3) -> JobHandle:
    """Submit a turn of a conversation."""
    said = [("assistant" if n % 2 else "user", f"talk {talk} {n}") for n in range(2 * number + 1)]
    turns = [("system", SYSTEM), *said]
    messages = [{"role": role, "content": text} for role, text in turns]
    (handle,) = submit(client, 1, tokens, prompt=None, messages=messages)
    return handle


def worker_of(client: Client, handle: JobHandle) -> str:
    """Who ran a job, to its end."""
    check_answers(client, [handle], handle.result(timeout=30).usage.completion_tokens)  # type: ignore[union-attr]
    (worker,) = {event.worker for event in job_events(client, handle.id)} - {None}
    return str(worker)


def serving(redis_client: redis.Redis, *names: str) -> None:
    def all_say_so() -> bool:
        return all(redis_client.hget(KEYS.worker(n), "state") == b"serving" for n in names)

    wait_until(all_say_so)


def waited_ms(client: Client, handle: JobHandle) -> int:
    """From enqueue to the claim."""
    timings = client.result(handle.id, timeout=30).timings
    assert timings is not None
    assert timings.started_ms is not None
    assert timings.enqueued_ms is not None
    return timings.started_ms - timings.enqueued_ms


def test_a_conversation_stays_with_its_worker(
    settled_redis: LocalRedis, redis_client: redis.Redis, client: Client
) -> None:
    url, patient = (
        settled_redis.url,
        5000,
    )  # the machine may be slow, and its worker takes it at once
    with (
        InProcessWorker(url, "a", rate=1000, cache__prefix_affinity_ms=patient) as first,
        InProcessWorker(url, "b", rate=1000, cache__prefix_affinity_ms=patient) as second,
    ):
        serving(redis_client, "a", "b")
        for talk in range(4):
            workers = {worker_of(client, turn(client, talk, number)) for number in range(4)}
            assert len(workers) == 1
        home, other = (first, second) if workers == {"a"} else (second, first)
        assert home.drain(at_once=False) == 0
        moved = turn(client, 3, 4)
        assert worker_of(client, moved) == other.name, "its worker has left"
        assert waited_ms(client, moved) < patient


def test_a_full_worker_keeps_no_conversation(
    settled_redis: LocalRedis, redis_client: redis.Redis, client: Client
) -> None:
    url = settled_redis.url
    options: dict[str, Any] = {"batch__max_rows": 2, "cache__prefix_affinity_ms": 5000}
    with InProcessWorker(url, "a", rate=50, **options):
        serving(redis_client, "a")
        long = [turn(client, 0, 0, tokens=100), turn(client, 1, 0, tokens=100)]
        wait_until(lambda: redis_client.scard(KEYS.rq_worker_executions("a")) == len(long))
        with InProcessWorker(url, "b", rate=1000, **options):
            serving(redis_client, "b")
            second = turn(client, 0, 1)
            assert worker_of(client, second) == "b"
            assert waited_ms(client, second) < options["cache__prefix_affinity_ms"]
            assert worker_of(client, turn(client, 0, 2)) == "b", "it moved"
            for handle in long:
                handle.cancel()


@pytest.mark.parametrize("others", [(), ("other",)], ids=["one model", "several"])
def test_a_worker_that_takes_nothing_delays_a_turn_by_the_bound(
    settled_redis: LocalRedis,
    redis_client: redis.Redis,
    client: Client,
    monkeypatch: pytest.MonkeyPatch,
    others: tuple[str, ...],
) -> None:
    """Its presence outlives a worker that died by seconds. Nothing but the bound's end wakes us."""
    monkeypatch.setattr(dispatcher, "POLL_SECONDS", 20.0)
    facts: Any = {"state": "serving", "resident": "tally", "batch_rows": 8}
    redis_client.hset(KEYS.worker("ghost"), mapping=facts)
    redis_client.expire(KEYS.worker("ghost"), 60)
    settings = {"cache__prefix_affinity_ms": BOUND_MS}
    with InProcessWorker(settled_redis.url, "b", rate=1000, others=others, **settings):
        serving(redis_client, "b")
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "talk 0 0"}]
        talk = marks(GenerationJob.build(model="tally", messages=messages)).partition(",")[0]
        redis_client.set(KEYS.warm(talk), "\nghost\n", px=60_000)
        handle = turn(client, 0, 1)
        (unmarked,) = submit(client, 1, 3)
        assert worker_of(client, handle) == worker_of(client, unmarked) == "b"
        assert BOUND_MS <= waited_ms(client, handle) < 10 * BOUND_MS
        assert waited_ms(client, unmarked) < waited_ms(client, handle)
        assert redis_client.get(KEYS.warm(talk)) == b"\nb\n", "it moved"
