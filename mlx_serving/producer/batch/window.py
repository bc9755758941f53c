"""The window: which lines of a model are in flight, that is, have a job in Redis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mlx_serving.producer.batch.index import LinePlace

IN_FLIGHT_BYTES: Final = 256 * 1024 * 1024
"""Most bytes of input lines of a model in Redis at once."""


@dataclass(frozen=True, slots=True)
class SubmittedLine:
    """A line whose job is in Redis. It is read again from its place when its text is needed."""

    place: LinePlace
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
    """Lines in flight, in the order in which they were submitted.

    Attributes:
        waiting: how many of them were still queued at the last look.

    """

    def __init__(self, depth: int, most: int, most_bytes: int = IN_FLIGHT_BYTES) -> None:
        self._depth = depth
        self._most = most
        self._most_bytes = most_bytes
        self._bytes = 0
        self._lines: dict[str, SubmittedLine] = {}
        self.waiting = 0

    def __len__(self) -> int:
        return len(self._lines)

    @property
    def lines(self) -> list[SubmittedLine]:
        """All lines in flight, oldest first."""
        return list(self._lines.values())

    @property
    def room(self) -> int:
        """How many lines to submit now: none until half of the depth is used up."""
        if self._bytes >= self._most_bytes or self.waiting * 2 > self._depth:
            return 0
        return max(0, min(self._depth - self.waiting, self._most - len(self)))

    def add(self, lines: Iterable[SubmittedLine]) -> None:
        """Note lines that were submitted."""
        for line in lines:
            if line.job_id in self._lines:
                continue
            self._lines[line.job_id] = line
            self._bytes += line.place.length
            self.waiting += 1

    def remove(self, line: SubmittedLine) -> None:
        """Note that a line is no longer in flight."""
        if self._lines.pop(line.job_id, None) is not None:
            self._bytes -= line.place.length
