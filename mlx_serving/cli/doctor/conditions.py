"""Whether a worker here may work now, and what this machine can't tell of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlx_serving.cli.doctor.mac import UNVERIFIED
from mlx_serving.cli.doctor.report import Check, Level

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlx_serving.common.settings import Settings
    from mlx_serving.worker.conditions import Probe


def condition_checks(settings: Settings, probe: Probe | None = None) -> Iterator[Check]:
    """Say what the settings ask for, whether it holds now, and each thing that can't be told."""
    from mlx_serving.worker.conditions import Conditions, Rules
    from mlx_serving.worker.conditions_mac import MacProbe, default_probe

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
            detail = "set, but this machine can't tell: it will stop nothing"
            yield Check(f"work {name}", Level.WARN, detail)


def _seconds(idle: float | None) -> str | None:
    return None if idle is None else f"last touched {idle:.0f} s ago"


def _power(*, on_battery: bool | None) -> str | None:
    return None if on_battery is None else "on battery" if on_battery else "on mains"
