"""What the system says of its memory: whether it ran short, and how much is available.

Signs of a shortage tell the system's own SIGKILL from one that somebody sent.
"""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

CRITICAL_LEVEL: Final = 4  # of kern.memorystatus_vm_pressure_level: 1 normal, 2 warning, 4 critical


LOOK_SECONDS: Final = 1.0


class MemoryProbe(Protocol):
    """Watches one child's life."""

    def start(self) -> None:
        """Note the state when a child starts."""

    def pressed(self) -> bool:
        """Whether the system has shown since then that it lacks memory."""


class LinuxProbe:
    """Reads how many processes the kernel killed for memory, in our cgroup or else the system."""

    def __init__(self, root: Path = Path("/")) -> None:
        """`root` is the root of the file system; tests have one of their own."""
        self._root = root
        self._before: int | None = None

    def start(self) -> None:
        """Note the counter."""
        self._before = self._kills()

    def pressed(self) -> bool:
        """Whether the counter rose."""
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
        """Do nothing: the level that is read later is enough."""

    def pressed(self) -> bool:
        """Whether the level is critical."""
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


class AvailableMemory:
    """How much memory the system could still give, asked for in a thread: a Mac's answer is slow.

    `value` is in bytes; None: not known.
    """

    def __init__(self, ask: Callable[[], int | None] | None = None) -> None:
        self._ask = ask or default_available()
        self._stopping = threading.Event()
        self.value: int | None = None

    def start(self) -> None:
        """Ask now, and then once a second until `stop`."""
        self.value = self._ask()
        threading.Thread(target=self._watch, name="memory", daemon=True).start()

    def stop(self) -> None:
        """End the thread."""
        self._stopping.set()

    def _watch(self) -> None:
        while not self._stopping.wait(LOOK_SECONDS):
            self.value = self._ask()


def default_available() -> Callable[[], int | None]:
    """Return the function that asks this system."""
    return darwin_available if sys.platform == "darwin" else linux_available


def linux_available(root: Path = Path("/")) -> int | None:
    """Bytes available without swapping, by the kernel's estimate and our cgroup's limit."""
    with suppress(OSError):
        found = re.search(
            r"^MemAvailable:\s+(\d+) kB$", (root / "proc/meminfo").read_text(), re.MULTILINE
        )
        bounds = [int(found[1]) * 1024] if found else []
        group = _left_in_cgroup(root / "sys/fs/cgroup")
        return min([*bounds, *([] if group is None else [group])], default=None)
    return None


def _left_in_cgroup(group: Path) -> int | None:
    """Bytes that a cgroup v2's limit leaves; file pages not used lately count as available."""
    try:
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        found = re.search(
            r"^inactive_file (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE
        )
    except (OSError, ValueError):  # not there, or "max"
        return None
    return max(0, limit - used + (int(found[1]) if found else 0))


def darwin_available() -> int | None:
    """Bytes that `vm_stat` calls free, inactive, speculative or purgeable.

    UNVERIFIED: never run on a Mac.
    """
    try:
        done = subprocess.run(
            ["/usr/bin/vm_stat"], capture_output=True, text=True, timeout=2, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return parse_vm_stat(done.stdout)


def parse_vm_stat(text: str) -> int | None:
    """Available bytes from the output of `vm_stat`; None if it is not what we expect."""
    size = re.search(r"page size of (\d+) bytes", text)
    pages = re.findall(
        r"^Pages (?:free|inactive|speculative|purgeable):\s+(\d+)\.$", text, re.MULTILINE
    )
    return int(size[1]) * sum(map(int, pages)) if size and pages else None
