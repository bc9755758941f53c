"""Consumers of jobs that wait: they read seldom, and learn by message what happens."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from mlx_serving import AsyncClient, Client, JobState
from mlx_serving.producer import patience, snapshot_reader
from tests.support.helpers import wait_until
from tests.support.scripted_worker import ScriptedWorker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import redis

    from mlx_serving.common.settings import Settings
    from mlx_serving.producer.handles import AsyncJobHandle
    from mlx_serving.producer.loop_connections import LoopConnections

NEVER_S = 600.0
READS = ("hmget", "hgetall", "xrange", "hget", "evalsha")


@pytest.fixture
async def many(redis_client: redis.Redis, settings: Settings) -> AsyncIterator[AsyncClient]:
    del redis_client
    async with AsyncClient(settings=settings) as client:
        yield client


@pytest.fixture
def worker(redis_client: redis.Redis, client: Client) -> ScriptedWorker:
    return ScriptedWorker(redis_client, client.keys)


@pytest.fixture
def only_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that is subscribed does not read Redis by itself."""
    for name in ("SILENCE_S", "LONGEST_SILENCE_S"):
        monkeypatch.setattr(patience, name, NEVER_S)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits that grow from 0.1 s to 1 s instead of from 1 s to 15 s."""
    monkeypatch.setattr(patience, "SILENCE_S", 0.1)
    monkeypatch.setattr(patience, "LONGEST_SILENCE_S", 1.0)
    monkeypatch.setattr(snapshot_reader, "COMMON_S", 0.1)


def fields(**more: object) -> dict[str, Any]:
    return {"model": "tally", "prompt": "x", "result_ttl": 60, **more}


def reads(redis_client: redis.Redis) -> int:
    stats = redis_client.info("commandstats")
    return sum(stats.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in READS)


async def listened(redis_client: redis.Redis, count: int) -> None:
    """Wait until so many channels have a subscriber, and each has read after it."""
    await asyncio.to_thread(wait_until, lambda: len(redis_client.pubsub_channels()) == count)
    await asyncio.sleep(0.2)


async def wait_for(job: AsyncJobHandle, call: str) -> None:
    if call == "result":
        await job.result()
    else:
        async for _ in job.stream():
            pass


@pytest.mark.usefixtures("quick")
@pytest.mark.may_leak("jobs that stay queued")
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(("call", "commands"), [("result", 1), ("stream", 2)])
async def test_waiting_costs_a_read_in_the_longest_silence(
    many: AsyncClient, redis_client: redis.Redis, call: str, commands: int, *, stream: bool
) -> None:
    jobs = await many.submit_many(fields(stream=stream, seed=seed) for seed in range(50))
    waiting = [asyncio.create_task(wait_for(job, call)) for job in jobs]
    await listened(redis_client, len(jobs))
    await asyncio.sleep(2.0)
    before, began_s = reads(redis_client), time.monotonic()
    await asyncio.sleep(3.0)
    each = (reads(redis_client) - before) / len(jobs) / commands
    waits = (time.monotonic() - began_s) / (0.8 * 1.0 - 0.1)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert each <= waits + 1


@pytest.mark.usefixtures("quick")
@pytest.mark.may_leak("jobs that stay queued")
def test_so_it_does_in_threads(client: Client, redis_client: redis.Redis) -> None:
    jobs = client.submit_many(fields(stream=seed % 2 == 0, seed=seed) for seed in range(20))
    waiting = [threading.Thread(target=job.result) for job in jobs]
    for thread in waiting:
        thread.start()
    wait_until(lambda: len(redis_client.pubsub_channels()) == len(jobs))
    time.sleep(2.0)
    before, began_s = reads(redis_client), time.monotonic()
    time.sleep(3.0)
    each = (reads(redis_client) - before) / len(jobs)
    waits = (time.monotonic() - began_s) / 0.8
    for job in jobs:
        job.cancel()
    for thread in waiting:
        thread.join(10)
    assert each <= waits + 1


@pytest.mark.usefixtures("only_messages")
@pytest.mark.parametrize("stream", [True, False])
class TestMessages:
    """Nobody polls here, so what arrives was published."""

    async def test_the_begin_and_the_end_arrive(
        self, many: AsyncClient, worker: ScriptedWorker, redis_client: redis.Redis, *, stream: bool
    ) -> None:
        job = await many.submit(**fields(stream=stream))
        events = job.stream()
        first = asyncio.ensure_future(anext(events))
        ended = asyncio.create_task(job.result(timeout=30))
        await listened(redis_client, 1)
        row = await asyncio.to_thread(worker.claim_one)
        assert (await asyncio.wait_for(first, 30)).type == "attempt"
        row.say("a")
        row.end()
        assert (await ended).state is JobState.FINISHED
        assert [event.seq async for event in events] == [2, 3]

    async def test_an_end_without_a_worker_arrives(
        self, many: AsyncClient, redis_client: redis.Redis, *, stream: bool
    ) -> None:
        job = await many.submit(**fields(stream=stream))
        ended = asyncio.create_task(job.result(timeout=30))
        await listened(redis_client, 1)
        await job.cancel()
        assert (await ended).state is JobState.CANCELLED

    @pytest.mark.may_leak("a state written by hand")
    async def test_what_happened_while_the_connection_was_lost_is_read_at_the_next(
        self, many: AsyncClient, redis_client: redis.Redis, *, stream: bool
    ) -> None:
        job = await many.submit(**fields(stream=stream))
        ended = asyncio.create_task(job.result(timeout=30))
        await listened(redis_client, 1)
        with redis_client.pipeline() as both:  # at once, so that the end reaches nobody
            both.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
            both.hset(many.keys.job(job.id), mapping={"st": "cancelled", "ca": "x"})
            both.execute()
        assert (await ended).state is JobState.CANCELLED

    def test_they_arrive_in_a_thread(
        self, client: Client, worker: ScriptedWorker, redis_client: redis.Redis, *, stream: bool
    ) -> None:
        job = client.submit(**fields(stream=stream))
        states: list[JobState] = []
        waiting = threading.Thread(target=lambda: states.append(job.result(timeout=30).state))
        waiting.start()
        wait_until(lambda: len(redis_client.pubsub_channels()) == 1)
        time.sleep(0.2)
        worker.serve(["a"])
        waiting.join(30)
        assert states == [JobState.FINISHED]


@pytest.mark.usefixtures("quick")
@pytest.mark.may_leak("a state written by hand")
async def test_a_lost_message_costs_one_silence(
    many: AsyncClient, redis_client: redis.Redis
) -> None:
    job = await many.submit(**fields())
    ended = asyncio.create_task(job.result(timeout=30))
    await listened(redis_client, 1)
    await asyncio.sleep(1.0)  # the waits have grown
    redis_client.hset(many.keys.job(job.id), mapping={"st": "cancelled", "ca": "x"})
    assert (await ended).state is JobState.CANCELLED


async def test_reads_of_one_moment_share_a_round_trip(
    many: AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = await many.submit_many(fields(seed=seed) for seed in range(130))
    here: LoopConnections = await many._connections.here()
    trips: list[int] = []
    trip = here.snapshots._trip

    async def counted(asked: Any) -> None:
        trips.append(len(asked))
        await trip(asked)

    monkeypatch.setattr(here.snapshots, "_trip", counted)
    replies = await asyncio.gather(*(here.snapshots.read(job.id, None) for job in jobs))
    assert (trips, [reply[0][0] for reply in replies]) == ([64, 64, 2], [b"queued"] * 130)
    for job in jobs:
        await job.cancel()


async def test_a_read_that_fails_fails_alone(many: AsyncClient, redis_client: redis.Redis) -> None:
    job = await many.submit(**fields())
    redis_client.set(many.keys.job("odd"), "no hash", ex=60)
    here: LoopConnections = await many._connections.here()
    replies: list[Any] = await asyncio.gather(
        here.snapshots.read("odd", 0), here.snapshots.read(job.id, 0), return_exceptions=True
    )
    assert "WRONGTYPE" in str(replies[0])
    assert replies[1] == [[b"queued", b"0", b"1"], []]
    await job.cancel()
