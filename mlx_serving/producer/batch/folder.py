"""A batch's folder: all that a runner needs to go on, on any machine that can reach the disk.

`batch.json` is replaced as a whole (write, fsync, rename); the result files only grow.
"""

from __future__ import annotations

import fcntl
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import msgspec

from mlx_serving.common.durable import sync_folder, sync_to_disk
from mlx_serving.common.errors import BatchNotFound, InvalidBatch
from mlx_serving.producer.batch.objects import Batch
from mlx_serving.producer.batch.options import BatchOptions

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

STATE: Final = "batch.json"


class InputFile(msgspec.Struct, frozen=True):
    """The file of requests: its size and time of change when it was validated."""

    path: str
    size: int = 0
    mtime_ns: int = 0

    @classmethod
    def of(cls, path: Path) -> InputFile:
        """Look at a file."""
        found = path.stat()
        return cls(str(path), found.st_size, found.st_mtime_ns)


class Section(msgspec.Struct, frozen=True):
    """The records of one model in the index."""

    model: str
    first: int
    count: int


class BatchState(msgspec.Struct, kw_only=True):
    """Content of `batch.json`. `ignored`: how many lines set each field that changes nothing."""

    v: int = 1
    batch: Batch
    options: BatchOptions
    input: InputFile
    sections: list[Section] = []
    ignored: dict[str, int] = {}


class BatchFolder:
    """Names and files of one batch."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.index = path / "index.bin"
        self.output = path / "output.jsonl"
        self.errors = path / "errors.jsonl"
        self.log = path / "runner.log"
        self.copied_input = path / "input.jsonl"
        self._state = path / STATE
        self._lock = path / "lock"

    @classmethod
    def create(cls, path: Path) -> BatchFolder:
        """Make a new folder.

        Raises:
            InvalidBatch: it exists already, or can't be made.

        """
        try:
            path.mkdir(parents=True)
        except OSError as error:
            raise InvalidBatch([("folder", f"{path}: {error.strerror}")]) from None
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> BatchFolder:
        """Open an existing folder. Raises BatchNotFound."""
        if not (path / STATE).is_file():
            raise BatchNotFound(f"there is no batch in {path}")
        return cls(path)

    def read(self) -> BatchState:
        """Read `batch.json`. Raises InvalidBatch if it can't be read."""
        try:
            return msgspec.json.decode(self._state.read_bytes(), type=BatchState)
        except (OSError, msgspec.DecodeError) as error:
            raise InvalidBatch(f"{self._state} can't be read: {error}") from None

    def write(self, state: BatchState) -> None:
        """Replace `batch.json`: after a crash it holds the old state or the new one, complete."""
        replace(self._state, msgspec.json.format(msgspec.json.encode(state), indent=2))

    @contextmanager
    def lock(self) -> Iterator[bool]:
        """Lock the folder for one runner; False if another has it. A crash frees the lock."""
        with self._lock.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True


def replace(path: Path, data: bytes) -> None:
    """Replace a file so that a crash leaves the old or the new one; on disk when this returns."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        sync_to_disk(file.fileno())
    part.replace(path)
    sync_folder(path.parent)
