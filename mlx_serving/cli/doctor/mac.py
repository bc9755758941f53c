"""What only a Mac can show. Written from Apple's manual pages, never run on one: unverified."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import TYPE_CHECKING, Final, Protocol

from mlx_serving.cli.doctor.report import Check, Level

if TYPE_CHECKING:
    from collections.abc import Iterator

UNVERIFIED: Final = "(unverified: this probe has never run on a Mac)"
PROBE_SECONDS: Final = 5.0
BYTES_A_GIB: Final = 1 << 30


class MacProbe(Protocol):
    """Asks the system; tests put a fake in its place."""

    platform: str

    def read(self, *command: str) -> str | None:
        """Output of a command, None where it failed or is not there."""


class SystemProbe:
    """Runs the real commands."""

    platform = sys.platform

    def read(self, *command: str) -> str | None:
        """Run one command of the system, at most 5 s."""
        try:
            done = subprocess.run(  # noqa: S603 -- our own arguments
                command, capture_output=True, text=True, timeout=PROBE_SECONDS, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()


def mac_checks(probe: MacProbe | None = None) -> Iterator[Check]:
    """Check chip, memory, wired limit, sleep and low-power mode; nothing on other systems."""
    probe = probe or SystemProbe()
    if probe.platform != "darwin":
        yield Check("mac", Level.OK, f"not a Mac ({probe.platform}): Mac-only probes skipped")
        return
    yield _hardware(probe)
    yield _wired_limit(probe)
    yield _sleep(probe)
    yield _low_power(probe)


def _check(name: str, level: Level, detail: str) -> Check:
    return Check(f"mac {name}", level, f"{detail} {UNVERIFIED}")


def _hardware(probe: MacProbe) -> Check:
    chip = probe.read("sysctl", "-n", "machdep.cpu.brand_string") or "unknown chip"
    memory = probe.read("sysctl", "-n", "hw.memsize") or ""
    system = probe.read("sw_vers", "-productVersion") or "unknown"
    size = f"{int(memory) / BYTES_A_GIB:.0f} GiB" if memory.isdigit() else "unknown memory"
    level = Level.OK if chip.startswith("Apple") else Level.WARN
    return _check("hardware", level, f"{chip}, {size}, macOS {system}")


def _wired_limit(probe: MacProbe) -> Check:
    limit = probe.read("sysctl", "-n", "iogpu.wired_limit_mb")
    if limit is None:
        return _check("wired limit", Level.WARN, "iogpu.wired_limit_mb can't be read")
    text = "the system's default" if limit == "0" else f"{limit} MB"
    return _check("wired limit", Level.OK, f"GPU memory limit: {text}")


def _sleep(probe: MacProbe) -> Check:
    """A Mac that sleeps loses its leases; its jobs go to another worker after 10 s."""
    match = re.search(r"^\s*sleep\s+(\d+)", probe.read("pmset", "-g") or "", re.MULTILINE)
    if match is None:
        return _check("sleep", Level.WARN, "pmset does not say whether this Mac sleeps")
    minutes = int(match[1])
    if minutes:
        detail = f"sleeps after {minutes} min idle: `sudo pmset -a sleep 0`, or caffeinate -s"
        return _check("sleep", Level.WARN, detail)
    return _check("sleep", Level.OK, "never sleeps when idle")


def _low_power(probe: MacProbe) -> Check:
    match = re.search(
        r"^\s*(lowpowermode|powermode)\s+(\d)", probe.read("pmset", "-g") or "", re.MULTILINE
    )
    if match and match[2] == "1":
        return _check("power", Level.WARN, "low-power mode is on: decoding is slower")
    return _check("power", Level.OK, "low-power mode is off")
