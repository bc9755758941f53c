"""What a test measured, for `pytest -s`."""

from __future__ import annotations


def show(text: str) -> None:
    """Print a line that stands apart from pytest's own."""
    print(f"\n{text}")  # noqa: T201 -- that is what it is for
