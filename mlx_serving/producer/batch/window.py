"""What a batch has in Redis now: the lines in flight, oldest first, and how many more may go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mlx_serving.producer.batch.index import Place

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
