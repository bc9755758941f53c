"""What a test measured, for `pytest -s`, and which tests are for long runs only."""

from __future__ import annotations

import pytest


def show(text: str) -> None:
    """Print a line that stands apart from pytest's own."""
    print(f"\n{text}")  # noqa: T201 -- that is what it is for


def only_in_chaos(request: pytest.FixtureRequest) -> None:
    """Skip what takes minutes, unless the run was asked for its mark (`pytest -m chaos`)."""
    if "chaos" not in str(request.config.getoption("markexpr")):
        pytest.skip("run by `make chaos` (pytest -m chaos)")
