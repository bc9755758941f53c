"""What a Mac says of its user, its heat and its power. From Apple's manual pages: unverified."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import TYPE_CHECKING, Final

from mlx_serving.worker.status.conditions import SILENT

if TYPE_CHECKING:
    from collections.abc import Callable

    from mlx_serving.worker.status.conditions import Pressure, Probe

COMMAND_SECONDS: Final = 5.0
NANOSECONDS: Final = 1e9
IDLE: Final = re.compile(r'"HIDIdleTime" = (\d+)')
PRESSURE: Final = re.compile(r"thermalpressurelevel (\d)\b")
POWER: Final = re.compile(r"drawing from '(Battery|AC) Power'")
LEVELS: Final[tuple[Pressure, ...]] = ("nominal", "moderate", "heavy", "critical", "critical")
"""The pressure by the number that the system posts: nominal … heavy, trapping, sleeping."""


def run_command(*command: str) -> str | None:
    """Output of a command of the system; None if it failed, hung or is not there."""
    try:
        done = subprocess.run(  # noqa: S603 -- our own arguments
            command, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


class MacProbe:
    """Asks the system's own commands; none needs root. `read` runs one, or is a test's own."""

    def __init__(self, read: Callable[..., str | None] = run_command) -> None:
        self._read = read

    def _find(self, pattern: re.Pattern[str], *command: str) -> str | None:
        match = pattern.search(self._read(*command) or "")
        return match[1] if match else None

    def idle_seconds(self) -> float | None:
        """From the event system's registry entry, in nanoseconds there."""
        found = self._find(IDLE, "ioreg", "-c", "IOHIDSystem", "-d", "4")
        return int(found) / NANOSECONDS if found else None

    def thermal_pressure(self) -> Pressure | None:
        """From the notification that the system posts when its thermal pressure changes."""
        name = "com.apple.system.thermalpressurelevel"
        found = self._find(PRESSURE, "notifyutil", "-g", name)
        return LEVELS[int(found)] if found and int(found) < len(LEVELS) else None

    def on_battery(self) -> bool | None:
        """From the first line of `pmset -g batt`."""
        found = self._find(POWER, "pmset", "-g", "batt")
        return found == "Battery" if found else None


def default_probe() -> Probe:
    """The machine's own probe; a silent one if it is no Mac."""
    return MacProbe() if sys.platform == "darwin" else SILENT
