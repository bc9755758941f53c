"""Each kind of trouble with Redis, made for real, is told by its own code wherever a user meets it.

A message is one line that says what is wrong and what to do, and has no secret in it.
"""

from __future__ import annotations

import asyncio
import os
import socketserver
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from mlx_serving import AsyncClient, Client
from mlx_serving.cli.doctor.redis_server import redis_checks
from mlx_serving.cli.doctor.report import Level
from mlx_serving.common.errors import (
    EvictingRedis,
    MlxServingError,
    QueueFailure,
    QueueUnavailable,
    RedisCrowded,
    RedisFull,
)
from mlx_serving.common.redis.connection import connect, resolve
from mlx_serving.common.redis.local import LocalRedis
from mlx_serving.common.redis.server import check_server, read_server
from tests.support.troubled_redis import SECRET, TROUBLES, denied, in_trouble
from tests.support.worker_process import InProcessWorker, quick_settings

if TYPE_CHECKING:
    from collections.abc import Callable

JOB: dict[str, Any] = {"model": "tally", "prompt": "my-secret-prompt", "result_ttl": 60}
ID = "0" * 32
WRITES, READS = ("submit", "submit_many"), ("status", "result", "stream")
NO_RETRY_S = 2.0  # a refusal comes at once; the retries of an outage alone take most of a second


def ways(client: Client) -> dict[str, Callable[[], object]]:
    """The calls of a client."""
    return {
        "submit": lambda: client.submit(JOB),
        "submit_many": lambda: client.submit_many([JOB] * 300),
        "cancel": lambda: client.cancel(ID),
        "status": lambda: client.status(ID),
        "result": lambda: client.result(ID),
        "stream": lambda: list(client.stream(ID)),
    }


def async_ways(client: AsyncClient) -> dict[str, Callable[[], Any]]:
    async def stream() -> object:
        return [event async for event in client.stream(ID)]

    return {
        "submit": lambda: client.submit(JOB),
        "submit_many": lambda: client.submit_many([JOB] * 300),
        "cancel": lambda: client.cancel(ID),
        "status": lambda: client.status(ID),
        "result": lambda: client.result(ID),
        "stream": stream,
    }


def checked(error: MlxServingError, told: type[MlxServingError], way: str) -> None:
    # Whether a crowded server's refusal is read before the connection closes is a race.
    kinds = {told, QueueUnavailable} if told is RedisCrowded else {told}
    assert type(error) in kinds, (way, error)
    assert isinstance(error, QueueFailure)
    text = str(error)
    assert "\n" not in text
    assert SECRET not in text
    assert "my-secret-prompt" not in text


def expected(name: str) -> list[str]:
    """The calls that this trouble keeps from answering."""
    trouble = TROUBLES[name]
    return [*(WRITES if trouble.writes else ()), *(READS if trouble.reads else ())]


@pytest.mark.parametrize("name", TROUBLES)
def test_a_client_is_told(name: str) -> None:
    with in_trouble(name) as url, Client(settings=quick_settings(url)) as client:
        for way in expected(name):
            began = time.monotonic()
            with pytest.raises(MlxServingError) as raised:
                ways(client)[way]()
            checked(raised.value, TROUBLES[name].told, way)
            if not raised.value.retryable:
                assert time.monotonic() - began < NO_RETRY_S, way


@pytest.mark.parametrize("name", TROUBLES)
def test_an_async_client_is_told(name: str) -> None:
    async def meet(url: str) -> None:
        async with AsyncClient(settings=quick_settings(url)) as client:
            for way in expected(name):
                with pytest.raises(MlxServingError) as raised:
                    await async_ways(client)[way]()
                checked(raised.value, TROUBLES[name].told, way)

    with in_trouble(name) as url:
        asyncio.run(meet(url))


def run(url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "MLX_SERVING_REDIS_URL": url}
    command = [sys.executable, "-m", "mlx_serving", *arguments]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


COMMANDS = [
    ("status",), ("status", ID), ("cancel", ID), ("top", "--count", "1"), ("tenants", "list"),
    ("generate", "hi"), ("batch", "list"),
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_command_prints_one_line(command: tuple[str, ...]) -> None:
    with in_trouble("wrong password") as url:
        done = run(url, *command)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: redis_wrong_password: ")
    assert SECRET not in line


UNUSABLE = [
    "wrong password", "no such database", "may run no script", "may touch no key", "a Cluster",
]  # fmt: skip
WORKER = ("worker", "--engine", "simulated")


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_worker_that_no_retry_helps_exits_78(name: str) -> None:
    """EX_CONFIG: launchd and systemd, as `ops/` sets them up, don't start it again and again."""
    with in_trouble(name) as url:
        done = run(url, *WORKER)
    assert done.returncode == 78
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {TROUBLES[name].told.code}: ")


def test_a_worker_whose_redis_is_away_may_be_started_again() -> None:
    with in_trouble("gone") as url:
        done = run(url, *WORKER)
    assert done.returncode == 1
    assert done.stderr.startswith("error: queue_unavailable: ")


class Puzzling(socketserver.BaseRequestHandler):
    """Answers everything with an error that nobody knows."""

    def handle(self) -> None:
        while self.request.recv(4096):
            self.request.sendall(b"-ODD moment\r\n")


def test_a_worker_may_be_started_again_after_an_error_that_nobody_knows() -> None:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Puzzling) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        done = run(f"redis://127.0.0.1:{server.server_address[1]}", *WORKER)
        server.shutdown()
    assert done.returncode == 1
    assert done.stderr.startswith("error: queue_refused: ")


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
def test_a_worker_refuses_a_redis_that_evicts(policy: str) -> None:
    with LocalRedis(options={"maxmemory": "8mb", "maxmemory-policy": policy}) as server:
        done = run(server.url, *WORKER)
    assert done.returncode == 78
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: redis_evicts: ")
    assert policy in line


