"""One pub/sub connection that feeds every stream of an async client.

Streams open and close mailboxes. One task owns the connection: it subscribes and
unsubscribes as mailboxes come and go, and connects again after a loss. A mailbox is
bounded: a consumer that falls behind loses its messages, is told so, and reads the
job's stream instead. So a slow consumer never costs memory.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import structlog
from redis.exceptions import ConnectionError as RedisConnectionError

from mlx_serving.common.errors import QueueRefused
from mlx_serving.common.redis.retrying import FAULTS
from mlx_serving.producer.live_feed import read_push
from mlx_serving.producer.retry_window import RetryWindow

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from mlx_serving.common.events import Event
    from mlx_serving.producer.base import Reader

MAILBOX_EVENTS: Final = 256
PING_S: Final = 5.0  # a connection silent this long is asked whether it lives

_log = structlog.get_logger(__name__)


class Mailbox:
    """Messages that arrived for one stream and are not read yet, bounded."""

    def __init__(self, channel: str, limit: int = MAILBOX_EVENTS) -> None:
        self.channel = channel
        self._limit = limit
        self._payloads: deque[bytes] = deque()
        self._news = asyncio.Event()
        self._lost = self._confirmed = self._dropped = False
        self._refusal: QueueRefused | None = None

    def put(self, payload: bytes) -> None:
        """Take a message; if full, drop all unread ones: the job's stream has them."""
        if len(self._payloads) >= self._limit:
            self._payloads.clear()
            self._dropped = True
        self._payloads.append(payload)
        self._news.set()

    def confirmed(self) -> None:
        """Note that the channel is subscribed from here on."""
        self._payloads.clear()
        self._confirmed = True
        self._news.set()

    def lost(self) -> None:
        """Note that the connection is gone; no message comes until it is confirmed."""
        self._payloads.clear()
        self._lost, self._confirmed = True, False
        self._news.set()

    def refused(self, error: QueueRefused) -> None:
        """Note that no message will come, and why."""
        self._refusal = error
        self._news.set()

    async def wait(self, timeout_s: float) -> bool:
        """Wait until something happened; return False if nothing did within the time."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._news.wait()
        return self._news.is_set()

    def empty_into(self, reader: Reader) -> list[Event]:
        """Hand everything to the reader, in the order in which it happened.

        Raises:
            QueueRefused: Redis refuses the subscription, and would again.

        """
        self._news.clear()
        if self._refusal is not None:
            raise self._refusal
        if self._lost:
            reader.disconnected()
        if self._confirmed:
            reader.subscribed()
        if self._dropped:
            reader.silent()
        self._lost = self._confirmed = self._dropped = False
        ready: list[Event] = []
        while self._payloads:
            ready += reader.receive(self._payloads.popleft())
        return ready


class StreamHub:
    """Shares one pub/sub connection among mailboxes, any number a channel.

    The connection opens with the first mailbox and is kept until :meth:`aclose`.
    """

    def __init__(self, redis: Redis, *, mailbox_events: int = MAILBOX_EVENTS) -> None:
        self._redis = redis
        self._mailbox_events = mailbox_events
        self._mailboxes: dict[bytes, list[Mailbox]] = {}
        self._requested: set[bytes] = set()  # SUBSCRIBE was sent
        self._subscribed: set[bytes] = set()  # and confirmed
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        # Beside the cancellation, which `asyncio.wait_for` can swallow before Python 3.12.
        self._closed = False

    def open(self, channel: str) -> Mailbox:
        """Open a mailbox; the first thing it learns is that the subscription is confirmed."""
        mailbox = Mailbox(channel, self._mailbox_events)
        shared = self._mailboxes.setdefault(channel.encode(), [])
        shared.append(mailbox)
        if channel.encode() in self._subscribed:
            mailbox.confirmed()
        self._changed.set()
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run(), name="mlx-serving stream hub")
        return mailbox

    def close(self, mailbox: Mailbox) -> None:
        """Close a mailbox; the channel is unsubscribed with its last one."""
        channel = mailbox.channel.encode()
        shared = self._mailboxes.get(channel, [])
        if mailbox in shared:
            shared.remove(mailbox)
        if not shared:
            self._mailboxes.pop(channel, None)
            self._changed.set()

    async def aclose(self) -> None:
        """Stop the task and close the connection; idempotent."""
        task, self._task = self._task, None
        self._closed = True
        self._changed.set()
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _run(self) -> None:
        retries = RetryWindow(math.inf, math.inf)  # each stream decides how long it waits
        while not self._closed:
            try:
                await self._session(retries)
            except FAULTS as error:
                _log.info("pubsub_connection_lost", error=type(error).__name__)
                try:
                    pause_s = retries.failed(error, asyncio.get_running_loop().time())
                except QueueRefused as refusal:
                    for mailbox in self._every():
                        mailbox.refused(refusal)
                    return
                await asyncio.sleep(pause_s)

    async def _session(self, retries: RetryWindow) -> None:
        """Serve on one connection until it fails.

        On a bare connection one task only reads and this one only writes: redis-py's
        PubSub would reconnect in either of the two.
        """
        pool: Any = self._redis.connection_pool
        connection = await pool.get_connection()
        reader = asyncio.create_task(self._read(connection, retries))
        try:
            while not (reader.done() or self._closed):
                self._changed.clear()
                await self._follow_changes(connection)
                await self._until_changed(reader)
            if reader.done():
                reader.result()
        finally:
            self._subscribed, self._requested = set(), set()
            for mailbox in self._every():
                mailbox.lost()
            with suppress(*FAULTS):
                await connection.disconnect(nowait=True)
            while not reader.done():
                reader.cancel()
                await asyncio.wait({reader}, timeout=0.1)
            if not reader.cancelled():
                reader.exception()  # else asyncio logs it if the write failed, too
            await pool.release(connection)

    async def _follow_changes(self, connection: Any) -> None:  # noqa: ANN401 -- redis has no type
        """Subscribe to new mailboxes' channels; unsubscribe channels without a mailbox."""
        wanted = set(self._mailboxes)
        for command, channels in (
            ("SUBSCRIBE", wanted - self._requested),
            ("UNSUBSCRIBE", self._requested - wanted),
        ):
            if channels:
                await connection.send_command(command, *channels, check_health=False)
        self._requested = wanted
        self._subscribed &= wanted

    async def _until_changed(self, reader: asyncio.Task[None]) -> None:
        changed = asyncio.create_task(self._changed.wait())
        try:
            await asyncio.wait({reader, changed}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            changed.cancel()

    async def _read(self, connection: Any, retries: RetryWindow) -> None:  # noqa: ANN401 -- as above
        """Put what arrives into mailboxes; send PING if nothing arrives for a while."""
        asked = False
        while True:
            response = await connection.read_response(
                timeout=PING_S, disconnect_on_error=False, push_request=True
            )
            if response is not None:
                self._sort(response)
                asked = False
                retries.succeeded()
            elif asked:
                raise RedisConnectionError("no answer to PING")
            else:
                await connection.send_command("PING", check_health=False)
                asked = True

    def _sort(self, response: object) -> None:
        kind, channel, payload = read_push(response)
        if kind == "message":
            for mailbox in self._mailboxes.get(channel, ()):
                mailbox.put(payload)
        elif kind == "subscribe":
            self._subscribed.add(channel)
            for mailbox in self._mailboxes.get(channel, ()):
                mailbox.confirmed()

    def _every(self) -> list[Mailbox]:
        return [mailbox for shared in self._mailboxes.values() for mailbox in shared]
