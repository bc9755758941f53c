"""What all commands print the same way: errors, JSON, tables, text that a model wrote."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import typer

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from mlx_serving.common.errors import MlxServingError

EXIT_ERROR: Final = 1
SIGNALLED: Final = 128  # and the signal's number, as in shells
EXIT_INTERRUPTED: Final = SIGNALLED + 2  # SIGINT
WIDE_COLUMNS: Final = 200  # width of a table that goes to a file or a pipe

# C0 without tab and newline, DEL, and C1: what could drive a terminal.
_CONTROLS: Final = dict.fromkeys(
    [*(n for n in range(32) if chr(n) not in "\t\n"), *range(127, 160)], "\ufffd"
)


def note(text: str) -> None:
    """Print a line for people on stderr; stdout is for the command's output.

    If stderr is gone (its terminal was closed), there is nobody to tell.
    """
    with suppress(OSError):
        typer.echo(text, err=True)


def fail(error: MlxServingError) -> None:
    """Print an error as one line with its code."""
    note(f"error: {error.code}: {' '.join(str(error).split())}")


def fail_at_output(error: OSError) -> None:
    """Print an error of the system in one line, as of a full disk or an unreadable file.

    Output that stdout still buffers is dropped: the interpreter would fail to write it again.
    """
    named = f"{error.filename}: " if error.filename else ""
    note(f"error: io_error: {named}{error.strerror or error}")
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def harmless(text: str) -> str:
    """Replace the control characters in text that a model wrote: they could drive a terminal."""
    return text.translate(_CONTROLS)


def print_json(value: object) -> None:
    """Print a value as JSON, indented."""
    import msgspec

    typer.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a plain table; cells are text, never markup."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    width = None if sys.stdout.isatty() else WIDE_COLUMNS
    Console(width=width).print(table)
