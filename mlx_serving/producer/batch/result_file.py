"""A result file that only grows: whole lines, cut back to whole ones after a crash."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class ResultFile:
    """Appends lines; what `sync` has returned for outlives a power loss.

    Args:
        path: the file; made where there is none.
        accept: is shown each line that is there, and says whether it is whole and ours. The first
            one that isn't, and all after it, are cut off: a crash tore them.

    """

    def __init__(self, path: Path, accept: Callable[[bytes], bool]) -> None:
        self._file = path.open("a+b")
        self.cut_bytes = self._recover(accept)

    def append(self, line: bytes) -> None:
        """Take a line without its end."""
        self._file.write(line + b"\n")

    def sync(self) -> None:
        """Write all lines to the disk itself."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Write what is left, and close."""
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
            os.fsync(self._file.fileno())
        return torn