@pytest.mark.parametrize("rules", [("-info",), ("-hello",), ("-config",), ("-info", "-hello")])
def test_the_policy_is_found_without_info_and_with_narrow_rules(rules: tuple[str, ...]) -> None:
    with LocalRedis(options={"maxmemory": "8mb", "maxmemory-policy": "allkeys-lru"}) as server:
        url = denied(*rules)(server)
        with connect(resolve(quick_settings(url))) as client, pytest.raises(EvictingRedis):
            check_server(read_server(client))


def test_what_nobody_may_tell_is_unknown_and_named() -> None:
    with LocalRedis(options={"maxmemory": "8mb", "maxmemory-policy": "allkeys-lru"}) as server:
        url = denied("-info", "-config", "-hello")(server)
        with connect(resolve(quick_settings(url))) as client:
            told = read_server(client)
    check_server(told)
    # HELLO is every user's, whatever its rules.
    assert (told.mode, told.unknown) == ("standalone", ["maxmemory-policy"])


@pytest.mark.parametrize("name", ["wrong password", "a Cluster", "no such database"])
def test_a_doctor_names_it(name: str) -> None:
    with in_trouble(name) as url:
        failed = [
            check
            for check in redis_checks(resolve(quick_settings(url)))
            if check.level is Level.FAIL
        ]
    assert any(TROUBLES[name].told.code in check.detail for check in failed), failed
    assert not [check for check in failed if SECRET in check.detail]


def test_nothing_is_written_to_a_cluster() -> None:
    """Also where each key by itself is this shard's: a script would write some of them."""
    with in_trouble("a Cluster") as url, Client(settings=quick_settings(url)) as client:
        for _ in range(6):
            with pytest.raises(QueueFailure):
                client.submit(JOB)
        with connect(client.endpoint) as admin:
            assert admin.dbsize() == 0


def test_jobs_before_a_full_memory_stay_and_the_rest_is_refused() -> None:
    """`submit_many` meets it midway: none is acknowledged that is not whole."""
    with LocalRedis() as server, Client(settings=quick_settings(server.url)) as client:
        with server.client() as admin:
            admin.config_set("maxmemory", str(admin.info("memory")["used_memory"] + 2_000_000))
            with pytest.raises(RedisFull) as raised:
                client.submit_many([JOB | {"prompt": "x" * 900}] * 5000)
            checked(raised.value, RedisFull, "submit_many")
            queued = admin.llen("rq:queue:tally:default")
            assert queued == admin.zcard(client.keys.open("tally:default"))
            assert len(list(admin.scan_iter("rq:job:*", count=1000))) == queued
        assert queued


def test_a_stream_midway_is_told_at_once() -> None:
    with LocalRedis() as server, server.client() as admin:
        url = denied()(server)
        with (
            InProcessWorker(server.url, rate=50),
            Client(settings=quick_settings(url)) as client,
        ):
            handle = client.submit(JOB | {"max_tokens": 100_000})
            events = handle.stream()
            next(events)
            admin.acl_deluser("app")
            began = time.monotonic()
            with pytest.raises(MlxServingError) as raised:
                list(events)
            assert time.monotonic() - began < 10
            checked(raised.value, TROUBLES["wrong password"].told, "stream")
            with Client(settings=quick_settings(server.url)) as another:
                another.cancel(handle.id)


@pytest.mark.parametrize("option", ["protocol=3", "protocol=2"])
def test_both_protocols_of_redis_are_spoken(option: str) -> None:
    with LocalRedis() as server:
        url = f"{server.url}?{option}"
        settings = quick_settings(url)

        async def use() -> str:
            async with AsyncClient(settings=settings) as client:
                job = await client.submit(JOB | {"max_tokens": 5})
                assert [event.type async for event in job.stream()][-1] == "end"
                return (await job.result(timeout=10)).text

        with InProcessWorker(url, rate=200), Client(settings=settings) as client:
            job = client.submit(JOB | {"max_tokens": 5})
            assert "".join(job.text()) == "1 2 3 4 5"
            running = client.submit(JOB | {"max_tokens": 100_000})
            next(running.stream())
            running.cancel()
            assert running.result(timeout=10).state.value == "cancelled"
            assert asyncio.run(use()) == "1 2 3 4 5"


def test_a_user_without_channels_is_told_by_the_stream() -> None:
    """Not left to poll for ever: by both clients."""
    with LocalRedis() as server:
        url = denied("resetchannels")(server)
        with Client(settings=quick_settings(server.url)) as owner:
            job = owner.submit(JOB)
            with Client(settings=quick_settings(url)) as client, pytest.raises(QueueFailure) as one:
                list(client.stream(job.id))

            async def follow() -> None:
                async with AsyncClient(settings=quick_settings(url)) as client:
                    async with asyncio.timeout(10):
                        async for _ in client.stream(job.id):
                            pass

            with pytest.raises(QueueFailure) as other:
                asyncio.run(follow())
        for error in (one.value, other.value):
            checked(error, TROUBLES["may not publish"].told, "stream")
