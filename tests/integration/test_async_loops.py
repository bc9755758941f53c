"""One `AsyncClient` in several event loops: one after the other, at once, made outside any."""

from __future__ import annotations

import asyncio
import subprocess
import threading
from contextlib import aclosing
from typing import TYPE_CHECKING

import pytest

from mlx_serving import AsyncClient, Client
from mlx_serving.common.interpreter import command
from tests.support.helpers import wait_until
from tests.support.scripted_worker import Running, ScriptedWorker

if TYPE_CHECKING:
    import redis

    from mlx_serving.common.settings import Settings

WORDS = [f"w{i} " for i in range(5)]

TWO_LOOPS = """
import asyncio, sys
from mlx_serving import AsyncClient
client = AsyncClient(sys.argv[1])
async def ask(stream):
    job = await client.submit(model="tally", prompt="x", result_ttl=60)
    events = client.stream(job.id)
    if stream:
        waiting = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0.1)  # subscribed, nothing to read: the loop ends under it
    return (await job.status()).state.value
"""
ENDS = {
    "asyncio.run": """
for stream in (True, False, True):
    print(asyncio.run(ask(stream)))
""",
    "a loop that is only closed": """
for _ in range(3):
    loop = asyncio.new_event_loop()
    print(loop.run_until_complete(ask(False)))
    loop.close()
""",
}


@pytest.fixture
def worker(redis_client: redis.Redis, client: Client) -> ScriptedWorker:
    return ScriptedWorker(redis_client, client.keys)


async def read(client: AsyncClient) -> list[str]:
    job = await client.submit(model="tally", prompt="x", result_ttl=60)
    return [text async for text in job.text()]


def subscribers(redis_client: redis.Redis) -> int:
    return len(redis_client.client_list(_type="pubsub"))


@pytest.mark.may_leak("jobs that stay queued")
@pytest.mark.parametrize("end", ENDS)
def test_one_loop_after_the_other_works_and_says_nothing(
    end: str, settings: Settings, redis_client: redis.Redis
) -> None:
    del redis_client
    url = settings.redis.url.get_secret_value()
    script = command("-c", TWO_LOOPS + ENDS[end], url)
    ran = subprocess.run(script, check=False, capture_output=True, text=True, timeout=60)
    assert (ran.stdout, ran.stderr) == ("queued\n" * 3, "")


def test_streams_are_live_in_each_loop(
    settings: Settings, worker: ScriptedWorker, redis_client: redis.Redis
) -> None:
    client = AsyncClient(settings=settings)
    for _ in range(2):

        def serve() -> None:
            wait_until(lambda: subscribers(redis_client) == 1)
            worker.serve(WORDS)

        with Running(serve):
            assert asyncio.run(read(client)) == WORDS
        wait_until(lambda: subscribers(redis_client) == 0)


def test_a_loop_that_ends_leaves_no_connection(
    settings: Settings, redis_client: redis.Redis
) -> None:
    client = AsyncClient(settings=settings)
    before = len(redis_client.client_list())

    async def leave_a_stream_open() -> None:
        job = await client.submit(model="tally", prompt="x", result_ttl=60)
        await client.cancel(job.id)
        async with aclosing(client.stream(job.id)) as events:
            await anext(events)

    asyncio.run(leave_a_stream_open())
    wait_until(lambda: len(redis_client.client_list()) == before)


def test_two_loops_at_once_do_not_meet(settings: Settings, worker: ScriptedWorker) -> None:
    client = AsyncClient(settings=settings)
    got: list[list[str]] = []
    loops = [
        threading.Thread(target=lambda: got.append(asyncio.run(read(client)))) for _ in range(4)
    ]
    for loop in loops:
        loop.start()
    for _ in loops:
        rows = wait_until(worker.claim)
        rows[0].attempt()
        for word in WORDS:
            rows[0].say(word)
        rows[0].end()
    for loop in loops:
        loop.join(20)
    assert got == [WORDS] * 4


def test_a_closed_client_opens_again_with_live_streams(
    settings: Settings, worker: ScriptedWorker, redis_client: redis.Redis
) -> None:
    async def twice() -> list[list[str]]:
        client = AsyncClient(settings=settings)
        both = []
        for _ in range(2):
            reading = asyncio.create_task(read(client))
            await asyncio.to_thread(wait_until, lambda: subscribers(redis_client) == 1)
            await asyncio.to_thread(worker.serve, WORDS)
            both.append(await reading)
            await client.aclose()
            await asyncio.to_thread(wait_until, lambda: subscribers(redis_client) == 0)
        return both

    assert asyncio.run(twice()) == [WORDS] * 2
