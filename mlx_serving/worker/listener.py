"""Wake-ups and commands from pub/sub.

They are hints: if one is lost, the main loop finds out when it looks the next time.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Final

import redis
import structlog

from mlx_serving.worker.rq_worker import read_command

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mlx_serving.common.protocol.keys import Keys

log = structlog.get_logger(__name__)

RETRY_SECONDS: Final = 0.5
READ_SECONDS: Final = 1.0


class Listener(threading.Thread):
    """Listens on the queues' wake channels, our control channel and RQ's command channel.

    `post` takes a message for the main loop, see `Messages`.
    """

    def __init__(
        self,
        connection: redis.Redis,
        keys: Keys,
        worker: str,
        queues: Sequence[str],
        post: Callable[[str, str], None],
    ) -> None:
        super().__init__(name="listener", daemon=True)
        self._redis, self._post = connection, post
        self._control = keys.control(worker).encode()
        self._commands = keys.rq_commands(worker).encode()
        self._wakes = {keys.wake(q).encode(): q for q in queues}
        self._stopping = threading.Event()

    def stop(self) -> None:
        """End the thread within a second."""
        self._stopping.set()

    def run(self) -> None:
        """Subscribe and read; subscribe again after an error of the connection."""
        while not self._stopping.is_set():
            try:
                self._read_until_fault()
            except (redis.RedisError, OSError) as error:
                log.debug("listener_reconnects", reason=type(error).__name__)
                self._stopping.wait(RETRY_SECONDS)

    def _read_until_fault(self) -> None:
        with self._redis.pubsub(ignore_subscribe_messages=True) as pubsub:  # type: ignore[no-untyped-call]
            pubsub.subscribe(self._control, self._commands, *self._wakes)
            self._post("wake", "")  # a job may have come while nobody listened
            while not self._stopping.is_set():
                message = pubsub.get_message(timeout=READ_SECONDS)
                if message is not None:
                    self._dispatch(message)

    def _dispatch(self, message: dict[str, Any]) -> None:
        channel, data = message["channel"], message["data"]
        if channel == self._control:
            what, _, job_id = data.decode(errors="replace").partition(" ")
            if what == "cancel":
                self._post("cancel", job_id)
        elif channel == self._commands:
            what, job_id = read_command(data)
            if what == "cancel":
                self._post("stop_job", job_id)
            elif what == "shutdown":
                self._post("drain", "")
        else:
            self._post("wake", self._wakes.get(channel, ""))
