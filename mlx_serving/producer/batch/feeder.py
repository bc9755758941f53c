"""The feeder: reads lines in the order of the index and submits as many as the window allows."""

from __future__ import annotations

import os
from collections import deque
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from mlx_serving.common import limits
from mlx_serving.common.errors import InvalidBatch, InvalidJob, TenantLimited
from mlx_serving.producer.batch.lines import LineReader, RequestLine
from mlx_serving.producer.batch.objects import LineError
from mlx_serving.producer.batch.window import SubmittedLine

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from mlx_serving.common.job.schema import GenerationJob
    from mlx_serving.common.redis.connection import Endpoint
    from mlx_serving.producer.batch.index import LinePlace
    from mlx_serving.producer.batch.results import Results
    from mlx_serving.producer.batch.window import Window

CHUNK_LINES: Final = 256
CHUNK_BYTES: Final = 8 * 1024 * 1024
"""Most lines, and most bytes of them, that are in memory at once."""


class Submitter(Protocol):
    """What a batch needs of the client of a model's Redis."""

    @property
    def endpoint(self) -> Endpoint:
        """Where that Redis is."""

    def submit(self, job: GenerationJob, /) -> object:
        """Enqueue a job; see `Client.submit`."""

    def submit_many(self, jobs: Iterable[GenerationJob]) -> object:
        """Enqueue jobs in few round trips; see `Client.submit_many`."""

    def close(self) -> None:
        """Close the connections."""


class Connect(Protocol):
    """Opens a client of the Redis that serves a model and a tenant."""

    def __call__(self, *, model: str, tenant: str | None) -> Submitter:
        """Open one."""


class _Ready(NamedTuple):
    """A line that was read, and the job that it asks for."""

    line: SubmittedLine
    job: GenerationJob


class Feeder:
    """Submits the lines of one model that have not ended.

    It is safe to submit a line that this runner, or one that died, submitted before: its
    idempotency key makes it the same job, or a new job if the first one is gone from Redis.

    Args:
        client: of the model's Redis.
        reader: makes jobs of lines.
        source: descriptor of the input file.
        places: lines of the model that have not ended, in the order of the index.
        window: is told which lines were submitted.
        results: takes the errors of lines that the client refuses.

    """

    def __init__(
        self,
        client: Submitter,
        reader: LineReader,
        source: int,
        places: Iterator[LinePlace],
        window: Window,
        results: Results,
    ) -> None:
        self._client, self._reader, self._source = client, reader, source
        self._places = places
        self._window, self._results = window, results
        self._again: deque[LinePlace] = deque()
        self._chunk: list[_Ready] = []
        self._burst = CHUNK_LINES  # lines a submit; fewer near the tenant's limit
        self.exhausted = False

    def again(self, place: LinePlace) -> None:
        """Submit a line once more: Redis no longer has its job."""
        self._again.append(place)
        self.exhausted = False

    def submitted_line(self, place: LinePlace) -> SubmittedLine:
        """Read a line whose job is in Redis already."""
        return self._read(place).line

    def feed(self, seconds_left: float) -> int:
        """Submit as many lines as the window has room for; return how many.

        If the batch's tenant may have no more jobs queued, the other lines wait for the next call.
        None is submitted if `seconds_left` of the batch's window is not positive.

        Raises:
            QueueUnavailable: Redis is away; the next call goes on with the same lines.
            InvalidBatch: the input file is no longer what was validated.

        """
        fed = 0
        if seconds_left <= 0:
            return fed
        while (room := self._window.room) and not self.exhausted:
            self._chunk = self._chunk or self._read_chunk(min(room, CHUNK_LINES))
            if not self._chunk:
                self.exhausted = True
                break
            before, wanted = len(self._chunk), min(len(self._chunk), self._burst)
            self._submit(min(max(seconds_left, 1.0), limits.SECONDS))
            taken = before - len(self._chunk)
            fed += taken
            if taken < wanted:
                self._burst = max(1, taken)  # lines that are refused are sent for nothing
                break
            self._burst = min(2 * self._burst, CHUNK_LINES)
        return fed

    def _read_chunk(self, most: int) -> list[_Ready]:
        chunk: list[_Ready] = []
        size = 0
        while len(chunk) < most and size < CHUNK_BYTES:
            place = self._again.popleft() if self._again else next(self._places, None)
            if place is None:
                break
            size += place.length
            chunk.append(self._read(place))
        return chunk

    def _read(self, place: LinePlace) -> _Ready:
        raw = os.pread(self._source, place.length, place.offset)
        found = self._reader.read(raw, place.line)
        if not isinstance(found, RequestLine):
            raise InvalidBatch([("input", f"line {place.line} is not what it was at submit")])
        job = found.job
        line = SubmittedLine(
            place, job.job_id(), found.custom_id, found.url, job.model, found.ignored
        )
        return _Ready(line, job)

    def _submit(self, deadline_s: float) -> None:
        """Submit the first lines of the chunk; those that were not enqueued stay in it."""
        burst, rest = self._chunk[: self._burst], self._chunk[self._burst :]
        jobs = [ready.job.model_copy(update={"deadline": deadline_s}) for ready in burst]
        try:
            self._client.submit_many(jobs)
        except InvalidJob:
            refused = self._submit_each(burst, jobs)
        except TenantLimited as error:
            pairs = [*zip(burst, error.job_ids, strict=True)]
            self._window.add(ready.line for ready, job_id in pairs if job_id is not None)
            refused = [ready for ready, job_id in pairs if job_id is None]
        else:
            self._window.add(ready.line for ready in burst)
            refused = []
        self._chunk = refused + rest

    def _submit_each(self, burst: list[_Ready], jobs: list[GenerationJob]) -> list[_Ready]:
        """Submit one by one, to find the lines that the client refuses (too large, another Redis).

        Return the lines that the tenant's limit keeps out for now.
        """
        for number, (ready, job) in enumerate(zip(burst, jobs, strict=True)):
            try:
                self._client.submit(job)
            except InvalidJob as error:
                wrong = LineError(code=error.code, message=str(error), line=ready.line.line)
                self._results.failed_line(ready.line.line, ready.line.custom_id, wrong)
            except TenantLimited:
                return burst[number:]
            else:
                self._window.add([ready.line])
        return []
