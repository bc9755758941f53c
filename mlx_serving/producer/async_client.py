"""The asyncio client: the same calls as `Client`, its streams on one shared connection.

It may be made outside an event loop and used in several, each with connections of its own.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, overload

from mlx_serving.common.events import Cursor
from mlx_serving.common.protocol import calls, ended_calls
from mlx_serving.common.protocol.client import AsyncProtocol
from mlx_serving.common.redis.retrying import FAULTS, answered_async
from mlx_serving.common.results import EventsGone
from mlx_serving.common.states import TERMINAL
from mlx_serving.producer.assembler import StreamAssembler
from mlx_serving.producer.base import (
    CANCELLED_BY_CLIENT,
    BaseClient,
    batches,
    check_id,
    not_found,
    text_of,
    wait_s,
)
from mlx_serving.producer.end_watch import EndWatch
from mlx_serving.producer.handles import AsyncJobHandle
from mlx_serving.producer.loop_connections import ConnectionsByLoop
from mlx_serving.producer.refusals import check_admitted, check_forgotten, requeued_state
from mlx_serving.producer.retry_window import RetryWindow
from mlx_serving.producer.snapshot_reader import common_wait_s

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable

    from mlx_serving.common.events import Event
    from mlx_serving.common.protocol.calls import EnqueueReply
    from mlx_serving.common.protocol.client import JobRecord
    from mlx_serving.common.results import GenerationResult
    from mlx_serving.common.settings import Settings
    from mlx_serving.common.states import JobState
    from mlx_serving.producer.base import JobLike, Reader
    from mlx_serving.producer.batch.api import AsyncBatches
    from mlx_serving.producer.stream_hub import Mailbox

T = TypeVar("T")


class AsyncClient(BaseClient):
    """An asyncio producer; see :class:`Client` for what its calls mean and raise."""

    def __init__(
        self,
        url: str | None = None,
        *,
        settings: Settings | None = None,
        model: str | None = None,
        tenant: str | None = None,
    ) -> None:
        super().__init__(url, settings=settings, model=model, tenant=tenant)
        self._connections = ConnectionsByLoop(self.endpoint, self._queue_snapshot)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the running event loop's connections; jobs go on. Idempotent.

        A later call opens connections again. `asyncio.run` closes a loop's at its end by itself.
        """
        await self._connections.aclose()

    @property
    def batches(self) -> AsyncBatches:
        """Bulk files of requests, in the OpenAI Batch format."""
        from mlx_serving.producer.batch.api import AsyncBatches
        from mlx_serving.producer.client import Client

        return AsyncBatches(self.settings, partial(Client, settings=self.settings))

    async def submit(self, job: JobLike | None = None, /, **fields: Any) -> AsyncJobHandle:
        """Enqueue one job; see :meth:`Client.submit`."""
        entry = self._seal(job, fields)
        reply = await self._answered(lambda protocol: protocol.run(calls.enqueue(entry)))
        check_admitted([entry], [reply])
        return AsyncJobHandle(entry.job_id, reply.created, reply.state, self)

    async def submit_many(self, jobs: Iterable[JobLike]) -> list[AsyncJobHandle]:
        """Enqueue jobs in few round trips; see :meth:`Client.submit_many`."""
        entries = self._seal_all(jobs)
        replies: list[EnqueueReply] = []
        for batch in batches(entries):
            for some in await self._answered(partial(AsyncProtocol.run_many, calls=batch)):
                replies += some
        check_admitted(entries, replies)
        return [
            AsyncJobHandle(entry.job_id, reply.created, reply.state, self)
            for entry, reply in zip(entries, replies, strict=True)
        ]

    @overload
    def stream(self, job_id: str, after: str = "") -> AsyncGenerator[Event, None]: ...
    @overload
    def stream(
        self, job_id: str, after: str = "", *, text: Literal[False]
    ) -> AsyncGenerator[Event, None]: ...
    @overload
    def stream(
        self, job_id: str, after: str = "", *, text: Literal[True]
    ) -> AsyncGenerator[str, None]: ...
    def stream(
        self, job_id: str, after: str = "", *, text: bool = False
    ) -> AsyncGenerator[Event, None] | AsyncGenerator[str, None]:
        """Follow a job from a cursor to its end; see :meth:`Client.stream`.

        Close the iterator (`contextlib.aclosing`) if you leave it early: that ends its
        subscription at once, not when it is garbage-collected.
        """
        events = self._follow(check_id(job_id), StreamAssembler(Cursor.parse(after, "after")))
        return self._texts(job_id, events) if text else events

    async def result(self, job_id: str, timeout: float | None = None) -> GenerationResult:  # noqa: ASYNC109 -- as the sync twin
        """Wait for the job's end; return its result record. See :meth:`Client.result`."""
        loop = asyncio.get_running_loop()
        deadline_s = None if timeout is None else loop.time() + timeout
        while (record := await self.status(job_id)).state not in TERMINAL:  # or it was requeued
            async for _ in self._follow(job_id, EndWatch(), deadline_s):
                pass
        return await self._read_result(record)

    async def status(self, job_id: str) -> JobRecord:
        """Read the job's control hash. Raises JobNotFound."""
        record = await self._answered(lambda protocol: protocol.record(check_id(job_id)))
        if record is None:
            raise not_found(job_id)
        return record

    async def cancel(self, job_id: str) -> JobState:
        """Cancel a job; see :meth:`Client.cancel`. Raises JobNotFound."""
        call = calls.cancel(check_id(job_id), CANCELLED_BY_CLIENT)
        state = await self._answered(lambda protocol: protocol.run(call))
        if state is None:
            raise not_found(job_id)
        return state

    async def forget(self, job_id: str) -> None:
        """Delete a job that ended; see :meth:`Client.forget`."""
        call = ended_calls.forget([check_id(job_id)])
        (state,) = await self._answered(lambda protocol: protocol.run(call))
        check_forgotten(job_id, state)

    async def requeue(self, job_id: str) -> JobState:
        """Enqueue a job anew that ended without finishing; see :meth:`Client.requeue`."""
        call = ended_calls.requeue(check_id(job_id))
        return requeued_state(job_id, await self._answered(lambda protocol: protocol.run(call)))

    async def _follow(
        self, job_id: str, reader: Reader, deadline_s: float | None = None
    ) -> AsyncGenerator[Event, None]:
        loop = asyncio.get_running_loop()
        retries, hub = RetryWindow(), (await self._connections.here()).hub
        mailbox: Mailbox | None = None
        try:
            while not reader.ended:
                timeout_s = wait_s(reader, deadline_s, loop.time())
                if reader.needs_replay:
                    ready = await self._replay(job_id, reader, retries)
                elif mailbox is None and reader.wants_live:
                    mailbox = hub.open(self.keys.channel(job_id))
                    continue
                else:
                    ready = await _news(mailbox, reader, timeout_s)
                for event in ready:
                    yield event
        finally:
            if mailbox is not None:
                hub.close(mailbox)

    async def _replay(self, job_id: str, reader: Reader, retries: RetryWindow) -> list[Event]:
        try:
            here = await self._connections.here()
            replies = await here.snapshots.read(job_id, reader.replay_from)
        except FAULTS as error:
            reader.distrust()
            await asyncio.sleep(retries.failed(error, asyncio.get_running_loop().time()))
            return []
        retries.succeeded()
        try:
            return self._feed(reader, job_id, replies)
        except EventsGone as gone:
            record = await self.status(job_id)
            if record.state not in TERMINAL:
                return []  # it was requeued since: its new life is read next
            raise EventsGone(gone.message, result=await self._read_result(record)) from None

    async def _read_result(self, record: JobRecord) -> GenerationResult:
        if record.result:
            return self._result(record, [])
        read = await self._answered(lambda protocol: protocol.read_events(record.job_id))
        return self._result(record, read)

    async def _texts(
        self, job_id: str, events: AsyncGenerator[Event, None]
    ) -> AsyncGenerator[str, None]:
        async for event in events:
            if piece := text_of(event):
                yield piece
        (await self.result(job_id)).raise_for_state()

    async def _answered(self, call: Callable[[AsyncProtocol], Awaitable[T]]) -> T:
        """Run a call that may run twice; see `answered_async` for what it raises."""
        here = await self._connections.here()
        async with here.calls:
            return await answered_async(partial(call, here.protocol))


async def _news(mailbox: Mailbox | None, reader: Reader, timeout_s: float) -> list[Event]:
    """Wait for messages in the mailbox, or without one until the stream is to be read again."""
    timeout_s = common_wait_s(timeout_s, asyncio.get_running_loop().time())
    if mailbox is None:
        await asyncio.sleep(timeout_s)
    elif await mailbox.wait(timeout_s):
        return mailbox.empty_into(reader)
    reader.silent()
    return []
