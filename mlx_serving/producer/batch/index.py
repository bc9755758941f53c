"""The index: in which order lines are submitted. A file of sorted records, one for each line.

Records are sorted by model, then (in order `prefix`) by what a prompt begins with, then by line.
So lines that share a system prompt follow each other, and a worker's prefix cache finds them.
"""

from __future__ import annotations

import hashlib
import heapq
import os
import struct
import tempfile
from typing import TYPE_CHECKING, Final, NamedTuple, Self

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from mlx_serving.common.job.schema import GenerationJob

RUN_RECORDS: Final = 65_536


_READ_RECORDS: Final = 1024


class ExternalSorter:
    """Sorts byte records of one size on disk. A context manager, which deletes its file."""

    def __init__(self, folder: Path, record_bytes: int, run_records: int = RUN_RECORDS) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 -- closed by __exit__
        self._size = record_bytes
        self._run_records = run_records
        self._run: list[bytes] = []
        self._runs: list[tuple[int, int]] = []  # offset and end of each

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, record: bytes) -> None:
        """Add a record."""
        self._run.append(record)
        if len(self._run) >= self._run_records:
            self._write_run()

    def merged(self) -> Iterator[bytes]:
        """All records in order."""
        self._write_run()
        return heapq.merge(*(self._read_run(*run) for run in self._runs))

    def _write_run(self) -> None:
        if not self._run:
            return
        start = self._file.seek(0, os.SEEK_END)
        self._run.sort()
        self._file.writelines(self._run)
        self._file.flush()
        self._runs.append((start, start + len(self._run) * self._size))
        self._run.clear()

    def _read_run(self, start: int, end: int) -> Iterator[bytes]:
        step = self._size * _READ_RECORDS
        for at in range(start, end, step):
            block = os.pread(self._file.fileno(), min(step, end - at), at)
            for first in range(0, len(block), self._size):
                yield block[first : first + self._size]


MODELS: Final = 256


"""Most models that one file may name."""


HEADS: Final = (64, 256, 1024)


"""How many characters after the system turns decide in which group a line is, for each level."""


_RECORD: Final = struct.Struct(
    ">H32sQQI"
)  # model, prefix key, line, offset, length: sorts as bytes


RECORD_BYTES: Final = _RECORD.size


NO_PREFIX: Final = bytes(32)


class LinePlace(NamedTuple):
    """Where a line is in the input file."""

    line: int
    offset: int
    length: int


def prefix_key(job: GenerationJob) -> bytes:
    """Return 32 bytes, of which the first 8, 16, 24 or 32 are equal for prompts that begin alike.

    The first 8 are a hash of the tools and the leading system turns; the others hash the first 64,
    256 and 1,024 characters of what follows.
    """
    messages = job.template_messages()
    turns = sum(1 for _ in _leading_system(messages))
    system = msgspec.json.encode([job.template_tools(), messages[:turns]])
    rest = job.prompt or "\0".join(f"{m['role']}\0{m['content']}" for m in messages[turns:])
    return _hash(system) + b"".join(_hash(rest[:head].encode()) for head in HEADS)


def record(model: int, key: bytes, place: LinePlace) -> bytes:
    """Pack a line's record."""
    return _RECORD.pack(model, key, *place)


def place_of(packed: bytes) -> tuple[int, LinePlace]:
    """Model number and place of a record."""
    model, _, line, offset, length = _RECORD.unpack(packed)
    return model, LinePlace(line, offset, length)


def read_places(path: Path, first: int, count: int) -> Iterator[LinePlace]:
    """Read `count` records from number `first` on, a page at a time."""
    with path.open("rb") as file:
        file.seek(first * RECORD_BYTES)
        while count > 0:
            page = file.read(min(count, _READ_RECORDS) * RECORD_BYTES)
            if not page:
                return
            for _, _, line, offset, length in _RECORD.iter_unpack(page):
                yield LinePlace(line, offset, length)
            count -= _READ_RECORDS


def _leading_system(messages: list[dict[str, object]]) -> Iterator[dict[str, object]]:
    for message in messages:
        if message["role"] not in {"system", "developer"}:
            return
        yield message


def _hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=8).digest()
