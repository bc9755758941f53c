"""Checks of this machine: the conditions on when a worker may work, and a Mac's state."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import TYPE_CHECKING, Final, Protocol

from mlx_serving.cli.doctor.report import Check, Level

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlx_serving.common.settings import Settings
    from mlx_serving.worker.status.conditions import Probe


def condition_checks(settings: Settings, probe: Probe | None = None) -> Iterator[Check]:
    """Report the conditions in the settings, whether they hold, and what can't be determined."""
    from mlx_serving.worker.status.conditions import Conditions, Rules
    from mlx_serving.worker.status.conditions_mac import MacProbe, default_probe

    rules = Rules.of(settings)
    probe = probe or default_probe()
    mark = f" {UNVERIFIED}" if isinstance(probe, MacProbe) else ""
    if not rules.any:
        yield Check("work", Level.OK, "at all times: no condition is set")
    else:
        conditions = Conditions(rules, probe)
        reasons = ", ".join(conditions.found())
        text = f"a worker would be paused now: {reasons}" if reasons else "a worker may work now"
        yield Check("work", Level.OK, text + mark)
    for name, wanted, told in (
        ("user", bool(rules.user_seconds), _seconds(probe.idle_seconds())),
        ("heat", rules.hot, probe.thermal_pressure()),
        ("battery", rules.battery, _power(on_battery=probe.on_battery())),
    ):
        if told is not None:
            yield Check(f"work {name}", Level.OK, told + mark)
        elif wanted:
            detail = "set, but this machine can't tell: it has no effect"
            yield Check(f"work {name}", Level.WARN, detail)


def _seconds(idle: float | None) -> str | None:
    return None if idle is None else f"last touched {idle:.0f} s ago"


def _power(*, on_battery: bool | None) -> str | None:
    return None if on_battery is None else "on battery" if on_battery else "on mains"


UNVERIFIED: Final = "(unverified: this probe has never run on a Mac)"


PROBE_SECONDS: Final = 5.0


BYTES_A_GIB: Final = 1 << 30


class CommandProbe(Protocol):
    """Runs commands of the system; tests replace it by a fake."""

    platform: str

    def read(self, *command: str) -> str | None:
        """Output of a command; None if it failed or does not exist."""


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


def mac_checks(probe: CommandProbe | None = None) -> Iterator[Check]:
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


def _hardware(probe: CommandProbe) -> Check:
    chip = probe.read("sysctl", "-n", "machdep.cpu.brand_string") or "unknown chip"
    memory = probe.read("sysctl", "-n", "hw.memsize") or ""
    system = probe.read("sw_vers", "-productVersion") or "unknown"
    size = f"{int(memory) / BYTES_A_GIB:.0f} GiB" if memory.isdigit() else "unknown memory"
    level = Level.OK if chip.startswith("Apple") else Level.WARN
    return _check("hardware", level, f"{chip}, {size}, macOS {system}")


def _wired_limit(probe: CommandProbe) -> Check:
    limit = probe.read("sysctl", "-n", "iogpu.wired_limit_mb")
    if limit is None:
        return _check("wired limit", Level.WARN, "iogpu.wired_limit_mb can't be read")
    text = "the system's default" if limit == "0" else f"{limit} MB"
    return _check("wired limit", Level.OK, f"GPU memory limit: {text}")


def _sleep(probe: CommandProbe) -> Check:
    """A Mac that sleeps loses its leases; its jobs go to another worker after 10 s."""
    match = re.search(r"^\s*sleep\s+(\d+)", probe.read("pmset", "-g") or "", re.MULTILINE)
    if match is None:
        return _check("sleep", Level.WARN, "pmset does not say whether this Mac sleeps")
    minutes = int(match[1])
    if minutes:
        detail = f"sleeps after {minutes} min idle: `sudo pmset -a sleep 0`, or caffeinate -s"
        return _check("sleep", Level.WARN, detail)
    return _check("sleep", Level.OK, "never sleeps when idle")


def _low_power(probe: CommandProbe) -> Check:
    match = re.search(
        r"^\s*(lowpowermode|powermode)\s+(\d)", probe.read("pmset", "-g") or "", re.MULTILINE
    )
    if match and match[2] == "1":
        return _check("power", Level.WARN, "low-power mode is on: decoding is slower")
    return _check("power", Level.OK, "low-power mode is off")
