"""A submit whose reply is lost is sent again, and enqueues once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlx_serving import AsyncClient, Client, JobState
from tests.support.scripted_worker import ScriptedWorker, queued

if TYPE_CHECKING:
    import redis

    from tests.support.lossy_proxy import LossyProxy


JOB = {"model": "tally", "prompt": "count from 3 to 12", "result_ttl": 60}
NEEDLE = b"generate tally:default"  # stands in an enqueue's arguments


def test_a_submit_enqueues_once(proxy: LossyProxy, redis_client: redis.Redis) -> None:
    with Client(proxy.url) as client:
        first = client.submit(JOB)  # the script is loaded from here on
        proxy.lose_reply_to(NEEDLE)
        second = client.submit(JOB)
    assert proxy.lost == 1
    assert queued(redis_client) == [first.id, second.id]
    assert redis_client.zcard("mlxs:open:tally:default") == 2


def test_a_batch_enqueues_each_job_once(proxy: LossyProxy, redis_client: redis.Redis) -> None:
    with Client(proxy.url) as client:
        client.submit(JOB)
        proxy.lose_reply_to(NEEDLE)
        handles = client.submit_many([JOB] * 40)
    assert proxy.lost == 1
    assert queued(redis_client)[1:] == [handle.id for handle in handles]


async def test_an_async_submit_enqueues_once(proxy: LossyProxy, redis_client: redis.Redis) -> None:
    async with AsyncClient(proxy.url) as client:
        first = await client.submit(JOB)
        proxy.lose_reply_to(NEEDLE)
        second = await client.submit(JOB)
    assert proxy.lost == 1
    assert queued(redis_client) == [first.id, second.id]


def test_a_cancel_can_lose_its_reply(proxy: LossyProxy, redis_client: redis.Redis) -> None:
    with Client(proxy.url) as client:
        client.submit(JOB).cancel()
        job = client.submit(JOB)
        proxy.lose_reply_to(job.id.encode())
        assert job.cancel() is JobState.CANCELLED
    assert proxy.lost == 1
    assert queued(redis_client) == []


def test_a_stream_can_lose_a_reply(proxy: LossyProxy, redis_client: redis.Redis) -> None:
    with Client(proxy.url) as client:
        job = client.submit(JOB)
        row = ScriptedWorker(redis_client, client.keys).serve(["a ", "b "])
        proxy.lose_reply_to(job.id.encode())
        assert list(job.stream()) == row.written
    assert proxy.lost == 1
