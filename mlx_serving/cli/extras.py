"""Whether this install has the engine; asked without importing it."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Final

from mlx_serving.common.errors import MissingDependency

ENGINE: Final = ("mlx", "mlx_lm")
INSTALL: Final = 'pip install "mlx-serving[worker]"'


def missing_engine() -> list[str]:
    """Packages of the [worker] extra that are not installed."""
    return [package for package in ENGINE if find_spec(package) is None]


def require_engine() -> None:
    """Refuse to go on without the engine.

    Raises:
        MissingDependency: names what is missing and the command that installs it.

    """
    missing = missing_engine()
    if missing:
        raise MissingDependency(f"{' and '.join(missing)} not installed: {INSTALL}")
