"""Turns of tests that run in several processes: side by side, or one alone on the machine.

`make test` runs several pytest processes. A test marked `quiet` holds a bound that only a machine
without other load can hold, so no test of another process runs beside it.
"""

from __future__ import annotations

from contextlib import contextmanager
from fcntl import LOCK_EX, LOCK_SH, LOCK_UN, flock
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextmanager
def turn(folder: Path, *, alone: bool) -> Iterator[None]:
    """Wait for a turn; `folder` is shared by the processes, and a killed one's turn is over.

    Who waits to be alone holds the gate, so that no others enter before.
    """
    with (folder / "gate").open("w") as gate, (folder / "room").open("w") as room:
        flock(gate, LOCK_EX)
        flock(room, LOCK_EX if alone else LOCK_SH)
        flock(gate, LOCK_UN)
        yield
