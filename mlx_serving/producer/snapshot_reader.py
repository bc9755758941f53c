"""Reads jobs for an async client's streams; reads that are asked for at one moment share a trip."""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from redis.asyncio import Redis

    Queue = Callable[[Any, str, int | None], None]

JOBS_A_TRIP: Final = 64
COMMON_S: Final = 1.0
"""Long waits end at multiples of this, so that the readers of many waiting jobs read together."""


def common_wait_s(wait_s: float, now_s: float) -> float:
    """Shorten a long wait so that it ends together with others'."""
    if wait_s <= COMMON_S:
        return wait_s
    return max(math.floor((now_s + wait_s) / COMMON_S) * COMMON_S - now_s, 0.0)


class _Asked(NamedTuple):
    job_id: str
    after_seq: int | None
    replies: asyncio.Future[list[Any]]


class SnapshotReader:
    """Shares round trips among the readers of one event loop.

    Args:
        redis: the loop's connections.
        queue: puts a job's read into a pipeline: `BaseClient._queue_snapshot`.
        calls: bounds how many round trips are under way.

    """

    def __init__(self, redis: Redis, queue: Queue, calls: asyncio.Semaphore) -> None:
        self._redis, self._queue, self._calls = redis, queue, calls
        self._asked: list[_Asked] = []
        self._trips: set[asyncio.Task[None]] = set()

    async def read(self, job_id: str, after_seq: int | None) -> list[Any]:
        """Return the replies to the job's read. Raises what redis-py does."""
        asked = _Asked(job_id, after_seq, asyncio.get_running_loop().create_future())
        self._asked.append(asked)
        if len(self._asked) == 1:
            trip = asyncio.create_task(self._send(), name="mlx-serving snapshots")
            self._trips.add(trip)
            trip.add_done_callback(self._trips.discard)
        return await asked.replies

    async def _send(self) -> None:
        asked: list[_Asked] = []
        try:
            async with self._calls:
                asked, self._asked = self._asked, []
                for start in range(0, len(asked), JOBS_A_TRIP):
                    await self._trip(asked[start : start + JOBS_A_TRIP])
        except Exception as error:  # noqa: BLE001 -- each reader raises it
            # Of all, not of one trip: else the last would wait for the timeouts of those before.
            for each in asked:
                if not each.replies.done():
                    each.replies.set_exception(error)
        finally:  # the loop ends
            for each in asked:
                each.replies.cancel()

    async def _trip(self, asked: Sequence[_Asked]) -> None:
        lengths = []
        async with self._redis.pipeline(transaction=False) as pipe:
            for job_id, after_seq, _ in asked:
                before = len(pipe)
                self._queue(pipe, job_id, after_seq)
                lengths.append(len(pipe) - before)
            answers: list[Any] = await pipe.execute(raise_on_error=False)
        for each, length in zip(asked, lengths, strict=True):
            replies, answers = answers[:length], answers[length:]
            if each.replies.done():  # its reader went away
                continue
            wrong = next((reply for reply in replies if isinstance(reply, Exception)), None)
            if wrong is None:
                each.replies.set_result(replies)
            else:
                each.replies.set_exception(wrong)
