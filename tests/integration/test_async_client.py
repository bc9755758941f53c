"""The asyncio client against a real Redis and a scripted worker."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import pytest

from mlx_serving import (
    AsyncClient,
    InvalidJob,
    JobCancelled,
    JobFailed,
    JobNotFound,
    JobState,
    LocalRedis,
    QueueUnavailable,
    ResultTimeout,
)
from mlx_serving.producer.stream_hub import Mailbox, StreamHub
from tests.support.helpers import wait_until, wait_until_async
from tests.support.scripted_worker import ScriptedWorker, queued

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    import redis

    from mlx_serving.common.events import Event
    from mlx_serving.common.settings import Settings
    from mlx_serving.producer.base import Reader
    from mlx_serving.producer.handles import AsyncJobHandle
    from tests.support.scripted_worker import Row

WORDS = [f"w{i} " for i in range(20)]
PROMPT = "count from 3 to 12"


@pytest.fixture
async def client(redis_client: redis.Redis, settings: Settings) -> AsyncIterator[AsyncClient]:
    del redis_client
    async with AsyncClient(settings=settings) as client:
        yield client


@pytest.fixture
def worker(redis_client: redis.Redis, client: AsyncClient) -> ScriptedWorker:
    return ScriptedWorker(redis_client, client.keys)


def fields(**more: object) -> dict[str, Any]:
    return {"model": "tally", "prompt": PROMPT, "result_ttl": 60, **more}


def subscribers(redis_client: redis.Redis) -> int:
    return len(redis_client.client_list(_type="pubsub"))


async def subscribed(redis_client: redis.Redis) -> bool:
    return bool(redis_client.pubsub_channels())


async def collect(client: AsyncClient, job: AsyncJobHandle) -> list[Event]:
    return [event async for event in client.stream(job.id)]


class RequeuesOnce(AsyncClient):
    """Requeues a job between its end and the next look at it, as another producer may."""

    requeued = False

    async def _follow(
        self, job_id: str, reader: Reader, deadline_s: float | None = None
    ) -> AsyncGenerator[Event, None]:
        async for event in super()._follow(job_id, reader, deadline_s):
            yield event
        if not self.requeued:
            await self.requeue(job_id)
            self.requeued = True


class TestCalls:
    async def test_a_job_goes_through(self, client: AsyncClient, worker: ScriptedWorker) -> None:
        job = await client.submit(**fields())
        assert (job.created, job.state) == (True, JobState.QUEUED)
        serving = asyncio.create_task(asyncio.to_thread(worker.serve, WORDS, 0.005))
        assert [text async for text in job.text()] == WORDS
        await serving
        assert (await job.result()).text == "".join(WORDS)
        assert (await job.status()).state is JobState.FINISHED

    async def test_many_jobs_keep_their_order(
        self, client: AsyncClient, redis_client: redis.Redis
    ) -> None:
        jobs = await client.submit_many(fields(seed=seed) for seed in range(300))
        assert queued(redis_client) == [job.id for job in jobs]

    async def test_one_wrong_job_refuses_the_whole_call(
        self, client: AsyncClient, redis_client: redis.Redis
    ) -> None:
        with pytest.raises(InvalidJob, match=r"jobs\[1\]\.top_p"):
            await client.submit_many([fields(), fields(top_p=3)])
        assert redis_client.dbsize() == 0

    async def test_an_idempotency_key_enqueues_once(
        self, client: AsyncClient, redis_client: redis.Redis
    ) -> None:
        jobs = await asyncio.gather(
            *(client.submit(**fields(idempotency_key="a")) for _ in range(20))
        )
        assert [job.created for job in jobs].count(True) == 1
        assert redis_client.llen("rq:queue:tally:default") == 1

    async def test_it_cancels(self, client: AsyncClient) -> None:
        job = await client.submit(**fields())
        assert await job.cancel() is JobState.CANCELLED
        result = await job.result()
        with pytest.raises(JobCancelled):
            result.raise_for_state()

    async def test_a_result_can_time_out(self, client: AsyncClient) -> None:
        job = await client.submit(**fields())
        with pytest.raises(ResultTimeout):
            await job.result(timeout=0.1)

    async def test_a_job_requeued_at_its_end_is_waited_for_again(
        self, redis_client: redis.Redis, settings: Settings
    ) -> None:
        async with RequeuesOnce(settings=settings) as client:
            worker = ScriptedWorker(redis_client, client.keys)
            job = await client.submit(**fields())
            waits = asyncio.create_task(job.result())
            await asyncio.to_thread(wait_until, lambda: subscribers(redis_client))
            worker.claim_one().end(JobState.FAILED, "engine_error")
            await asyncio.to_thread(wait_until, lambda: client.requeued)
            worker.serve(WORDS)
            assert (await waits).state is JobState.FINISHED

    async def test_an_unknown_job_is_not_found(self, client: AsyncClient) -> None:
        for call in (client.status, client.result, client.cancel):
            with pytest.raises(JobNotFound):
                await call("f" * 32)
        with pytest.raises(JobNotFound):
            await anext(client.stream("f" * 32))

    async def test_a_redis_that_is_away_is_a_retryable_error(self) -> None:
        async with AsyncClient("unix:///nonexistent/redis.sock") as client:
            with pytest.raises(QueueUnavailable):
                await client.submit(**fields())
            with pytest.raises(QueueUnavailable):
                await anext(client.stream("f" * 32))

    async def test_a_failed_job_raises_at_the_end_of_its_text(
        self, client: AsyncClient, worker: ScriptedWorker
    ) -> None:
        job = await client.submit(**fields())
        row = worker.claim_one()
        row.say("half ")
        row.end(JobState.FAILED, "engine_error")
        got: list[str] = []
        with pytest.raises(JobFailed):
            got.extend([text async for text in job.text()])


class TestStreams:
    async def test_a_hundred_streams_share_one_connection(
        self, client: AsyncClient, worker: ScriptedWorker, redis_client: redis.Redis
    ) -> None:
        jobs = await client.submit_many(fields(seed=seed) for seed in range(100))
        readers = [asyncio.create_task(collect(client, job)) for job in jobs]

        async def all_subscribed() -> bool:
            return len(redis_client.pubsub_channels()) == len(jobs)

        await wait_until_async(all_subscribed)
        assert subscribers(redis_client) == 1
        rows = worker.claim(100)
        await asyncio.to_thread(_interleave, rows, 10)
        streams = await asyncio.gather(*readers)
        written = {row.job.job_id: row.written for row in rows}
        assert streams == [written[job.id] for job in jobs]

        async def none_subscribed() -> bool:
            return redis_client.pubsub_channels() == []

        await wait_until_async(none_subscribed)

    async def test_they_survive_killed_connections(
        self, client: AsyncClient, worker: ScriptedWorker, redis_client: redis.Redis
    ) -> None:
        jobs = await client.submit_many(fields(seed=seed) for seed in range(20))
        readers = [asyncio.create_task(collect(client, job)) for job in jobs]
        rows = worker.claim(20)
        writing = asyncio.create_task(asyncio.to_thread(_interleave, rows, 60, 0.02))
        kills = 0
        while not writing.done():
            kills += int(redis_client.execute_command("CLIENT", "KILL", "TYPE", "pubsub"))
            await asyncio.sleep(0.2)
        await writing
        assert kills >= 3
        written = {row.job.job_id: row.written for row in rows}
        assert await asyncio.gather(*readers) == [written[job.id] for job in jobs]

    async def test_live_events_do_not_wait_for_a_poll(
        self, client: AsyncClient, worker: ScriptedWorker, redis_client: redis.Redis
    ) -> None:
        job = await client.submit(**fields())
        row = worker.claim_one()
        delays: list[float] = []

        async def read() -> None:
            async for event in job.stream():
                delays.extend(
                    (time.monotonic_ns() - choice.token_ids[0]) / 1e9 for choice in event.choices
                )

        async with asyncio.TaskGroup() as group:
            group.create_task(read())
            await wait_until_async(lambda: subscribed(redis_client))
            for _ in range(5):
                await asyncio.sleep(0.1)
                row.say("a", token=time.monotonic_ns())
            row.end()
        assert len(delays) == 5
        assert sorted(delays)[2] < 0.1

    async def test_it_resumes_from_a_cursor(
        self, client: AsyncClient, worker: ScriptedWorker
    ) -> None:
        job = await client.submit(**fields())
        row = worker.serve(WORDS)
        assert [e async for e in job.stream(row.written[14].cursor)] == row.written[15:]

    async def test_two_consumers_of_a_job_share_its_subscription(
        self, client: AsyncClient, worker: ScriptedWorker, redis_client: redis.Redis
    ) -> None:
        job = await client.submit(**fields())
        row = worker.claim_one()
        async with aclosing(client.stream(job.id)) as first:
            await anext(first)
            reader = asyncio.create_task(collect(client, job))

            await wait_until_async(lambda: subscribed(redis_client))
        row.say("a")
        row.end()
        assert await reader == row.written

    async def test_a_slow_consumer_costs_no_memory_and_misses_nothing(
        self, client: AsyncClient, worker: ScriptedWorker, redis_client: redis.Redis
    ) -> None:
        job = await client.submit(**fields())
        row = worker.claim_one()
        stream = client.stream(job.id)
        got = [await anext(stream)]
        second = asyncio.ensure_future(anext(stream))

        await wait_until_async(lambda: subscribed(redis_client))
        row.say("first")
        got.append(await second)
        hub = (await client._connections.here()).hub
        ((mailbox,),) = hub._mailboxes.values()
        for number in range(3 * mailbox._limit):
            row.say(f"{number} ")
        row.end()

        async def arrived() -> bool:
            return mailbox._dropped

        await wait_until_async(arrived)
        assert len(mailbox._payloads) <= mailbox._limit
        got += [event async for event in stream]
        assert got == row.written

    async def test_the_tokens_of_a_bulk_job_are_polled(
        self, client: AsyncClient, worker: ScriptedWorker
    ) -> None:
        job = await client.submit(**fields(stream=False))
        reader = asyncio.create_task(collect(client, job))
        row = await asyncio.to_thread(worker.serve, WORDS, 0.02)
        assert await reader == row.written

    async def test_a_redis_that_restarts_is_outlived(self) -> None:
        with LocalRedis(appendonly="always") as server, server.client() as redis_client:
            async with AsyncClient(server.url) as client:
                job = await client.submit(**fields())
                row = ScriptedWorker(redis_client, client.keys).claim_one()
                row.say("before ")
                reader = asyncio.create_task(collect(client, job))
                await asyncio.sleep(0.1)
                await asyncio.to_thread(server.restart)
                row.say("after")
                row.end()
                assert await reader == row.written

    async def test_a_quiet_connection_that_answers_is_kept(
        self,
        client: AsyncClient,
        worker: ScriptedWorker,
        redis_client: redis.Redis,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr("mlx_serving.producer.stream_hub.PING_S", 0.02)
        job = await client.submit(**fields())
        reader = asyncio.create_task(collect(client, job))
        await wait_until_async(lambda: subscribed(redis_client))
        (before,) = redis_client.client_list(_type="pubsub")

        async def pinged() -> bool:
            (now,) = redis_client.client_list(_type="pubsub")
            assert now["id"] == before["id"]
            return bool(now["cmd"] == "ping")

        await wait_until_async(pinged)
        worker.serve(WORDS)
        await reader

    async def test_a_connection_that_answers_no_more_is_replaced(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("mlx_serving.producer.stream_hub.PING_S", 0.05)
        with LocalRedis() as server, server.client() as redis_client:
            async with AsyncClient(server.url) as client:
                job = await client.submit(**fields())
                worker = ScriptedWorker(redis_client, client.keys)
                reader = asyncio.create_task(collect(client, job))
                await wait_until_async(lambda: subscribed(redis_client))
                (before,) = redis_client.client_list(_type="pubsub")
                assert server.pid is not None
                os.kill(server.pid, signal.SIGSTOP)
                await asyncio.sleep(0.3)
                os.kill(server.pid, signal.SIGCONT)

                async def replaced() -> bool:
                    ids = [each["id"] for each in redis_client.client_list(_type="pubsub")]
                    return bool(ids) and before["id"] not in ids

                await wait_until_async(replaced)
                row = worker.serve(WORDS)
                assert await reader == row.written


class TestMailbox:
    def test_it_is_bounded(self) -> None:
        mailbox = Mailbox("c", limit=4)
        for _ in range(100):
            mailbox.put(b"x")
        assert len(mailbox._payloads) <= 4

    async def test_no_news_is_false(self) -> None:
        assert not await Mailbox("c").wait(0.01)

    async def test_a_hub_closes_twice(self, async_redis: Any) -> None:
        hub = StreamHub(async_redis)
        hub.open("c")
        await hub.aclose()
        await hub.aclose()


def _interleave(rows: list[Row], words: int, pause_s: float = 0.0) -> None:
    for row in rows:
        row.attempt()
    for number in range(words):
        for row in rows:
            row.say(f"{row.job.job_id[:4]}-{number} ")
        time.sleep(pause_s)
    for row in rows:
        row.end()
