"""The native module, and reports of what uses it. Every accelerated piece has a Python twin."""

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Final, Literal

SWITCHED_OFF: Final = "switched off by the settings"


@dataclass(frozen=True, slots=True)
class AccelerationReport:
    """Which implementation of a piece is used; "off": the engine runs without the piece.

    `reason` reads well after a colon.
    """

    piece: str
    implementation: Literal["native", "twin", "off"]
    reason: str

    def __str__(self) -> str:
        return f"{self.piece}: {self.implementation} ({self.reason})"


def load_native() -> tuple[ModuleType | None, str]:
    """Return the native module and "built", or None and why it can't be loaded."""
    try:
        return import_module("mlx_serving._native"), "built"
    except ModuleNotFoundError:
        return None, "this install was built without the native module"
    except ImportError as error:  # built for another Python or another machine
        return None, f"the native module does not load: {error}"
