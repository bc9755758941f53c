"""The blocking client: submit jobs, stream their events, fetch results, cancel.

Threads may share it. Each stream reads on its caller's thread.
"""

from __future__ import annotations

import time
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, overload

from mlx_serving.common.events import Cursor
from mlx_serving.common.protocol import calls, ended_calls
from mlx_serving.common.protocol.client import Protocol
from mlx_serving.common.redis.connection import connect
from mlx_serving.common.redis.retrying import FAULTS, answered
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
from mlx_serving.producer.handles import JobHandle
from mlx_serving.producer.live_feed import LiveFeed
from mlx_serving.producer.refusals import check_admitted, check_forgotten, requeued_state
from mlx_serving.producer.retry_window import RetryWindow

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable

    from mlx_serving.common.events import Event
    from mlx_serving.common.protocol.client import JobRecord
    from mlx_serving.common.results import GenerationResult
    from mlx_serving.common.settings import Settings
    from mlx_serving.common.states import JobState
    from mlx_serving.producer.base import JobLike, Reader
    from mlx_serving.producer.batch.api import Batches

T = TypeVar("T")


class Client(BaseClient):
    """A blocking producer.

    Every call may raise QueueUnavailable (``retryable``) if Redis is away. The call may then
    be made again: to send it twice has the same effect as once. It raises QueueRefused at once for
    what no retry mends, such as a wrong password; `code` names each kind.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        settings: Settings | None = None,
        model: str | None = None,
        tenant: str | None = None,
    ) -> None:
        super().__init__(url, settings=settings, model=model, tenant=tenant)
        self._redis = connect(self.endpoint)
        # Streams hold their connection; commands must not wait for one of those.
        self._live = connect(self.endpoint)
        self._protocol = Protocol(self._redis, self.keys)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections; jobs go on. Idempotent; later calls open them again."""
        self._live.close()
        self._redis.close()

    @property
    def batches(self) -> Batches:
        """Bulk files of requests, in the OpenAI Batch format."""
        from mlx_serving.producer.batch.api import Batches

        return Batches(self.settings, partial(Client, settings=self.settings))

    def submit(self, job: JobLike | None = None, /, **fields: Any) -> JobHandle:
        """Enqueue one job, given as a `GenerationJob`, a mapping, or keywords.

        Raises:
            InvalidJob: a field is wrong; the message names each one.
            IdempotencyConflict: the job's ``idempotency_key`` names a job with another payload.
            TenantRowsExceeded: the job's ``n`` is more rows than its tenant may ever run.
            TenantLimited: the job's tenant is at its limit of queued jobs; nothing is written.
            QueueUnavailable: Redis is away, and the job may or may not have been enqueued.
                Give an ``idempotency_key`` to submit it again without a duplicate.

        """
        entry = self._seal(job, fields)
        reply = answered(lambda: self._protocol.run(calls.enqueue(entry)))
        check_admitted([entry], [reply])
        return JobHandle(entry.job_id, reply.created, reply.state, self)

    def submit_many(self, jobs: Iterable[JobLike]) -> list[JobHandle]:
        """Enqueue jobs in few round trips; if one is invalid, none is enqueued.

        Raises:
            InvalidJob: fields are wrong; paths begin with ``jobs[i].``; nothing is written.
            IdempotencyConflict, TenantRowsExceeded: as in `submit`, and the next as well. With
                these three other jobs were enqueued: the error's ``job_ids`` says which.
            TenantLimited: a tenant has reached its limit of queued jobs.
            QueueUnavailable: Redis is away; the first ones may have been enqueued.

        """
        entries = self._seal_all(jobs)
        replies = [
            reply
            for batch in batches(entries)
            for some in answered(partial(self._protocol.run_many, batch))
            for reply in some
        ]
        check_admitted(entries, replies)
        return [
            JobHandle(entry.job_id, reply.created, reply.state, self)
            for entry, reply in zip(entries, replies, strict=True)
        ]

    @overload
    def stream(self, job_id: str, after: str = "") -> Generator[Event, None, None]: ...
    @overload
    def stream(
        self, job_id: str, after: str = "", *, text: Literal[False]
    ) -> Generator[Event, None, None]: ...
    @overload
    def stream(
        self, job_id: str, after: str = "", *, text: Literal[True]
    ) -> Generator[str, None, None]: ...
    def stream(
        self, job_id: str, after: str = "", *, text: bool = False
    ) -> Generator[Event, None, None] | Generator[str, None, None]:
        """Follow a job from the event after the cursor ``after`` to its end.

        Each event comes once and in order, even if the connection is lost or another worker
        takes over. With ``text``, yield the new text of choice 0; after the last text, raise
        what `GenerationResult.raise_for_state` does if the job did not finish.

        ``after`` is the `cursor` of the last event that the caller has, got from any client. If
        Redis has lost events that were given out, a `reset` event takes them back, and the
        job's events come from the first on.

        Raises:
            JobNotFound: there is no such job, or its ``result_ttl`` is over.
            StreamReset: with ``text``, text that was given out is taken back.
            EventsGone: it ended, and its events are no longer kept; ``.result`` has its output.
            StreamGap: the job's stream lacks events.
            QueueUnavailable: Redis has been away for a minute (2 s before the first event).
            TypeError, ValueError: ``after`` is no cursor; the message says so.

        """
        events = self._follow(check_id(job_id), StreamAssembler(Cursor.parse(after, "after")))
        return self._texts(job_id, events) if text else events

    def result(self, job_id: str, timeout: float | None = None) -> GenerationResult:
        """Wait for the job's end, at most ``timeout`` seconds; return its result record.

        It returns for every end of the job; `raise_for_state` of the result insists on success.

        Raises:
            JobNotFound: there is no such job, or its ``result_ttl`` is over.
            ResultTimeout: it has not ended in time; it goes on.

        """
        deadline_s = None if timeout is None else time.monotonic() + timeout
        while (record := self.status(job_id)).state not in TERMINAL:  # or it was requeued
            for _ in self._follow(job_id, EndWatch(), deadline_s):
                pass
        return self._read_result(record)

    def status(self, job_id: str) -> JobRecord:
        """Read the job's control hash. Raises JobNotFound."""
        record = answered(lambda: self._protocol.record(check_id(job_id)))
        if record is None:
            raise not_found(job_id)
        return record

    def cancel(self, job_id: str) -> JobState:
        """Cancel: a queued job at once, a running one within two steps; idempotent.

        Returns the state after the call: ``running`` until its worker has ended it, or the
        state in which it had ended before. Raises JobNotFound.
        """
        state = answered(
            lambda: self._protocol.run(calls.cancel(check_id(job_id), CANCELLED_BY_CLIENT))
        )
        if state is None:
            raise not_found(job_id)
        return state

    def forget(self, job_id: str) -> None:
        """Delete a job that ended: its result, events and payload, at once. Idempotent.

        Raises:
            JobNotEnded: it waits or runs; cancel it first.

        """
        call = ended_calls.forget([check_id(job_id)])
        (state,) = answered(lambda: self._protocol.run(call))
        check_forgotten(job_id, state)

    def requeue(self, job_id: str) -> JobState:
        """Enqueue a job anew that ended without finishing: under its id, with its payload.

        Its events begin anew; its deadline counts from now. Returns the state after the call: a
        job that waits, runs or finished stays as it is.

        Raises:
            JobNotFound: there is no such job, or its payload is no longer kept.
            TenantLimited: the job's tenant is at its limit of queued jobs.

        """
        call = ended_calls.requeue(check_id(job_id))
        return requeued_state(job_id, answered(lambda: self._protocol.run(call)))

    def _follow(
        self, job_id: str, reader: Reader, deadline_s: float | None = None
    ) -> Generator[Event, None, None]:
        retries = RetryWindow()
        with closing(LiveFeed(self._live, self.keys.channel(job_id))) as feed:
            while not reader.ended:
                timeout_s = wait_s(reader, deadline_s, time.monotonic())
                if reader.needs_replay:
                    yield from self._replay(job_id, reader, retries)
                elif reader.wants_live:
                    yield from feed.wait(reader, timeout_s)
                else:
                    time.sleep(timeout_s)
                    reader.silent()

    def _replay(self, job_id: str, reader: Reader, retries: RetryWindow) -> list[Event]:
        try:
            with self._redis.pipeline(transaction=False) as pipe:
                self._queue_snapshot(pipe, job_id, reader.replay_from)
                replies = pipe.execute()
        except FAULTS as error:
            reader.distrust()
            time.sleep(retries.failed(error, time.monotonic()))
            return []
        retries.succeeded()
        try:
            return self._feed(reader, job_id, replies)
        except EventsGone as gone:
            record = self.status(job_id)
            if record.state not in TERMINAL:
                return []  # it was requeued since: its new life is read next
            raise EventsGone(gone.message, result=self._read_result(record)) from None

    def _read_result(self, record: JobRecord) -> GenerationResult:
        read = partial(self._protocol.read_events, record.job_id)
        return self._result(record, [] if record.result else answered(read))

    def _texts(
        self, job_id: str, events: Generator[Event, None, None]
    ) -> Generator[str, None, None]:
        for event in events:
            if piece := text_of(event):
                yield piece
        self.result(job_id).raise_for_state()
