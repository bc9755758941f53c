"""A set of line numbers, one bit each: a million lines are 125 KB."""

from __future__ import annotations


class LineSet:
    """A set of line numbers from 1 on; grows as needed."""

    def __init__(self) -> None:
        self._bits = bytearray()

    def __contains__(self, line: int) -> bool:
        byte = line >> 3
        return byte < len(self._bits) and bool(self._bits[byte] >> (line & 7) & 1)

    def add(self, line: int) -> bool:
        """Add a line; return False if the set had it already."""
        if line in self:
            return False
        byte = line >> 3
        if byte >= len(self._bits):
            self._bits.extend(bytes(max(1024, byte + 1 - len(self._bits))))
        self._bits[byte] |= 1 << (line & 7)
        return True
