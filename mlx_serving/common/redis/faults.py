"""Tells what an error of redis-py means: our error for it, by code and plain words. Pure."""

from __future__ import annotations

import re
import ssl
from typing import TYPE_CHECKING, Final

from redis import exceptions

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
    summary,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

LONGEST: Final = 300  # characters of what Redis said

BY_CODE: Final[dict[str, type[QueueFailure]]] = {
    "NOAUTH": WrongCredentials, "WRONGPASS": WrongCredentials,
    "NOPERM": MissingPermission, "DENIED": MissingPermission,
    "LOADING": RedisLoading, "OOM": RedisFull, "BUSY": QueueUnavailable,
    "UNBLOCKED": QueueUnavailable,  # of a blocking command: the server becomes a replica
    "READONLY": RedisReadOnly, "MISCONF": RedisReadOnly, "NOREPLICAS": RedisReadOnly,
    "MASTERDOWN": QueueUnavailable,
    "ASK": UnsupportedRedis, "CLUSTERDOWN": UnsupportedRedis, "CROSSSLOT": UnsupportedRedis,
    "MOVED": UnsupportedRedis, "TRYAGAIN": UnsupportedRedis,
}  # fmt: skip
"""By the first word of Redis's reply."""

BY_WORDS: Final[tuple[tuple[str, type[QueueFailure]], ...]] = (
    # Redis 7.0 says of a command that a script may not run: `ERR The user executing the script
    # can't …`; later ones and Valkey say NOPERM.
    ("the user executing the script can't", MissingPermission),
    ("acl failure in script", MissingPermission),
    ("no permissions to", MissingPermission),
    ("cluster mode", UnsupportedRedis),
    ("cluster support", UnsupportedRedis),
    ("'no-cluster' flag", UnsupportedRedis),
    ("key in a cluster node", UnsupportedRedis),
    ("do not hash to the same slot", UnsupportedRedis),
    ("undeclared key", UnsupportedRedis),
    ("unknown command", UnsupportedRedis),
    ("unauthenticated", WrongCredentials),  # of a command that is long: `multibulk length`
    ("invalid password", WrongCredentials),
    ("no password is set", WrongCredentials),
    ("db index", WrongDatabase),
    ("max number of clients", RedisCrowded),
    ("too many connections", RedisCrowded),
)
"""By what a server's text has in it, in small letters, if its first word says nothing."""

BY_CLASS: Final[tuple[tuple[type[Exception], type[QueueFailure]], ...]] = (
    (exceptions.AuthenticationError, WrongCredentials),
    (exceptions.AuthorizationError, WrongCredentials),
    (exceptions.NoPermissionError, MissingPermission),
    (exceptions.BusyLoadingError, RedisLoading),
    (exceptions.ReadOnlyError, RedisReadOnly),
    (exceptions.OutOfMemoryError, RedisFull),
    (exceptions.MasterDownError, QueueUnavailable),
    (exceptions.MaxConnectionsError, RedisCrowded),
    (exceptions.ConnectionError, QueueUnavailable),
    (exceptions.InvalidResponse, QueueUnavailable),  # half a reply, or another's: connect anew
    (exceptions.TimeoutError, QueueUnavailable),
    (OSError, QueueUnavailable),
)

# The whole command stands before it, a payload included.
_OF_PIPELINE: Final = "of pipeline caused error: "
_AS_TUPLE: Final = re.compile(r"^\(([\"'])(.*)\1,\)$", re.DOTALL)  # as asyncio's pipeline has it
# What comes after it may be a password (HELLO, AUTH).
_ARGUMENTS: Final = re.compile(r",? with args beginning with:.*", re.DOTALL)
_PLACE_IN_SCRIPT: Final = re.compile(r"\.? script: (?:[0-9a-f]{40}, )?on @user_script:\d+\.?")
# `Error running script (call to f_…): @user_script:12: NOPERM …`
_IN_SCRIPT: Final = re.compile(r"@user_script: ?\d+: -?([A-Z]+) ")
# `EXECABORT Transaction discarded because of: NOREPLICAS …`
_IN_TRANSACTION: Final = re.compile(r"Transaction discarded because of: -?([A-Z]+) ")
# A Sentinel's client tells of its own errors within the text of another one, each after the
# Sentinel's repr, which ends in a bracket.
_SENTINEL_REFUSES: Final = re.compile(
    r"^No master found for .*[>)] - (?:auth:)?AuthenticationError\b", re.DOTALL
)


class TlsMismatchError(exceptions.ConnectionError):
    """Only one side speaks TLS, a file of ours can't be read, or our certificate is refused."""


def fault_of(error: Exception) -> QueueFailure:
    """Our error for one of redis-py's or the system's; `retryable` says whether waiting mends it.

    Its message tells what Redis said without any part of a command: that may be a secret.
    """
    error = _innermost(error)
    text = _said(error)
    kind = _kind(error, text)
    return kind(f"{summary(kind)} ({text})" if text else None)


def _innermost(error: Exception) -> Exception:
    """Return the error that an asyncio connection wrapped in a ConnectionError of its own."""
    inner = error.__cause__
    if isinstance(inner, exceptions.RedisError) and str(inner) == str(error):
        return inner
    return error


def _said(error: Exception) -> str:
    text = _AS_TUPLE.sub(r"\2", str(error).rpartition(_OF_PIPELINE)[2])
    text = _PLACE_IN_SCRIPT.sub("", _ARGUMENTS.sub("", text))
    return " ".join(text.split())[:LONGEST].rstrip(".")


def _kind(error: Exception, text: str) -> type[QueueFailure]:
    if isinstance(error, TlsMismatchError) or any(map(_is_of_tls, _chain(error))):
        return TlsFailed
    if _of_server(error) and (said := _kind_said(error, text)) is not None:
        return said
    if isinstance(error, exceptions.ConnectionError) and _SENTINEL_REFUSES.search(text):
        return WrongCredentials
    return next((kind for of, kind in BY_CLASS if isinstance(error, of)), QueueRefused)


def _of_server(error: Exception) -> bool:
    """Whether its text is a server's; any other may hold a host, a path or a service's name."""
    return isinstance(error, exceptions.ResponseError) or bool(getattr(error, "status_code", None))


def _kind_said(error: Exception, text: str) -> type[QueueFailure] | None:
    inner = _IN_SCRIPT.search(text) or _IN_TRANSACTION.search(text)
    codes = (
        getattr(error, "status_code", None) or "",
        inner[1] if inner else "",
        text.partition(" ")[0],
    )
    by_code = next((BY_CODE[code] for code in codes if code in BY_CODE), None)
    if by_code is not None:
        return by_code
    lower = text.lower()
    return next((kind for words, kind in BY_WORDS if words in lower), None)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:  # redis-py makes rings of them
        yield error
        seen.add(id(error))
        error = error.__cause__ or (error.__context__ if _within_call(error.__context__) else None)


def _within_call(error: BaseException | None) -> bool:
    """Whether redis-py caught it, not a caller who asks Redis while handling an error of his own.

    A traceback begins at the frame that caught its error.
    """
    if error is None or error.__traceback__ is None:
        return error is not None
    caught_in = str(error.__traceback__.tb_frame.f_globals.get("__name__", ""))
    return caught_in.partition(".")[0] == "redis"


def _is_of_tls(error: BaseException) -> bool:
    """Whether TLS itself failed; a connection that was merely cut, as by a restart, is no fault."""
    return isinstance(error, ssl.SSLError) and not isinstance(
        error, ssl.SSLEOFError | ssl.SSLZeroReturnError
    )
