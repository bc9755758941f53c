"""Connections over TCP that can tell why TLS fails: the error alone often can't.

A server that speaks TLS cuts a plain connection without a word; a plain Redis never answers the
beginning of a handshake; and a server that asks for our certificate may cut the connection before
its alert is read. So, when a connection is cut while it is set up, its server is asked once more.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from redis import exceptions
from redis.asyncio.connection import Connection as AsyncConnection
from redis.asyncio.connection import SSLConnection as AsyncSSLConnection
from redis.connection import Connection, SSLConnection

from mlx_serving.common.redis.faults import TlsMismatchError

if TYPE_CHECKING:
    from collections.abc import Callable

PROBE_SECONDS: Final = 1.0
ALERT: Final = "ALERT"  # in the reason of an error that the other side sent


def unverified() -> ssl.SSLContext:
    """Context of a handshake that only finds out whether there is one; nothing is sent in it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def speaks_tls(host: str, port: int) -> bool:
    """Whether a server answers the beginning of a TLS handshake."""
    try:
        with _opened(host, port) as plain, unverified().wrap_socket(plain):
            return True
    except ssl.SSLError as error:
        return ALERT in (error.reason or "")
    except OSError:
        return False


def speaks_plainly(host: str, port: int) -> bool:
    """Whether a server answers PING without TLS, be it by an error."""
    try:
        with _opened(host, port) as plain:
            plain.sendall(b"PING\r\n")
            return plain.recv(1) in {b"+", b"-"}
    except OSError:
        return False


def alert_of(host: str, port: int, context: ssl.SSLContext) -> str:
    """What a server says of our certificate after the handshake; "": nothing."""
    try:
        with _opened(host, port) as plain, context.wrap_socket(plain) as over_tls:
            over_tls.recv(1)
    except ssl.SSLError as error:
        return str(error) if ALERT in (error.reason or "") else ""
    except OSError:
        return ""
    return ""


def mismatch(error: Exception, connection: Any) -> TlsMismatchError | None:  # noqa: ANN401 -- one of four
    """Ask the server of a connection that could not be set up; None if it is not for TLS."""
    host, port = connection.host, connection.port
    if not isinstance(connection, SSLConnection | AsyncSSLConnection):
        if _cut(error) and speaks_tls(host, port):
            return TlsMismatchError(f"{host}:{port} speaks TLS, and this URL begins with redis://")
        return None
    if (text := unreadable(connection)) is not None:
        return TlsMismatchError(text)
    if isinstance(error, exceptions.TimeoutError) or _cut(error):
        if speaks_plainly(host, port):
            text = f"{host}:{port} speaks no TLS, and this URL begins with rediss://"
            return TlsMismatchError(text)
        if _cut(error) and (alert := alert_of(host, port, _context(connection))):
            return TlsMismatchError(f"{host}:{port} refuses our certificate: {alert}")
    return None


def unreadable(connection: SSLConnection | AsyncSSLConnection) -> str | None:
    """Which of a connection's files can't be read, and why; None if all can."""
    files = {
        "redis.tls_ca": connection.ca_certs,
        "redis.tls_cert": connection.certfile,
        "redis.tls_key": connection.keyfile,
    }
    for name, path in files.items():
        try:
            if path:
                Path(path).open("rb").close()
        except OSError as error:
            return f"{name}: {path}: {error.strerror}"
    return None


def _opened(host: str, port: int) -> socket.socket:
    return socket.create_connection((host, port), timeout=PROBE_SECONDS)


def _cut(error: Exception) -> bool:
    """Whether the other side ended the connection; a refused one was never there."""
    causes = (error.__cause__, error.__context__)
    ended = (ConnectionResetError, BrokenPipeError, ssl.SSLEOFError, ssl.SSLZeroReturnError)
    return any(isinstance(cause, ended) for cause in causes) or "closed" in str(error).lower()


def _context(connection: Any) -> ssl.SSLContext:  # noqa: ANN401 -- as above
    """With our certificate, if there is one; the server's has been verified already."""
    context = unverified()
    if connection.certfile:
        context.load_cert_chain(connection.certfile, connection.keyfile)
    return context


class _Telling:
    """Adds why a blocking connection could not be set up."""

    def connect_check_health(self, *given: Any, **named: Any) -> None:
        connect = cast("Callable[..., None]", super().connect_check_health)  # type: ignore[misc]
        try:
            connect(*given, **named)
        except (exceptions.ConnectionError, exceptions.TimeoutError) as error:
            if (told := mismatch(error, self)) is not None:
                raise told from error
            raise


class _AsyncTelling:
    """Asyncio twin of `_Telling`."""

    async def connect_check_health(self, *given: Any, **named: Any) -> None:
        connect = cast("Callable[..., Any]", super().connect_check_health)  # type: ignore[misc]
        try:
            await connect(*given, **named)
        except (exceptions.ConnectionError, exceptions.TimeoutError) as error:
            if (told := await asyncio.to_thread(mismatch, error, self)) is not None:
                raise told from error
            raise


class PlainConnection(_Telling, Connection):
    """A blocking connection without TLS."""


class TlsConnection(_Telling, SSLConnection):
    """A blocking connection over TLS."""


class AsyncPlainConnection(_AsyncTelling, AsyncConnection):
    """An asyncio connection without TLS."""


class AsyncTlsConnection(_AsyncTelling, AsyncSSLConnection):
    """An asyncio connection over TLS."""
