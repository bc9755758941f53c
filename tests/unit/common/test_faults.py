"""Errors of redis-py become ours by what Redis said, in the words of each server."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING, Final

import pytest
from redis import exceptions
from redis._parsers.base import BaseParser

from mlx_serving.common.errors import (
    MissingPermission,
    QueueFailure,
    QueueRefused,
    QueueUnavailable,
    RedisCrowded,
    RedisFull,
    RedisLoading,
    RedisReadOnly,
    TlsFailed,
    UnsupportedRedis,
    WrongCredentials,
    WrongDatabase,
)
from mlx_serving.common.redis.connection import Endpoint, connect
from mlx_serving.common.redis.faults import BY_CODE, BY_WORDS, TlsMismatchError, fault_of

if TYPE_CHECKING:
    from collections.abc import Callable

SHA: Final = "079e23154335b244b1126b8fe6de15867a4a5675"
SAID: Final[list[tuple[str, type[QueueFailure]]]] = [
    ("WRONGPASS invalid username-password pair or user is disabled.", WrongCredentials),
    ("NOAUTH Authentication required.", WrongCredentials),
    ("ERR invalid password", WrongCredentials),
    ("ERR Protocol error: unauthenticated multibulk length", WrongCredentials),
    ("ERR Client sent AUTH, but no password is set", WrongCredentials),
    # Redis 7.0, 7.4, Valkey; then in scripts of Redis 6, 7.0, 8 and Valkey.
    ("NOPERM this user has no permissions to run the 'evalsha' command", MissingPermission),
    ("NOPERM User w has no permissions to run the 'evalsha' command", MissingPermission),
    ("NOPERM No permissions to access a channel", MissingPermission),
    ("DENIED Redis is running in protected mode because …", MissingPermission),
    (
        (f"ERR Error running script (call to f_{SHA}): @user_script:12: @user_script: 12: -NOPERM "
        "this user has no permissions to run the 'set' command or its subcommand"),
        MissingPermission,
    ),
    (
        (f"ERR The user executing the script can't run this command or subcommand script: {SHA}, "
        "on @user_script:160."),
        MissingPermission,
    ),
    (
        "ERR The user executing the script can't publish to the channel mentioned in the command",
        MissingPermission,
    ),
    (
        (f"NOPERM ACL failure in script: No permissions to access a key script: {SHA}, on "
        "@user_script:431."),
        MissingPermission,
    ),
    (f"OOM command not allowed when used memory > 'maxmemory'. script: {SHA}, on @user_script:1.",
     RedisFull),
    ("OOM allow-oom flag is not set on the script, can not run it when used memory > 'maxmemory'",
     RedisFull),
    ("READONLY You can't write against a read only replica.", RedisReadOnly),
    ("MISCONF Redis is configured to save RDB snapshots, but it's unable to", RedisReadOnly),
    ("NOREPLICAS Not enough good replicas to write.", RedisReadOnly),
    ("LOADING Redis is loading the dataset in memory", RedisLoading),
    ("BUSY Redis is busy running a script.", QueueUnavailable),
    ("MASTERDOWN Link with MASTER is down", QueueUnavailable),
    (("UNBLOCKED force unblock from blocking operation, instance state changed (master -> "
      "replica?)"), QueueUnavailable),
    ("EXECABORT Transaction discarded because of: NOREPLICAS Not enough good replicas to write.",
     RedisReadOnly),
    ("EXECABORT Transaction discarded because of: OOM command not allowed", RedisFull),
    ("EXECABORT Transaction discarded because of: NOPERM User w may not", MissingPermission),
    ("ERR This instance has cluster support disabled", UnsupportedRedis),
    ("ERR max number of clients reached", RedisCrowded),
    ("ERR DB index is out of range", WrongDatabase),
    ("MOVED 8713 127.0.0.1:17812", UnsupportedRedis),
    ("CLUSTERDOWN Hash slot not served", UnsupportedRedis),
    ("CROSSSLOT Keys in request don't hash to the same slot", UnsupportedRedis),
    ("ERR SELECT is not allowed in cluster mode", UnsupportedRedis),
    ("ERR Can not run script on cluster, 'no-cluster' flag is set.", UnsupportedRedis),
    ("ERR Script attempted to access a non local key in a cluster node", UnsupportedRedis),
    ("ERR Script attempted to access keys that do not hash to the same slot", UnsupportedRedis),
    ("ERR script tried accessing undeclared key", UnsupportedRedis),
    ("ERR unknown command 'EVALSHA', with args beginning with: 'hush' ", UnsupportedRedis),
    ("WRONGTYPE Operation against a key holding the wrong kind of value", QueueRefused),
]  # fmt: skip


@pytest.mark.parametrize(("said", "kind"), SAID)
def test_what_a_server_says(said: str, kind: type[QueueFailure]) -> None:
    for parsed in (BaseParser.parse_error(said), exceptions.ResponseError(said)):
        fault = fault_of(parsed)
        assert type(fault) is kind
        assert "hush" not in str(fault)
        assert f"script: {SHA}" not in str(fault)


def test_a_command_of_a_pipeline_is_not_quoted() -> None:
    for text in ("OOM full", "('OOM full',)"):
        error = exceptions.OutOfMemoryError(
            f"Command # 1 (SET k hush) of pipeline caused error: {text}"
        )
        fault = fault_of(error)
        assert type(fault) is RedisFull
        assert str(fault).endswith("(OOM full)")


def test_what_an_asyncio_connection_wraps_is_seen() -> None:
    inner = exceptions.AuthenticationError("invalid username-password pair")
    error = exceptions.ConnectionError(inner)
    error.__cause__ = inner
    assert type(fault_of(error)) is WrongCredentials


@pytest.mark.parametrize(
    ("cause", "kind"),
    [
        (ssl.SSLCertVerificationError(1, "certificate verify failed"), TlsFailed),
        (ssl.SSLError(1, "[X509: KEY_VALUES_MISMATCH] key values mismatch"), TlsFailed),
        (ssl.SSLEOFError(8, "EOF occurred in violation of protocol"), QueueUnavailable),
        (ConnectionResetError(104, "Connection reset by peer"), QueueUnavailable),
    ],
)
def test_a_connection_that_is_cut_is_no_fault_of_tls(
    cause: OSError, kind: type[QueueFailure]
) -> None:
    error = exceptions.ConnectionError("Error while reading")
    error.__context__ = cause
    assert type(fault_of(error)) is kind


def test_one_side_without_tls() -> None:
    fault = fault_of(TlsMismatchError("h:1 speaks no TLS"))
    assert (type(fault), fault.retryable) == (TlsFailed, False)


def test_a_sentinel_that_refuses_our_password() -> None:
    text = "No master found for 'm' : Redis<…> - auth:AuthenticationError"
    assert type(fault_of(exceptions.ConnectionError(text))) is WrongCredentials


ODD_NAMES: Final = [
    *(words for words, _ in BY_WORDS), *BY_CODE,
    "cluster", "svc.cluster.local", "authenticationerror", "auth:AuthenticationError",
]  # fmt: skip
CONNECTING: Final[list[Callable[[str], Exception]]] = [
    lambda name: exceptions.ConnectionError(f"{name} Error 2 connecting to {name}:1. Refused."),
    lambda name: exceptions.ConnectionError(f"Error while reading from {name}:1 : (104, 'reset')"),
    lambda name: exceptions.TimeoutError(f"Timeout reading from {name}:1"),
    lambda name: exceptions.ConnectionError(
        f"No master found for '{name}' : Redis<Connection<host={name},port=1>> - "
        "network:ConnectionError"
    ),
    lambda name: OSError(2, "No such file", f"/run/{name}/redis.sock"),
    TimeoutError,
    lambda name: exceptions.InvalidResponse(f"Protocol Error: {name!r}"),
]


@pytest.mark.parametrize("name", ODD_NAMES)
@pytest.mark.parametrize("error", CONNECTING)
def test_a_name_in_the_text_of_a_connection_says_nothing(
    name: str, error: Callable[[str], Exception]
) -> None:
    assert type(fault_of(error(name))) is QueueUnavailable


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_name_hides_no_refusal_of_a_sentinel(name: str) -> None:
    text = f"No master found for '{name}' : Redis<…<host={name}>> - auth:AuthenticationError"
    assert type(fault_of(exceptions.ConnectionError(text))) is WrongCredentials


def test_a_ring_of_errors_has_an_end() -> None:
    first, second = exceptions.ConnectionError("a"), exceptions.ConnectionError("b")
    first.__cause__, second.__cause__ = second, first
    assert type(fault_of(first)) is QueueUnavailable


def _broken_tls() -> None:
    raise ssl.SSLError(1, "of another server")


def _cut() -> None:
    raise exceptions.ConnectionError("Connection closed by server.")


def test_what_its_caller_handles_is_no_fault_of_redis() -> None:
    client = connect(Endpoint(url="unix:///nowhere/redis.sock"))
    for call in (client.ping, _cut):
        try:
            _broken_tls()
        except ssl.SSLError:
            with pytest.raises(exceptions.ConnectionError) as refused:
                call()
        assert type(fault_of(refused.value)) is QueueUnavailable


def test_every_message_says_what_to_do_in_one_line() -> None:
    for _, kind in SAID:
        if kind is not QueueRefused:
            assert ": " in str(kind())
            assert "\n" not in str(kind())


def test_a_long_text_is_cut() -> None:
    assert len(str(fault_of(exceptions.ResponseError("MISCONF " + "x" * 5000)))) < 500
