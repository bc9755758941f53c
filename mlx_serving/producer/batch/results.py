"""The results of a batch: an output file and an error file, which are also its journal.

A line has ended once its result is in one of the two files. Each start of a runner counts them
anew, so a crash can't make the counts in `batch.json` disagree with the files.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from mlx_serving.common.durable import sync_folder
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
    from mlx_serving.producer.batch.folder import BatchFolder
    from mlx_serving.producer.batch.window import SubmittedLine


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

    def finished(self, line: SubmittedLine, result: GenerationResult) -> None:
        """Write the answer to a line; drop a second one."""
        if not self.done.add(line.line):
            return
        body = body_of(result, url=line.url, model=line.model)
        record = Record(
            id=record_id(self._batch_id, line.line),
            custom_id=line.custom_id,
            response=Response(200, result.id, body),
            mlx_serving=Extra(line=line.line, job=result.id, ignored=line.ignored),
        )
        self._output.append(self._encoder.encode(record))
        self._count(result.usage)

    def failed_line(
        self, line: int, custom_id: str | None, error: LineError, job: str | None = None
    ) -> None:
        """Write the error of a line; drop it if the line has ended before."""
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
        """Make everything written so far outlive a power loss."""
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
        if line is None or line.response is None or not self._is_new(line):
            return False
        self._count(line.response.body.usage)
        return True

    def _accept_error(self, raw: bytes) -> bool:
        line = self._read(raw)
        if line is None or not self._is_new(line):
            return False
        self.failed += 1
        return True

    def _read(self, raw: bytes) -> _Line | None:
        try:
            return self._decoder.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return None

    def _is_new(self, line: _Line) -> bool:
        """Note that a line of this batch has ended; False for a second one, or another batch's."""
        number = line_of(line.id, self._batch_id)
        return number is not None and self.done.add(number)
