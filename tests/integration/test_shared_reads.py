"""Readers of one event loop share round trips, and each gets what is its own."""

from __future__ import annotations

import asyncio
import socketserver
import threading
from typing import Any

import pytest
from redis import exceptions

from mlx_serving import AsyncClient, Client
from mlx_serving.common.redis.connection import Endpoint, connect_async
from mlx_serving.common.settings import Settings  # noqa: TC001 -- a fixture's type
from mlx_serving.producer.snapshot_reader import JOBS_A_TRIP, SnapshotReader

UNSENDABLE = "\ud800"


def get(pipe: Any, job_id: str, _: int | None) -> None:
    pipe.get(job_id)


async def read_all(reader: SnapshotReader, job_ids: list[str]) -> list[Any]:
    reads = (reader.read(job_id, None) for job_id in job_ids)
    return list(await asyncio.gather(*reads, return_exceptions=True))


def test_an_id_that_cannot_be_sent_is_refused_and_nobody_else_is(
    settings: Settings, client: Client
) -> None:
    job = client.submit(model="tally", prompt="x", result_ttl=60)
    with pytest.raises(ValueError, match="job_id"):
        client.status(UNSENDABLE)

    async def use() -> list[Any]:
        async with AsyncClient(settings=settings) as reader:
            reads = [reader.result(job_id) for job_id in (job.id, UNSENDABLE, job.id)]
            tasks = [asyncio.ensure_future(read) for read in reads]
            await asyncio.sleep(0.2)
            await reader.cancel(job.id)
            return await asyncio.gather(*tasks, return_exceptions=True)

    first, odd, third = asyncio.run(use())
    assert type(odd) is ValueError
    assert (first.state, third.state) == ("cancelled", "cancelled")


def test_whatever_a_trip_raises_its_readers_do(settings: Settings) -> None:
    async def use() -> list[Any]:
        async with connect_async(Endpoint(url=settings.redis.url.get_secret_value())) as redis:
            reader = SnapshotReader(redis, get, asyncio.Semaphore(1))
            failed = await read_all(reader, ["a", UNSENDABLE])
            return [*failed, *await read_all(reader, ["a"])]

    *failed, answered = asyncio.run(use())
    assert [type(error) for error in failed] == [UnicodeEncodeError] * 2
    assert answered == [None]


def test_readers_wait_for_one_timeout_not_for_one_a_trip() -> None:
    connected = []

    class Silent(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            connected.append(self.client_address)
            while self.request.recv(4096):
                pass

    async def use(port: int) -> list[Any]:
        async with connect_async(Endpoint(f"redis://127.0.0.1:{port}", read_timeout=0.2)) as redis:
            reader = SnapshotReader(redis, get, asyncio.Semaphore(1))
            return await read_all(reader, ["a"] * (4 * JOBS_A_TRIP))

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Silent) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        failed = asyncio.run(use(server.server_address[1]))
        server.shutdown()
    assert {type(error) for error in failed} == {exceptions.TimeoutError}
    assert len(connected) == 1
