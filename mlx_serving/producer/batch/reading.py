"""Reads a file line by line within bounded memory, with each line's place."""

from __future__ import annotations

from typing import TYPE_CHECKING, BinaryIO, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

_BOM = b"\xef\xbb\xbf"


class PlacedLine(NamedTuple):
    """A line that is not blank: its number from 1, its bytes, and where they are.

    `data` is None where the line is longer than the reader's limit.
    """

    number: int
    offset: int
    length: int
    data: bytes | None


def read_lines(file: BinaryIO, limit: int) -> Iterator[PlacedLine]:
    """Read from the start; of a line over `limit` bytes no more than these are held at once."""
    offset = number = 0
    while piece := file.readline(limit):
        number += 1
        length = len(piece)
        whole = piece.endswith(b"\n") or length < limit
        while not whole:
            rest = file.readline(limit)
            length += len(rest)
            whole = rest.endswith(b"\n") or len(rest) < limit
            piece = b""
        skipped = len(_BOM) if offset == 0 and piece.startswith(_BOM) else 0
        if length > limit or not piece:
            yield PlacedLine(number, offset, length, None)
        elif piece[skipped:].strip():
            yield PlacedLine(number, offset + skipped, length - skipped, piece[skipped:])
        offset += length
