"""A worker without an engine: it claims jobs by the real protocol and writes given words."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mlx_serving.common import events, results
from mlx_serving.common.attempts import new_nonce
from mlx_serving.common.events import ChoiceDelta, ErrorInfo, Usage
from mlx_serving.common.protocol import calls
from mlx_serving.common.protocol.client import Protocol
from mlx_serving.common.states import JobState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import redis

    from mlx_serving.common.events import Event
    from mlx_serving.common.protocol.calls import ClaimedJob
    from mlx_serving.common.protocol.keys import Keys

LEASE_MS = 10_000


def queued(redis: redis.Redis, queue: str = "tally:default") -> list[str]:
    """Ids on RQ's list of a queue, first first."""
    return [bytes(job_id).decode() for job_id in redis.lrange(f"rq:queue:{queue}", 0, -1)]  # type: ignore[arg-type]


class Row:
    """One claimed job: writes its events one by one."""

    def __init__(self, worker: ScriptedWorker, job: ClaimedJob) -> None:
        self.worker, self.job = worker, job
        self.seq, self.epoch, self.tag = job.seq, job.epoch, job.attempt.tag
        self.written: list[Event] = []
        self.cancel_reason = ""

    def attempt(self) -> None:
        event = events.attempt_event(
            attempt=self.epoch,
            tag=self.tag,
            seq=self.seq + 1,
            worker=self.worker.name,
            model="tally",
            model_revision="r1",
            tokenizer_hash="h1",
        )
        self._write(event)

    def say(self, word: str, token: int | None = None, *, choices: int = 1) -> None:
        """Write a word, of so many choices at once."""
        ids = [self.seq if token is None else token]
        deltas = [ChoiceDelta(index, word, ids) for index in range(choices)]
        event = events.tokens_event(
            attempt=self.epoch, tag=self.tag, seq=self.seq + 1, choices=deltas
        )
        self._write(event)

    def hand_back(self) -> None:
        """Give the job back to its queue."""
        rows = [calls.Returned(self.job.attempt)]
        assert self.worker.protocol.run(calls.release(self.worker.name, rows)) == ["OK"]

    def end(self, state: JobState = JobState.FINISHED, code: str = "") -> None:
        error = ErrorInfo(code, "as scripted") if code else None
        event = events.end_event(
            attempt=self.epoch,
            tag=self.tag,
            seq=self.seq + 1,
            state=state,
            usage=Usage.of(3, len(self.written)),
            error=error,
        )
        result = results.assemble(self.job.job_id, [*self.written, event])
        self._write(event, state, results.encode_result(result))

    def _write(self, event: Event, state: JobState | None = None, result: bytes = b"") -> None:
        end = calls.JobEnd(state, result) if state else None
        row = calls.CommitRow.of(self.job.attempt, event, publish=self.job.stream, end=end)
        call = calls.commit(self.worker.name, [row], lease_ms=LEASE_MS)
        (reply,) = self.worker.protocol.run(call)
        assert reply.status == "OK", reply
        self.cancel_reason = reply.reason
        self.seq = event.seq
        self.written.append(event)


class ScriptedWorker:
    def __init__(self, redis: redis.Redis, keys: Keys, name: str = "scripted") -> None:
        self.protocol = Protocol(redis, keys)
        self.name = name

    def claim(self, most: int = 1, queues: Sequence[str] = ("tally:default",)) -> list[Row]:
        call = calls.claim(
            self.name,
            queues,
            nonce=new_nonce(),
            most=most,
            lease_ms=LEASE_MS,
            protocol=1,
            capacity_tokens=1 << 20,
            max_payload_bytes=1 << 22,
        )
        return [Row(self, job) for job in self.protocol.run(call).jobs]

    def claim_one(self) -> Row:
        (row,) = self.claim()
        row.attempt()
        return row

    def serve(self, words: Sequence[str], pause_s: float = 0.0) -> Row:
        """Run the next job to its end, a word an event."""
        row = self.claim_one()
        for word in words:
            row.say(word)
            time.sleep(pause_s)
            if row.cancel_reason:
                row.end(JobState.CANCELLED, "cancelled")
                return row
        row.end()
        return row

    @contextmanager
    def serving(self, words: Sequence[str], pause_s: float = 0.0) -> Iterator[None]:
        """Serve one job in another thread; errors surface on leaving."""
        with Running(lambda: self.serve(words, pause_s)):
            yield


class Running:
    """A thread that is joined on leaving, and whose error is raised there."""

    def __init__(self, target: Callable[[], object]) -> None:
        self._target = target
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            self._target()
        except BaseException as error:  # noqa: BLE001 -- raised on leaving
            self._error = error

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._thread.join(30)
        assert not self._thread.is_alive()
        if self._error is not None:
            raise self._error
