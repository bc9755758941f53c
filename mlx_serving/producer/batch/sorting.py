"""Sorts more records than memory should hold: sorted runs in a file, merged as they are read."""

from __future__ import annotations

import heapq
import os
import tempfile
from typing import TYPE_CHECKING, Final, Self

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

RUN_RECORDS: Final = 65_536
_READ_RECORDS: Final = 1024


class ExternalSorter:
    """Sorts byte records of one size. Use it as a context: its file is gone afterwards."""

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
        """Take a record."""
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
