"""The first pass over a bulk file: reads and checks every line, and writes the index.

Memory does not grow with the file: records are sorted on disk, errors go to the error file, and
only one bit is kept for each line.
"""

from __future__ import annotations

import hashlib
import os
import struct
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final, NamedTuple

from mlx_serving.common.durable import sync_folder, sync_to_disk
from mlx_serving.producer.batch.folder import InputFile, Section
from mlx_serving.producer.batch.index import (
    MODELS,
    NO_PREFIX,
    RECORD_BYTES,
    ExternalSorter,
    LinePlace,
    place_of,
    prefix_key,
    record,
)
from mlx_serving.producer.batch.line_set import LineSet
from mlx_serving.producer.batch.lines import (
    LINE_BYTES,
    BadLine,
    LineReader,
    RequestLine,
    custom_id_of,
)
from mlx_serving.producer.batch.objects import NAMED_ERRORS, ErrorList, LineError
from mlx_serving.producer.batch.results import Results

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mlx_serving.producer.batch.folder import BatchFolder, BatchState

_BOM = b"\xef\xbb\xbf"


class PlacedLine(NamedTuple):
    """A line that is not blank: its number from 1, its bytes, and where they are.

    `data` is None if the line is longer than the reader's limit.
    """

    number: int
    offset: int
    length: int
    data: bytes | None


def read_lines(file: BinaryIO, limit: int) -> Iterator[PlacedLine]:
    """Read all lines; of a line, never more than `limit` bytes are in memory."""
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


_CUSTOM_ID: Final = struct.Struct(">16sQQI")  # its hash, line, offset, length


PROGRESS_LINES: Final = 1000


class Validation:
    """One pass over the file; after a crash, `run` starts again from nothing."""

    def __init__(
        self, folder: BatchFolder, state: BatchState, progress: Callable[[int], object] | None
    ) -> None:
        self._folder, self._state = folder, state
        self._progress = progress or (lambda _: None)
        self._reader = LineReader(state.batch.id, state.options)
        self._models: dict[str, int] = {}
        self._counts: Counter[str] = Counter()  # lines of each model
        self._ignored: Counter[str] = Counter()
        self._named: list[LineError] = []
        self._lines = 0

    def run(self) -> None:
        """Validate; afterwards the batch is `in_progress`, or `failed` if no line can be run."""
        for path in (self._folder.index, self._folder.output, self._folder.errors):
            path.unlink(missing_ok=True)
        source = Path(self._state.input.path)
        results = Results(self._folder, self._state.batch.id)
        with (
            source.open("rb") as file,
            ExternalSorter(self._folder.path, RECORD_BYTES) as order,
            ExternalSorter(self._folder.path, _CUSTOM_ID.size) as ids,
        ):
            self._state.input = InputFile.of(source)
            for line in read_lines(file, LINE_BYTES):
                self._read(line, results, order, ids)
            dropped = self._drop_duplicates(file, results, ids)
            self._write_index(order.merged(), dropped)
        results.sync()
        results.close()
        self._conclude(results.failed)

    def _read(
        self, line: PlacedLine, results: Results, order: ExternalSorter, ids: ExternalSorter
    ) -> None:
        self._lines += 1
        if self._lines % PROGRESS_LINES == 0:
            self._progress(self._lines)
        found = self._parse(line)
        if isinstance(found, BadLine):
            results.failed_line(found.line, found.custom_id, found.summary)
            self._name(*found.errors)
            return
        place = LinePlace(line.number, line.offset, line.length)
        grouped = self._state.options.order == "prefix"
        key = prefix_key(found.job) if grouped else NO_PREFIX
        order.add(record(self._models[found.job.model], key, place))
        digest = hashlib.blake2b(found.custom_id.encode(), digest_size=16).digest()
        ids.add(_CUSTOM_ID.pack(digest, *place))
        self._ignored.update(found.ignored)
        if self._state.batch.model is None:
            self._state.batch.model, self._state.batch.endpoint = found.job.model, found.url

    def _parse(self, line: PlacedLine) -> RequestLine | BadLine:
        if line.data is None:
            reason = f"is longer than {LINE_BYTES} bytes"
            return _bad(line.number, None, "line_too_long", reason)
        found = self._reader.read(line.data, line.number)
        if isinstance(found, RequestLine):
            self._models.setdefault(found.job.model, len(self._models))
            if len(self._models) > MODELS:
                del self._models[found.job.model]
                reason = f"the file names more than {MODELS} models"
                return _bad(line.number, found.custom_id, "too_many_models", reason, "body.model")
        return found

    def _drop_duplicates(self, file: BinaryIO, results: Results, ids: ExternalSorter) -> LineSet:
        """Make an error of each line whose custom_id an earlier line has; return those lines."""
        dropped = LineSet()
        first: tuple[bytes, int] = (b"", 0)
        for packed in ids.merged():
            digest, line, offset, length = _CUSTOM_ID.unpack(packed)
            if digest != first[0]:
                first = (digest, line)
                continue
            raw = os.pread(file.fileno(), length, offset)
            reason = f"is that of line {first[1]} too"
            bad = _bad(line, custom_id_of(raw, line), "duplicate_custom_id", reason, "custom_id")
            results.failed_line(bad.line, bad.custom_id, bad.summary)
            self._name(*bad.errors)
            dropped.add(line)
        return dropped

    def _write_index(self, records: Iterator[bytes], dropped: LineSet) -> None:
        counts: Counter[int] = Counter()
        with self._folder.index.open("wb") as file:
            for packed in records:
                model, place = place_of(packed)
                if place.line not in dropped:
                    file.write(packed)
                    counts[model] += 1
            file.flush()
            sync_to_disk(file.fileno())
        sync_folder(self._folder.path)
        first = 0
        self._state.sections = []
        for name, number in self._models.items():
            self._state.sections.append(Section(name, first, counts[number]))
            first += counts[number]

    def _conclude(self, failed: int) -> None:
        state, batch, now_s = self._state, self._state.batch, time.time()
        batch.request_counts.total = self._lines
        batch.request_counts.failed = failed
        state.ignored = dict(sorted(self._ignored.items()))
        if not self._lines:
            self._name(LineError(code="empty_file", message="the file has no lines"))
        self._named.sort(key=lambda error: error.line or 0)
        batch.errors = ErrorList(self._named) if self._named else None
        runnable = failed < self._lines and not (failed and state.options.strict)
        batch.move("in_progress" if runnable else "failed", now_s)
        self._progress(self._lines)

    def _name(self, *errors: LineError) -> None:
        self._named += errors[: max(0, NAMED_ERRORS - len(self._named))]


def _bad(
    line: int, custom_id: str | None, code: str, reason: str, param: str | None = None
) -> BadLine:
    return BadLine(line, custom_id, (LineError(code=code, message=reason, param=param, line=line),))
