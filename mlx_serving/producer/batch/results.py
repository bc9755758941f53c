"""The results of a batch: which lines have ended, in two files that are their own journal.

A result counts once its line is in the output or error file; the counts in `batch.json` are made
from these files at each start, so no crash can make them disagree.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from mlx_serving.producer.batch.folder import sync_folder
from mlx_serving.producer.batch.line_set import LineSet
from mlx_serving.producer.batch.objects import BatchUsage, LineError
from mlx_serving.producer.batch.records import (
    Extra,
    Record,
    Response,
    body_of,
    line_of,
    record_id,
)
from mlx_serving.producer.batch.result_file import ResultFile

if TYPE_CHECKING:
    from mlx_serving.common.events import Usage
    from mlx_serving.common.results import GenerationResult
    from mlx_serving.producer.batch.feeder import Flight
    from mlx_serving.producer.batch.folder import BatchFolder


class _Tokens(msgspec.Struct, frozen=True):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: dict[str, Any] | None = None


class _Body(msgspec.Struct, frozen=True):
    usage: _Tokens | None = None


class _Response(msgspec.Struct, frozen=True):
    body: _Body


class _Line(msgspec.Struct, frozen=True):
    """What a result line must have to count; the rest is checked to be JSON."""

    id: str
    response: _Response | None = None


class Results:
    """Both result files, open for one runner."""

    def __init__(self, folder: BatchFolder, batch_id: str) -> None:
        self.done = LineSet()
        self.completed = self.failed = 0
        self.usage = BatchUsage()
        self._batch_id = batch_id
        self._encoder = msgspec.json.Encoder()
        self._decoder = msgspec.json.Decoder(_Line)
        self._output = ResultFile(folder.output, self._accept_output)
        self._errors = ResultFile(folder.errors, self._accept_error)
        self.cut_bytes = self._output.cut_bytes + self._errors.cut_bytes
        sync_folder(folder.path)

    @property
    def count(self) -> int:
        """Lines that have ended."""
        return self.completed + self.failed

    def finished(self, flight: Flight, result: GenerationResult) -> None:
        """Take the answer to a line; a second one is dropped."""
        if not self.done.add(flight.line):
            return
        body = body_of(result, url=flight.url, model=flight.model)
        record = Record(
            id=record_id(self._batch_id, flight.line),
            custom_id=flight.custom_id,
            response=Response(200, result.id, body),
            mlx_serving=Extra(line=flight.line, job=result.id, ignored=flight.ignored),
        )
        self._output.append(self._encoder.encode(record))
        self._count(result.usage)

    def failed_line(
        self, line: int, custom_id: str | None, error: LineError, job: str | None = None
    ) -> None:
        """Take the error of a line; dropped where the line has ended before."""
        if not self.done.add(line):
            return
        record = Record(
            id=record_id(self._batch_id, line),
            custom_id=custom_id,
            error=error,
            mlx_serving=Extra(line=line, job=job),
        )
        self._errors.append(self._encoder.encode(record))
        self.failed += 1

    def sync(self) -> None:
        """Make all that was taken outlive a power loss."""
        self._output.sync()
        self._errors.sync()

    def close(self) -> None:
        """Close both files."""
        self._output.close()
        self._errors.close()

    def _count(self, usage: Usage | _Tokens | None) -> None:
        self.completed += 1
        if usage is not None:
            cached = msgspec.to_builtins(usage.prompt_tokens_details) or {}
            self.usage.add(
                usage.prompt_tokens, usage.completion_tokens, cached.get("cached_tokens", 0)
            )

    def _accept_output(self, raw: bytes) -> bool:
        line = self._read(raw)
        if line is None or line.response is None:
            return False
        self._count(line.response.body.usage)
        return True

    def _accept_error(self, raw: bytes) -> bool:
        if self._read(raw) is None:
            return False
        self.failed += 1
        return True

    def _read(self, raw: bytes) -> _Line | None:
        try:
            line = self._decoder.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return None
        number = line_of(line.id, self._batch_id)
        return line if number is not None and self.done.add(number) else None
