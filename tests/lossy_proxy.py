"""A proxy before Redis that executes a request and loses its reply, as a network does."""

from __future__ import annotations

import socket
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType


class LossyProxy:
    """Forwards a unix socket; after `lose_reply_to(needle)`, the next request that holds
    these bytes reaches Redis, its reply is dropped and the connection closed.
    """

    def __init__(self, upstream: Path) -> None:
        self._upstream = upstream
        self._folder = tempfile.TemporaryDirectory(prefix="mlxs-", dir="/tmp")
        self.socket = Path(self._folder.name) / "proxy.sock"
        self.url = f"unix://{self.socket}"
        self.lost = 0
        self._needle: bytes | None = None
        self._listener = socket.socket(socket.AF_UNIX)
        self._sockets: list[socket.socket] = [self._listener]
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        self._listener.bind(str(self.socket))
        self._listener.listen()
        self._start(self._accept)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for each in list(self._sockets):
            _close(each)
        for thread in self._threads:
            thread.join(5)
        self._folder.cleanup()

    def lose_reply_to(self, needle: bytes) -> None:
        self._needle = needle

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
            server.connect(str(self._upstream))
            self._sockets += [client, server]
            lossy = threading.Event()
            self._start(self._requests, client, server, lossy)
            self._start(self._replies, client, server, lossy)

    def _requests(
        self, client: socket.socket, server: socket.socket, lossy: threading.Event
    ) -> None:
        for data in _received(client):
            if self._needle is not None and self._needle in data:
                self._needle = None
                lossy.set()
            server.sendall(data)
        _close(server)

    def _replies(
        self, client: socket.socket, server: socket.socket, lossy: threading.Event
    ) -> None:
        for data in _received(server):
            if lossy.is_set():
                self.lost += 1
                break
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
