"""Live messages of one job on a connection of its own: the sync client's fast path.

Each stream has its own connection, which the caller's thread reads. So a slow caller
is slowed by its own socket: Redis drops a connection that falls megabytes behind, and
the replay after the reconnect brings the rest. There is no reader thread to start, to
stop at exit, to survive a fork or to share. A process that follows many streams should
use the async client, whose streams share one connection.
"""

from __future__ import annotations

import math
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal

from mlx_serving.common.redis.retrying import FAULTS
from mlx_serving.producer.retry_window import RetryWindow

if TYPE_CHECKING:
    from redis import Redis

    from mlx_serving.common.events import Event
    from mlx_serving.producer.base import Reader

Kind = Literal["message", "subscribe", "other"]


def read_push(response: object) -> tuple[Kind, bytes, bytes]:
    """Read what a subscribed connection received: its kind, channel and payload.

    RESP2 and RESP3 encode it as a list; the answer to a RESP2 PING is plain bytes.
    """
    if isinstance(response, list) and len(response) == 3:  # noqa: PLR2004 -- kind, channel, data
        kind, channel, data = response
        if kind == b"message":
            return "message", channel, data
        if kind == b"subscribe":
            return "subscribe", channel, b""
    return "other", b"", b""


class LiveFeed:
    """Subscribes to one channel, without redis-py's own silent reconnects."""

    def __init__(self, redis: Redis, channel: str) -> None:
        self._pool = redis.connection_pool
        self._channel = channel
        self._connection: Any = None
        self._retries = RetryWindow(math.inf, math.inf)  # meanwhile the job's stream is read
        self._retry_at_s = 0.0

    def wait(self, reader: Reader, timeout_s: float) -> list[Event]:
        """Wait for live messages and feed the reader; tell it of silence and of a loss."""
        try:
            if self._connection is None:
                self._subscribe(timeout_s)
            if self._connection is None or not self._connection.can_read(timeout=timeout_s):
                reader.silent()
                return []
            return self._read(reader)
        except FAULTS as error:
            self.close()
            reader.disconnected()
            self._retry_at_s = time.monotonic() + self._retries.failed(error, time.monotonic())
            return []

    def close(self) -> None:
        """Drop the connection; idempotent."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(*FAULTS):
                connection.disconnect()
            self._pool.release(connection)

    def _subscribe(self, timeout_s: float) -> None:
        """Open a connection, unless the pause after the last loss is not over."""
        pause_s = self._retry_at_s - time.monotonic()
        if pause_s > 0:
            time.sleep(min(pause_s, timeout_s))
            return
        self._connection = self._pool.get_connection()
        self._connection.send_command("SUBSCRIBE", self._channel, check_health=False)

    def _read(self, reader: Reader) -> list[Event]:
        """Read arrived messages until one of them makes events ready."""
        ready: list[Event] = []
        while not ready and self._connection.can_read(timeout=0):
            kind, _, payload = read_push(self._connection.read_response(push_request=True))
            if kind == "message":
                ready += reader.receive(payload)
            elif kind == "subscribe":
                self._retries.succeeded()
                reader.subscribed()
        return ready
