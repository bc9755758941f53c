"""A result file, which only grows by whole lines; after a crash, a torn last line is cut off."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, BinaryIO

import msgspec

from mlx_serving.common.durable import sync_to_disk
from mlx_serving.common.errors import InvalidBatch
from mlx_serving.producer.batch.line_set import LineSet
from mlx_serving.producer.batch.records import line_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


class ResultFile:
    """Appends lines; those written before a `sync` returns outlive a power loss.

    Args:
        path: the file, which is made if it does not exist.
        accept: is called with each line of an existing file and returns whether it is whole and of
            this batch. The first line that is not, and all after it, are cut off.

    """

    def __init__(self, path: Path, accept: Callable[[bytes], bool]) -> None:
        self._file = path.open("a+b")
        self.cut_bytes = self._recover(accept)

    def append(self, line: bytes) -> None:
        """Write a line, given without its line break."""
        self._file.write(line + b"\n")

    def sync(self) -> None:
        """Write all lines to the disk itself."""
        self._file.flush()
        sync_to_disk(self._file.fileno())

    def close(self) -> None:
        """Write what is buffered, and close."""
        self._file.close()

    def _recover(self, accept: Callable[[bytes], bool]) -> int:
        self._file.seek(0)
        good = 0
        for line in self._file:
            if not line.endswith(b"\n") or not accept(line):
                break
            good += len(line)
        torn = self._file.seek(0, os.SEEK_END) - good
        if torn:
            self._file.truncate(good)
            sync_to_disk(self._file.fileno())
        return torn


class _Id(msgspec.Struct):
    id: str


def whole_lines(path: Path, batch_id: str) -> Iterator[bytes]:
    """Lines of a result file, also while it grows, without a torn last line and duplicates."""
    seen = LineSet()
    decoder = msgspec.json.Decoder(_Id)
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        for raw in file:
            if not raw.endswith(b"\n"):
                return
            try:
                line = line_of(decoder.decode(raw).id, batch_id)
            except (msgspec.DecodeError, UnicodeDecodeError):
                return
            if line is not None and seen.add(line):
                yield raw


def copy_lines(lines: Iterator[bytes], to: Path) -> int:
    """Write lines to a file, which appears only when it is complete; return how many.

    A pipe or a device is written to directly and never replaced.

    Raises:
        InvalidBatch: `to` is a folder, or its folder does not exist.

    """
    to = to.resolve()  # a link stays, and so does /dev/stdout
    if to.is_dir():
        raise InvalidBatch([("output", f"{to} is a folder")])
    if not to.parent.is_dir():
        raise InvalidBatch([("output", f"there is no folder {to.parent}")])
    if to.exists() and not to.is_file():
        with to.open("wb") as file:
            return _write(lines, file)
    part = to.with_name(f".{to.name}.part")
    with part.open("wb") as file:
        count = _write(lines, file)
        file.flush()
        sync_to_disk(file.fileno())
    part.replace(to)
    return count


def _write(lines: Iterator[bytes], file: BinaryIO) -> int:
    count = 0
    for count, line in enumerate(lines, 1):  # noqa: B007 -- the last one is the number
        file.write(line)
    return count
