"""The in-flight file: which jobs the engine child holds, for its parent to read after any death.

It is a small mapped file. The child writes to memory, without a system call at each step, and what
it wrote before an abort, a segmentation fault or SIGKILL stays there. A slot's state byte is
written last and cleared first, so that half a record is never read.
"""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
import threading
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from mlx_serving.common.attempts import Attempt

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

SLOT_BYTES: Final = 256
_HEAD: Final = struct.Struct("<BBxxxxxxQ")  # state, length of the id, serial number of the hold
_ID_BYTES: Final = SLOT_BYTES - _HEAD.size


class RowState(IntEnum):
    """How far a held job's row has come."""

    FREE = 0
    HELD = 1
    """Claimed, or ended and not settled yet: the engine does not have it."""

    ENTERING = 2
    """Its prompt is being rendered, or prefilled by the step under way."""

    RUNNING = 3
    """In the batch, but not for long yet."""

    PROVEN = 4
    """In the batch for so long that a crash points to other rows first."""

    LOADING = 5
    """No job, but a model that is being loaded; its alias stands for the job's id."""


@dataclass(frozen=True, slots=True)
class InflightRow:
    """One attempt that the child held."""

    attempt: Attempt
    state: RowState
    serial: int = 0  # in order of claims


class InflightJobs:
    """The child's side of the file. Thread-safe; ids that it does not know are ignored.

    A job is not listed if no slot is free or its id is longer than a slot. Its lease protects it.
    """

    def __init__(self, memory: mmap.mmap | bytearray | None = None) -> None:
        """Start empty. Without `memory`, no other process can read it."""
        self._memory = memory if memory is not None else bytearray(64 * SLOT_BYTES)
        self._free = list(range(len(self._memory) // SLOT_BYTES))
        self._slots: dict[str, int] = {}
        self._entering: list[str] = []
        self._serial = 0
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: str) -> Self:
        """Map the parent's file and remove its name: the memory lives as long as a mapping.

        Raises:
            OSError: the file is not there.

        """
        with Path(path).open("r+b") as file:
            memory = mmap.mmap(file.fileno(), 0)
        with suppress(OSError):
            Path(path).unlink()
        return cls(memory)

    def hold(self, request_id: str) -> None:
        """List an attempt that was claimed."""
        raw = request_id.encode()
        with self._lock:
            if request_id in self._slots or not self._free or len(raw) > _ID_BYTES:
                return
            slot = self._slots[request_id] = self._free.pop()
            self._serial += 1
            at = slot * SLOT_BYTES
            head = _HEAD.pack(RowState.FREE, len(raw), self._serial)
            self._memory[at : at + _HEAD.size + len(raw)] = head + raw
            self._memory[at] = RowState.HELD

    def drop(self, request_id: str) -> None:
        """Strike an attempt off the list."""
        with self._lock:
            slot = self._slots.pop(request_id, None)
            if slot is not None:
                self._memory[slot * SLOT_BYTES] = RowState.FREE
                self._free.append(slot)

    def mark(self, request_id: str, state: RowState) -> None:
        """Note how far an attempt has come."""
        with self._lock:
            self._mark(request_id, state)

    @contextmanager
    def entering(self, request_id: str) -> Iterator[None]:
        """Note that an attempt's prompt is being rendered: a library may crash over it."""
        self.mark(request_id, RowState.ENTERING)
        try:
            yield
        finally:
            self.mark(request_id, RowState.HELD)

    @contextmanager
    def loading(self, model: str) -> Iterator[None]:
        """Note that a slice of the model's load is under way: the model may crash it."""
        name = Attempt(model, 0, "").name
        self.hold(name)
        self.mark(name, RowState.LOADING)
        yield
        self.drop(name)

    def prefill(self, request_ids: Iterable[str]) -> None:
        """Note whose prompts the engine prefills from now on; none: the step is over."""
        with self._lock:
            for request_id in self._entering:
                self._mark(request_id, RowState.RUNNING)
            self._entering = list(request_ids)
            for request_id in self._entering:
                self._mark(request_id, RowState.ENTERING)

    def _mark(self, request_id: str, state: RowState) -> None:
        slot = self._slots.get(request_id)
        if slot is not None:
            self._memory[slot * SLOT_BYTES] = state


class InflightFile:
    """The parent's side: makes the file for one child, and reads it once the child is dead."""

    def __init__(self, slots: int) -> None:
        """Make the file, filled with zeros.

        Raises:
            OSError: there is no room for it.

        """
        descriptor, self.path = tempfile.mkstemp(prefix="mlx-serving-", suffix=".inflight")
        with os.fdopen(descriptor, "r+b") as file:
            file.truncate(slots * SLOT_BYTES)
            self._memory = mmap.mmap(file.fileno(), 0)

    def read(self) -> list[InflightRow]:
        """Return what the child held, in order of its claims; impossible records are left out."""
        rows = [self._row(at) for at in range(0, len(self._memory), SLOT_BYTES)]
        return sorted((row for row in rows if row is not None), key=lambda row: row.serial)

    def _row(self, at: int) -> InflightRow | None:
        state, length, serial = _HEAD.unpack_from(self._memory, at)
        start = at + _HEAD.size
        request_id = self._memory[start : start + length].decode(errors="replace")
        if not RowState.FREE < state <= RowState.LOADING or length > _ID_BYTES:
            return None
        try:
            return InflightRow(Attempt.parse(request_id), RowState(state), serial)
        except ValueError:
            return None

    def close(self) -> None:
        """Free the memory, and remove the file's name if the child has not done so."""
        self._memory.close()
        with suppress(OSError):
            Path(self.path).unlink()
