"""A proxy before Redis that runs a request and loses its reply, or goes silent, as networks do."""

from __future__ import annotations

import hashlib
import socket
import tempfile
import threading
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Self

from mlx_serving.common.protocol.scripts import script_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def calls_of(script: str) -> bytes:
    """What every call of one of the protocol's scripts holds."""
    return hashlib.sha1(script_text(script).encode()).hexdigest().encode()  # noqa: S324 -- Redis's own


class LossyProxy:
    """Forwards a unix socket.

    After `lose_reply_to(needle)`, the next requests that hold these bytes reach Redis, their
    replies are dropped and the connections closed, or with `silently` left open. Within
    `blackhole()` nothing is forwarded and nothing closed; what was sent meanwhile arrives late,
    also from who has given up since.
    """

    def __init__(self, upstream: Path) -> None:
        self._upstream = upstream
        self._folder = tempfile.TemporaryDirectory(prefix="mlxs-", dir="/tmp")
        self.socket = Path(self._folder.name) / "proxy.sock"
        self.url = f"unix://{self.socket}"
        self.lost = 0
        self._needle = b""
        self._to_lose = 0
        self._silently = False
        self._open = threading.Event()
        self._open.set()
        self._listener = socket.socket(socket.AF_UNIX)
        self._sockets: list[socket.socket] = [self._listener]
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        self._listener.bind(str(self.socket))
        self._listener.listen()
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.set()
        for each in list(self._sockets):
            _close(each)
        for thread in self._threads:
            thread.join(5)
        self._folder.cleanup()

    def lose_reply_to(self, needle: bytes, times: int = 1, *, silently: bool = False) -> None:
        self._needle, self._to_lose, self._silently = needle, times, silently

    def lead_to(self, upstream: Path) -> None:
        """Lead new connections to another server, as a name or a virtual address does."""
        self._upstream = upstream

    def cut(self) -> None:
        """Close every connection."""
        for each in self._sockets[1:]:
            _close(each)

    @property
    def losing(self) -> int:
        """How many replies are still to be lost."""
        return self._to_lose

    @contextmanager
    def blackhole(self) -> Iterator[None]:
        self._open.clear()
        try:
            yield
        finally:
            self._open.set()

    def _start(self, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX)
            self._sockets += [client, server]
            try:
                server.connect(str(self._upstream))
            except OSError:  # Redis is away
                _close(client)
                _close(server)
                continue
            lossy = threading.Event()
            self._start(self._requests, client, server, lossy)
            self._start(self._replies, client, server, lossy)

    def _requests(
        self, client: socket.socket, server: socket.socket, lossy: threading.Event
    ) -> None:
        for data in _received(client):
            self._open.wait()
            if self._to_lose and self._needle in data:
                self._to_lose -= 1
                lossy.set()
            with suppress(OSError):
                server.sendall(data)
        _close(server)

    def _replies(
        self, client: socket.socket, server: socket.socket, lossy: threading.Event
    ) -> None:
        for data in _received(server):
            self._open.wait()
            if lossy.is_set():
                self.lost += 1
                if self._silently:
                    continue
                break
            with suppress(OSError):
                client.sendall(data)
        _close(client)
        _close(server)


def _received(source: socket.socket) -> Iterator[bytes]:
    while True:
        try:
            data = source.recv(65536)
        except OSError:
            return
        if not data:
            return
        yield data


def _close(each: socket.socket) -> None:
    with suppress(OSError):
        each.shutdown(socket.SHUT_RDWR)
    each.close()
