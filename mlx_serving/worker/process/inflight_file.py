"""What the engine child holds, where its parent can read it after any death: a small mapped file.

The child writes to memory alone, no system call a step; what it wrote before an abort, a
segmentation fault or SIGKILL is there. A slot's state byte is written last and cleared first, so
half a record is never read.
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
    """Claimed, or ended and not yet settled: not in the engine's hands."""

    ENTERING = 2
    """Its prompt is being rendered, or the prefill under way computes it."""

    RUNNING = 3
    """In the batch, and not for long."""

    PROVEN = 4
    """In the batch so long that a crash points to others first."""

    LOADING = 5
    """No job: a model, named as an attempt's job is, that is being loaded."""


@dataclass(frozen=True, slots=True)
class ManifestRow:
    """One attempt that the child held."""

    attempt: Attempt
    state: RowState
    serial: int = 0  # in order of claims


class Manifest:
    """The child's side. Thread-safe; ids that it does not know are ignored.

    A job that finds no slot, or whose id is longer than one, is not listed: its lease protects it.
    """

    def __init__(self, memory: mmap.mmap | bytearray | None = None) -> None:
        """Start empty; without `memory` nobody but this process reads it."""
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
        """Say how far an attempt has come."""
        with self._lock:
            self._mark(request_id, state)

    @contextmanager
    def entering(self, request_id: str) -> Iterator[None]:
        """Say that an attempt's prompt is being rendered; foreign code may crash over it."""
        self.mark(request_id, RowState.ENTERING)
        try:
            yield
        finally:
            self.mark(request_id, RowState.HELD)

    @contextmanager
    def loading(self, model: str) -> Iterator[None]:
        """Say that a slice of the model's load is under way; the model may crash it."""
        name = Attempt(model, 0, "").name
        self.hold(name)
        self.mark(name, RowState.LOADING)
        yield
        self.drop(name)

    def prefill(self, request_ids: Iterable[str]) -> None:
        """Say whose prompts the engine computes from now on; none: the step is over."""
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


class ManifestFile:
    """The parent's side: makes the file for one child, reads it once the child is dead."""

    def __init__(self, slots: int) -> None:
        """Make the file, filled with zeros.

        Raises:
            OSError: there is no room for it.

        """
        descriptor, self.path = tempfile.mkstemp(prefix="mlx-serving-", suffix=".manifest")
        with os.fdopen(descriptor, "r+b") as file:
            file.truncate(slots * SLOT_BYTES)
            self._memory = mmap.mmap(file.fileno(), 0)

    def read(self) -> list[ManifestRow]:
        """Return what the child held, in order of its claims, without what can't be right."""
        rows = [self._row(at) for at in range(0, len(self._memory), SLOT_BYTES)]
        return sorted((row for row in rows if row is not None), key=lambda row: row.serial)

    def _row(self, at: int) -> ManifestRow | None:
        state, length, serial = _HEAD.unpack_from(self._memory, at)
        start = at + _HEAD.size
        request_id = self._memory[start : start + length].decode(errors="replace")
        if not RowState.FREE < state <= RowState.LOADING or length > _ID_BYTES:
            return None
        try:
            return ManifestRow(Attempt.parse(request_id), RowState(state), serial)
        except ValueError:
            return None

    def close(self) -> None:
        """Give the memory back, and the name where the child did not get so far."""
        self._memory.close()
        with suppress(OSError):
            Path(self.path).unlink()
