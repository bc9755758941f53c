"""The async client's connections: a set for each event loop that it is used in.

A connection belongs to the loop that opened it. A program may use one client in several loops,
one after the other (`asyncio.run` twice) or at once (a thread each).
"""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Final

from mlx_serving.common.protocol.client import AsyncProtocol
from mlx_serving.common.redis.connection import connect_async
from mlx_serving.producer.snapshot_reader import SnapshotReader
from mlx_serving.producer.stream_hub import StreamHub

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from mlx_serving.common.redis.connection import Endpoint
    from mlx_serving.producer.snapshot_reader import Queue

CONCURRENT_CALLS: Final = 16
"""Most commands at once: a hundred streams that replay share as many connections."""


class LoopConnections:
    """What one event loop has open."""

    def __init__(self, endpoint: Endpoint, queue_snapshot: Queue) -> None:
        self.redis = connect_async(endpoint)
        self.protocol = AsyncProtocol(self.redis, endpoint.keys)
        self.hub = StreamHub(self.redis)
        self.calls = asyncio.Semaphore(CONCURRENT_CALLS)
        self.snapshots = SnapshotReader(self.redis, queue_snapshot, self.calls)

    async def aclose(self) -> None:
        """Close them; idempotent."""
        await self.hub.aclose()
        await self.redis.aclose()


class ConnectionsByLoop:
    """Opens a loop's connections when it first needs them, and closes them when it ends."""

    def __init__(self, endpoint: Endpoint, queue_snapshot: Queue) -> None:
        self._endpoint, self._queue_snapshot = endpoint, queue_snapshot
        self._lock = threading.Lock()  # loops run in several threads
        self._open: dict[asyncio.AbstractEventLoop, LoopConnections] = {}
        self._guards: dict[asyncio.AbstractEventLoop, AsyncGenerator[None, None]] = {}

    async def here(self) -> LoopConnections:
        """Return the running loop's."""
        loop = asyncio.get_running_loop()
        with self._lock:
            connections = self._open.get(loop)
            if connections is not None:
                return connections
            self._forget_closed_loops()
            connections = LoopConnections(self._endpoint, self._queue_snapshot)
            self._open[loop] = connections
            guard = self._guards[loop] = self._until_the_end(loop)
        await anext(guard)
        return connections

    async def aclose(self) -> None:
        """Close those of the running loop; idempotent."""
        guard = self._guards.get(asyncio.get_running_loop())
        if guard is not None:
            await guard.aclose()

    async def _until_the_end(self, loop: asyncio.AbstractEventLoop) -> AsyncGenerator[None, None]:
        """Close a loop's connections when this generator is closed.

        `asyncio.run` closes the generators that are still open before it closes the loop.
        """
        try:
            yield
        finally:
            with self._lock:
                self._guards.pop(loop, None)
                connections = self._open.pop(loop)
            await connections.aclose()

    def _forget_closed_loops(self) -> None:
        """Drop what a loop left that was closed without closing its generators."""
        for loop in [loop for loop in self._open if loop.is_closed()]:
            del self._open[loop], self._guards[loop]
