"""The outcome of a check, and the report on all of them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from mlx_serving.cli.console import print_table

if TYPE_CHECKING:
    from collections.abc import Iterable


class Level(StrEnum):
    """How good a check's outcome is."""

    OK = "ok"
    WARN = "warn"
    """It runs, but does not keep every promise; the detail says which."""
    SKIP = "skip"
    """This user may not look at it; the detail says what would show it."""
    FAIL = "fail"
    """It does not run, or it loses jobs."""


MAY_NOT_LOOK: Final = "this user's rules don't let it look; the user worker may"
STYLES: Final = {Level.OK: "green", Level.WARN: "yellow", Level.SKIP: "dim", Level.FAIL: "bold red"}


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report."""

    name: str
    level: Level
    detail: str


def failed(checks: Iterable[Check]) -> bool:
    """Whether any check failed."""
    return any(check.level is Level.FAIL for check in checks)


def print_report(checks: Iterable[Check]) -> None:
    """Print a table of the checks."""
    from rich.text import Text

    rows = [(Text(c.level.value, STYLES[c.level]), c.name, c.detail) for c in checks]
    print_table(("", "check", "what was found"), rows)
