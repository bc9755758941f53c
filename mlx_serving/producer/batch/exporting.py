"""Copies result files out: whole lines of this batch, each input line once."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

import msgspec

from mlx_serving.producer.batch.line_set import LineSet
from mlx_serving.producer.batch.records import line_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class _Id(msgspec.Struct):
    id: str


def whole_lines(path: Path, batch_id: str) -> Iterator[bytes]:
    """Lines of a result file, also while it grows; a torn tail and duplicates are left out."""
    seen = LineSet()
    decoder = msgspec.json.Decoder(_Id)
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        for raw in file:
            if not raw.endswith(b"\n"):
                return
            try:
                line = line_of(decoder.decode(raw).id, batch_id)
            except (msgspec.DecodeError, UnicodeDecodeError):
                return
            if line is not None and seen.add(line):
                yield raw


def copy_lines(lines: Iterator[bytes], to: Path) -> int:
    """Write lines to a file that is there whole or not at all; returns how many."""
    part = to.with_name(f".{to.name}.part")
    count = 0
    with part.open("wb") as file:
        for count, line in enumerate(lines, 1):  # noqa: B007 -- the last one is the number
            file.write(line)
        file.flush()
        os.fsync(file.fileno())
    part.replace(to)
    return count
