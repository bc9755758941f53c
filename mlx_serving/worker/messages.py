"""Messages to the worker's main loop."""

from __future__ import annotations

import queue


class Messages:
    """What other threads and signal handlers leave for the main loop.

    Each is a word and an argument, which may be "":

    - "wake" <queue>: jobs may have come; "": in any queue
    - "room": rows left the batch, requests entered it, or a model was loaded
    - "cancel" <job id>: a held job may have been cancelled
    - "stop_job" <job id>: RQ's stop-job
    - "drain": finish the held jobs within the drain time, then stop
    - "recycle" <reason>: drain, so that a fresh child takes over
    - "hand_over": release what is held, and stop at once
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()

    def post(self, what: str, argument: str = "") -> None:
        """Leave a message; safe from any thread and from signal handlers."""
        self._queue.put((what, argument))

    def get(self, timeout: float) -> tuple[str, str]:
        """Wait for a message.

        Raises:
            queue.Empty: none came within `timeout` seconds.

        """
        return self._queue.get(timeout=timeout)

    def get_nowait(self) -> tuple[str, str]:
        """Take a message that is there.

        Raises:
            queue.Empty: there is none.

        """
        return self._queue.get_nowait()
