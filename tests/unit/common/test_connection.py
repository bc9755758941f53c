"""Connections: what the clients are made with, and no retry that we did not ask for."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from redis import exceptions
from redis._parsers.base import BaseParser
from redis.asyncio.connection import SSLConnection as AsyncSSLConnection
from redis.connection import SSLConnection, UnixDomainSocketConnection
from redis.sentinel import SentinelConnectionPool, SentinelManagedSSLConnection

from mlx_serving.common.errors import QueueRefused, QueueUnavailable, RedisCrowded, WrongCredentials
from mlx_serving.common.protocol.keys import Keys
from mlx_serving.common.redis.connection import Endpoint, connect, connect_async
from mlx_serving.common.redis.retrying import answered, answered_async

# ruff: noqa: S106 -- made-up secrets

if TYPE_CHECKING:
    from collections.abc import Callable

SENTINELS = Endpoint(
    url="redis://u@unused/3",
    password="p",
    sentinels=(("a", 1), ("b", 2)),
    sentinel_service="main",
    sentinel_password="sp",
)


def options(client: Any) -> dict[str, Any]:
    made: dict[str, Any] = client.connection_pool.connection_kwargs
    return made


@pytest.mark.parametrize("make", [connect, connect_async])
@pytest.mark.parametrize("endpoint", [Endpoint(), SENTINELS])
def test_nothing_is_sent_twice_by_itself(
    make: Callable[[Endpoint], Any], endpoint: Endpoint
) -> None:
    assert options(make(endpoint))["retry"].get_retries() == 0


@pytest.mark.parametrize("make", [connect, connect_async])
def test_timeouts_are_explicit_and_blocking_has_its_own(make: Callable[..., Any]) -> None:
    endpoint = Endpoint(connect_timeout=1.0, read_timeout=2.0)
    assert options(make(endpoint))["socket_connect_timeout"] == 1.0
    assert options(make(endpoint))["socket_timeout"] == 2.0
    assert options(make(endpoint, block_seconds=10.0))["socket_timeout"] == 12.0
    assert options(make(endpoint))["health_check_interval"] > 0


@pytest.mark.parametrize("make", [connect, connect_async])
def test_credentials_are_passed(make: Callable[[Endpoint], Any]) -> None:
    made = options(make(Endpoint(url="redis://u@h", password="p")))
    assert (made["username"], made["password"]) == ("u", "p")


@pytest.mark.parametrize("make", [connect, connect_async])
@pytest.mark.parametrize("sentinels", [(), (("a", 1),)])
def test_a_password_in_the_url_wins(
    make: Callable[[Endpoint], Any], sentinels: tuple[tuple[str, int], ...]
) -> None:
    made = options(make(Endpoint(url="redis://u:p@h", password="x", sentinels=sentinels)))
    assert (made["username"], made["password"]) == ("u", "p")


def test_a_unix_socket_is_a_url() -> None:
    client = connect(Endpoint(url="unix:///run/x.sock"))
    assert issubclass(client.connection_pool.connection_class, UnixDomainSocketConnection)
    assert options(client)["path"] == "/run/x.sock"


def test_tls_is_the_urls() -> None:
    endpoint = Endpoint(url="rediss://h:1", tls_ca="/ca.pem", tls_cert="/c.pem", tls_key="/k.pem")
    client = connect(endpoint)
    assert issubclass(client.connection_pool.connection_class, SSLConnection)
    assert options(client)["ssl_ca_certs"] == "/ca.pem"
    assert options(client)["ssl_certfile"] == "/c.pem"
    assert options(client)["ssl_keyfile"] == "/k.pem"
    assert issubclass(connect_async(endpoint).connection_pool.connection_class, AsyncSSLConnection)


@pytest.mark.parametrize("make", [connect, connect_async])
def test_sentinel_finds_the_primary_with_credentials_of_its_own(
    make: Callable[[Endpoint], Any],
) -> None:
    pool = make(SENTINELS).connection_pool
    assert pool.service_name == "main"
    assert pool.is_master
    made = pool.connection_kwargs
    assert (made["username"], made["password"], made["db"]) == ("u", "p", 3)
    sentinels = [options(sentinel) for sentinel in pool.sentinel_manager.sentinels]
    assert [(each["host"], each["port"]) for each in sentinels] == [("a", 1), ("b", 2)]
    assert {each["password"] for each in sentinels} == {"sp"}
    assert {each["retry"].get_retries() for each in sentinels} == {0}


def test_sentinel_speaks_tls_to_all() -> None:
    endpoint = Endpoint(url="rediss://unused", tls_ca="/ca.pem", sentinels=(("a", 1),))
    pool = connect(endpoint).connection_pool
    assert isinstance(pool, SentinelConnectionPool)
    assert pool.connection_class is SentinelManagedSSLConnection
    (sentinel,) = pool.sentinel_manager.sentinels
    assert sentinel.connection_pool.connection_class is SSLConnection
    assert options(sentinel)["ssl_ca_certs"] == "/ca.pem"


def test_an_endpoint_spells_its_keys() -> None:
    assert Endpoint(key_prefix="a", rq_prefix="b").keys == Keys("a", "b")


class Flaky:
    """Fails some times, then answers."""

    def __init__(self, failures: int, error: Exception | None = None) -> None:
        self.calls = 0
        self.pauses: list[float] = []
        self._failures = failures
        self._error = error or exceptions.ConnectionError("lost")

    def __call__(self) -> str:
        self.calls += 1
        if self.calls <= self._failures:
            raise self._error
        return "answer"

    def run(self, **keywords: Any) -> str:
        return answered(self, sleep=self.pauses.append, **keywords)

    def run_async(self, **keywords: Any) -> str:
        async def call() -> str:
            return self()

        async def sleep(seconds: float) -> None:
            self.pauses.append(seconds)

        return asyncio.run(answered_async(call, sleep=sleep, **keywords))


RUNS = pytest.mark.parametrize("run", [Flaky.run, Flaky.run_async])


@RUNS
def test_a_lost_reply_is_asked_for_again(run: Callable[..., str]) -> None:
    flaky = Flaky(3)
    assert run(flaky) == "answer"
    assert flaky.calls == 4
    assert len(flaky.pauses) == 3
    assert all(
        low <= pause <= 2 * low for pause, low in zip(flaky.pauses, (0.025, 0.05, 0.1), strict=True)
    )


@RUNS
@pytest.mark.parametrize(
    "error",
    [
        exceptions.TimeoutError("slow"),
        exceptions.BusyLoadingError("loading"),
        exceptions.ReadOnlyError("replica"),
        exceptions.OutOfMemoryError("full"),
        ConnectionResetError("reset"),
    ],
)
def test_an_outage_that_lasts_is_named_as_such(run: Callable[..., str], error: Exception) -> None:
    flaky = Flaky(99, error)
    with pytest.raises(QueueUnavailable, match=str(error)) as raised:
        run(flaky, attempts=3)
    assert flaky.calls == 3
    assert raised.value.retryable
    assert raised.value.__cause__ is error


@RUNS
def test_wrong_credentials_are_not_tried_again(run: Callable[..., str]) -> None:
    flaky = Flaky(99, exceptions.AuthenticationError("no"))
    with pytest.raises(WrongCredentials, match="no"):
        run(flaky)
    assert (flaky.calls, flaky.pauses) == (1, [])


@RUNS
def test_an_error_that_no_retry_mends_is_not_tried_again(run: Callable[..., str]) -> None:
    flaky = Flaky(99, exceptions.ResponseError("WRONGTYPE"))
    with pytest.raises(QueueRefused, match="WRONGTYPE") as raised:
        run(flaky)
    assert (flaky.calls, flaky.pauses) == (1, [])
    assert (raised.value.retryable, raised.value.code) == (False, "queue_refused")


@RUNS
def test_the_failure_that_says_most_is_told(run: Callable[..., str]) -> None:
    """A server that is full of clients says so to some of the tries, and just closes the others."""
    errors = [
        exceptions.ConnectionError("Connection lost"),
        BaseParser.parse_error("ERR max number of clients reached"),
        exceptions.ConnectionError("Connection lost"),
    ]

    class Crowd(Flaky):
        def __call__(self) -> str:
            raise errors[len(self.pauses)]

    with pytest.raises(RedisCrowded):
        run(Crowd(99), attempts=3)
