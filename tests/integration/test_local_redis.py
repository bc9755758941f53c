"""The private redis-server: comes up, keeps what it should over a kill, leaves nothing."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import redis

from mlx_serving.common.errors import MissingDependency, QueueUnavailable
from mlx_serving.common.redis.connection import Endpoint, connect, connect_async
from mlx_serving.common.redis.local import LocalRedis
from tests.support.helpers import leaked_keys


def test_acknowledged_writes_survive_a_kill_with_aof_always() -> None:
    with LocalRedis(appendonly="always") as server, server.client() as client:
        client.set("a", "1")
        server.kill()
        assert server.pid is None
        with pytest.raises(redis.ConnectionError):
            client.get("a")
        server.restart()
        assert client.get("a") == b"1"


def test_without_aof_a_kill_loses_all() -> None:
    with LocalRedis() as server, server.client() as client:
        client.set("a", "1")
        server.restart()
        assert client.get("a") is None


def test_nothing_is_left_after_it() -> None:
    with LocalRedis() as server:
        folder, pid = server.folder, server.pid
        assert folder.exists()
    assert not folder.exists()
    assert server.pid is None
    assert not Path(f"/proc/{pid}").exists()


def test_it_may_listen_on_a_port_too() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with LocalRedis(port=port), connect(Endpoint(url=f"redis://127.0.0.1:{port}/0")) as client:
        assert client.ping()


def test_more_options_may_be_given() -> None:
    with LocalRedis(options={"maxmemory": "64mb"}) as server, server.client() as client:
        assert client.config_get("maxmemory")["maxmemory"] == str(64 * 1024 * 1024)


def test_an_option_that_redis_refuses_is_reported() -> None:
    with pytest.raises(QueueUnavailable, match=r"did not come up:(?s:.*)must be a memory value"):
        LocalRedis(options={"maxmemory": "plenty"}).start()


def test_without_the_program_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(MissingDependency, match="apt-get install redis-server"):
        LocalRedis().start()


async def test_the_asyncio_client_reaches_it(local_redis: LocalRedis) -> None:
    async with connect_async(Endpoint(url=local_redis.url)) as client:
        assert await client.ping()


def test_a_subscriber_may_wait_longer_than_the_read_timeout(local_redis: LocalRedis) -> None:
    endpoint = Endpoint(url=local_redis.url, read_timeout=0.2)
    with connect(endpoint, block_seconds=1.0) as client:
        assert client.blpop(["none"], timeout=0.5) is None
    with connect(endpoint) as client, pytest.raises(redis.TimeoutError):
        client.blpop(["none"], timeout=0.5)


@pytest.mark.may_leak("leaves keys on purpose")
def test_leaked_keys_are_found(redis_client: redis.Redis) -> None:
    redis_client.set("mlxs:job:old", "1")
    redis_client.delete("mlxs:job:old")
    redis_client.hset("mlxs:job:ended", mapping={"st": "finished"})
    redis_client.xadd("mlxs:ev:ended", {"e": "{}"})
    redis_client.set("mlxs:ev:expires", "1", ex=60)
    redis_client.hset("mlxs:job:running", mapping={"st": "running"})
    redis_client.xadd("mlxs:ev:running", {"e": "{}"})
    redis_client.zadd("mlxs:open:m:default", {"running": 1})
    redis_client.rpush("rq:queue:m:default", "running", "ended")
    redis_client.sadd("rq:queues", "rq:queue:m:default")
    assert leaked_keys(redis_client) == [
        "mlxs:ev:ended",
        "mlxs:job:ended",
        "rq:queue:m:default",
    ]
