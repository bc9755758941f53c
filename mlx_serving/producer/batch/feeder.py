"""The feeder: reads lines in their order and keeps a window of them in flight."""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from mlx_serving.common import limits
from mlx_serving.common.errors import InvalidBatch, InvalidJob, TenantLimited
from mlx_serving.producer.batch.lines import LineReader, Request
from mlx_serving.producer.batch.objects import LineError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from mlx_serving.common.job.schema import GenerationJob
    from mlx_serving.producer.batch.index import Place
    from mlx_serving.producer.batch.results import Results
    from mlx_serving.producer.client import Client

IN_FLIGHT_BYTES: Final = 256 * 1024 * 1024


"""Most bytes of input lines of a model in Redis at once."""


@dataclass(frozen=True, slots=True)
class Flight:
    """A line whose job is in Redis. Its text is not kept: `place` says where it is."""

    place: Place
    job_id: str
    custom_id: str
    url: str
    model: str
    ignored: tuple[str, ...] = ()

    @property
    def line(self) -> int:
        """Number of the line in the input file."""
        return self.place.line


class Window:
    """Lines in flight, in the order in which they went. `waiting`: queued at the last look."""

    def __init__(self, depth: int, most: int, most_bytes: int = IN_FLIGHT_BYTES) -> None:
        self._depth = depth
        self._most = most
        self._most_bytes = most_bytes
        self._bytes = 0
        self._flights: dict[str, Flight] = {}
        self.waiting = 0

    def __len__(self) -> int:
        return len(self._flights)

    @property
    def flights(self) -> list[Flight]:
        """All lines in flight, oldest first."""
        return list(self._flights.values())

    @property
    def room(self) -> int:
        """How many lines to feed now: none until half of the depth is used up."""
        if self._bytes >= self._most_bytes or self.waiting * 2 > self._depth:
            return 0
        return max(0, min(self._depth - self.waiting, self._most - len(self)))

    def add(self, flights: Iterable[Flight]) -> None:
        """Note lines that were submitted."""
        for flight in flights:
            if flight.job_id in self._flights:
                continue
            self._flights[flight.job_id] = flight
            self._bytes += flight.place.length
            self.waiting += 1

    def remove(self, flight: Flight) -> None:
        """Note that a line is no longer in flight."""
        if self._flights.pop(flight.job_id, None) is not None:
            self._bytes -= flight.place.length


CHUNK_LINES: Final = 256


CHUNK_BYTES: Final = 8 * 1024 * 1024


"""Most lines, and most bytes of them, that are in memory at once."""


class _Ready(NamedTuple):
    flight: Flight
    job: GenerationJob


class Feeder:
    """Submits the lines of one model that have not ended.

    A line that was submitted before, by this runner or one that died, is submitted again without
    harm: its idempotency key makes it the same job, or a new one where that is gone.

    Args:
        client: of the model's Redis.
        reader: makes jobs of lines.
        source: descriptor of the input file.
        places: lines of the model that have not ended, in their order.
        window: takes what was submitted.
        results: takes the lines that the client refuses.

    """

    def __init__(
        self,
        client: Client,
        reader: LineReader,
        source: int,
        places: Iterator[Place],
        window: Window,
        results: Results,
    ) -> None:
        self._client, self._reader, self._source = client, reader, source
        self._places = places
        self._window, self._results = window, results
        self._again: deque[Place] = deque()
        self._chunk: list[_Ready] = []
        self._burst = CHUNK_LINES  # lines a submit; less where the tenant's limit is near
        self.exhausted = False

    def again(self, place: Place) -> None:
        """Submit a line once more: Redis no longer has its job."""
        self._again.append(place)
        self.exhausted = False

    def flight(self, place: Place) -> Flight:
        """Read a line for what it will be written down with."""
        return self._read(place).flight

    def feed(self, seconds_left: float) -> int:
        """Submit what there is room for; returns how many lines that were.

        Where the batch's tenant may have no more queued, the other lines wait for the next call.

        Raises:
            QueueUnavailable: Redis is away; the next call goes on with the same lines.
            InvalidBatch: the input file is no longer what was validated.

        """
        fed = 0
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
                self._burst = max(1, taken)  # what is refused travels in vain
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

    def _read(self, place: Place) -> _Ready:
        raw = os.pread(self._source, place.length, place.offset)
        found = self._reader.read(raw, place.line)
        if not isinstance(found, Request):
            raise InvalidBatch([("input", f"line {place.line} is not what it was at submit")])
        job = found.job
        flight = Flight(place, job.job_id(), found.custom_id, found.url, job.model, found.ignored)
        return _Ready(flight, job)

    def _submit(self, deadline_s: float) -> None:
        """Submit a burst of the chunk; what is left of it was not taken."""
        burst, rest = self._chunk[: self._burst], self._chunk[self._burst :]
        jobs = [ready.job.model_copy(update={"deadline": deadline_s}) for ready in burst]
        try:
            self._client.submit_many(jobs)
        except InvalidJob:
            refused = self._submit_each(burst, jobs)
        except TenantLimited as error:
            pairs = [*zip(burst, error.job_ids, strict=True)]
            self._window.add(ready.flight for ready, job_id in pairs if job_id is not None)
            refused = [ready for ready, job_id in pairs if job_id is None]
        else:
            self._window.add(ready.flight for ready in burst)
            refused = []
        self._chunk = refused + rest

    def _submit_each(self, burst: list[_Ready], jobs: list[GenerationJob]) -> list[_Ready]:
        """Find the lines that the client refuses: too large for the settings, another Redis.

        Returns those that the tenant's limit keeps out for now.
        """
        for number, (ready, job) in enumerate(zip(burst, jobs, strict=True)):
            flight = ready.flight
            try:
                self._client.submit(job)
            except InvalidJob as error:
                wrong = LineError(code=error.code, message=str(error), line=flight.line)
                self._results.failed_line(flight.line, flight.custom_id, wrong)
            except TenantLimited:
                return burst[number:]
            else:
                self._window.add([flight])
        return []
