"""Signs that the system ran out of memory: they tell its SIGKILL from one that anybody sent."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Final, Protocol

CRITICAL_LEVEL: Final = 4  # of kern.memorystatus_vm_pressure_level: 1 normal, 2 warning, 4 critical


class MemoryProbe(Protocol):
    """Watches one child's life."""

    def start(self) -> None:
        """Note how things stand as a child starts."""

    def pressed(self) -> bool:
        """Say whether the system has shown since then that it lacks memory."""


class LinuxProbe:
    """Counts the kernel's out-of-memory kills: of our cgroup, else of the whole system."""

    def __init__(self, root: Path = Path("/")) -> None:
        """Look under `root`, which tests replace."""
        self._root = root
        self._before: int | None = None

    def start(self) -> None:
        """Note the counter."""
        self._before = self._kills()

    def pressed(self) -> bool:
        """Say whether the counter rose."""
        now = self._kills()
        return self._before is not None and now is not None and now > self._before

    def _kills(self) -> int | None:
        counters = map(_oom_kills, self._files())
        return next((count for count in counters if count is not None), None)

    def _files(self) -> list[Path]:
        groups = self._root / "sys/fs/cgroup"
        try:
            lines = (self._root / "proc/self/cgroup").read_text().splitlines()
        except OSError:
            lines = []
        paths = {part[1]: part[2].strip("/") for part in (line.split(":", 2) for line in lines)}
        unified, memory = paths.get("", ""), paths.get("memory", "")
        return [
            groups / unified / "memory.events",
            groups / "memory.events",
            groups / "memory" / memory / "memory.oom_control",
            self._root / "proc/vmstat",
        ]


class DarwinProbe:
    """Asks the kernel for its memory pressure level. UNVERIFIED: never run on a Mac."""

    def start(self) -> None:
        """Need nothing: the level is of now."""

    def pressed(self) -> bool:
        """Say whether the level is critical."""
        command = ["/usr/sbin/sysctl", "-n", "kern.memorystatus_vm_pressure_level"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=2, check=True)  # noqa: S603 -- a constant
            return int(done.stdout) >= CRITICAL_LEVEL
        except (OSError, subprocess.SubprocessError, ValueError):
            return False


def default_probe() -> MemoryProbe:
    """Return this system's probe."""
    return DarwinProbe() if sys.platform == "darwin" else LinuxProbe()


def _oom_kills(path: Path) -> int | None:
    try:
        found = re.search(r"^oom_kill (\d+)$", path.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) if found else None
