"""An outage is an outage, whatever words the address has in it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from mlx_serving import AsyncClient, Client, QueueUnavailable
from mlx_serving.common.errors import QueueFailure
from mlx_serving.common.redis.faults import BY_WORDS
from mlx_serving.common.redis.local import LocalRedis
from tests.support.helpers import free_port
from tests.support.worker_process import quick_settings

JOB = {"model": "tally", "prompt": "x", "result_ttl": 60}
WORDS = [words for words, _ in BY_WORDS] + ["cluster", "authenticationerror"]


def told(url: str, **settings: Any) -> list[type[Exception]]:
    """What a client and an async client are told."""
    with (
        Client(settings=quick_settings(url, **settings)) as client,
        pytest.raises(QueueFailure) as blocking,
    ):
        client.submit(JOB)

    async def submit() -> None:
        async with AsyncClient(settings=quick_settings(url, **settings)) as client:
            await client.submit(JOB)

    with pytest.raises(QueueFailure) as asynchronous:
        asyncio.run(submit())
    return [type(blocking.value), type(asynchronous.value)]


@pytest.mark.parametrize("words", WORDS)
def test_a_server_that_is_gone(words: str) -> None:
    path = f"/nowhere/{words.replace(' ', '%20')}/redis.sock"
    assert told(f"unix://{path}") == [QueueUnavailable] * 2


def test_a_host_of_kubernetes() -> None:
    assert told("redis://redis.default.svc.cluster.invalid") == [QueueUnavailable] * 2


@pytest.mark.parametrize("words", WORDS)
def test_a_service_of_sentinels_that_are_gone(words: str) -> None:
    sentinel = {
        "sentinel__hosts": [f"127.0.0.1:{free_port()}"],
        "sentinel__service": words.replace(" ", "-"),
    }
    assert told("redis://x", **sentinel) == [QueueUnavailable] * 2


def test_a_server_that_restarts_under_its_clients() -> None:
    """Its socket's path is in the text of each error."""
    with LocalRedis() as server:
        path = server.folder / "my-cluster"
        path.symlink_to(server.folder)
        url = f"unix://{path}/{server.url.rpartition('/')[2]}"
        with Client(settings=quick_settings(url)) as client:
            client.submit(JOB)
            server.kill()
            with pytest.raises(QueueUnavailable):
                client.submit(JOB)
