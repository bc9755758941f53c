"""A check's outcome, and the report of all of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """How good a check's outcome is."""

    OK = "ok"
    WARN = "warn"
    """It runs, with less than what is promised; the detail says with what."""
    FAIL = "fail"
    """It doesn't run, or loses jobs."""


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report."""

    name: str
    level: Level
    detail: str


def failed(checks: Iterable[Check]) -> bool:
    """Whether any check failed."""
    return any(check.level is Level.FAIL for check in checks)
