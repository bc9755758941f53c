"""When a worker may claim: hours, the Mac's user, heat, battery. The Mac is faked."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import pytest
import structlog

from mlx_serving.common.errors import InvalidSettings
from mlx_serving.common.settings import load_settings
from mlx_serving.worker.status.conditions import REASONS, Conditions, Hours, Rules, local_minute
from mlx_serving.worker.status.conditions_mac import MacProbe
from tests.support.helpers import wait_until
from tests.support.worker_fakes import FakeProbe


@dataclass
class Clock:
    """Local wall-clock time, in minutes of the day."""

    minute: int = 12 * 60

    def __call__(self) -> int:
        return self.minute


ALL = Rules(user_seconds=300.0, hot=True, battery=True)


def reasons(rules: Rules, probe: FakeProbe, minute: int = 0) -> tuple[str, ...]:
    conditions = Conditions(rules, probe, Clock(minute))
    conditions.look()
    return conditions.reasons


@pytest.mark.parametrize(
    ("hours", "inside", "outside"),
    [
        ("22:00-07:00", ["22:00", "23:59", "00:00", "06:59"], ["07:00", "12:00", "21:59"]),
        ("09:30-17:00", ["09:30", "12:00", "16:59"], ["09:29", "17:00", "23:00", "00:00"]),
        ("00:00-24:00", ["00:00", "12:00", "23:59"], []),
    ],
)
def test_hours_begin_with_their_first_minute_and_end_before_their_last(
    hours: str, inside: list[str], outside: list[str]
) -> None:
    window = Hours.parse(hours)
    for text, expected in [(t, True) for t in inside] + [(t, False) for t in outside]:
        hour, minute = map(int, text.split(":"))
        assert window.holds(hour * 60 + minute) is expected, text


def test_one_of_several_windows_is_enough() -> None:
    rules = Rules(hours=(Hours.parse("22:00-07:00"), Hours.parse("12:00-13:00")))
    found = {hour: reasons(rules, FakeProbe(), hour * 60) for hour in (3, 8, 12, 14)}
    assert found == {3: (), 8: ("outside_hours",), 12: (), 14: ("outside_hours",)}


@pytest.mark.parametrize(
    ("probe", "expected"),
    [
        (FakeProbe(), ()),
        (FakeProbe(idle=299.0), ("user_active",)),
        (FakeProbe(idle=300.0), ()),
        (FakeProbe(pressure="moderate"), ()),
        (FakeProbe(pressure="heavy"), ("hot",)),
        (FakeProbe(pressure="critical"), ("hot",)),
        (FakeProbe(battery=True), ("on_battery",)),
        (FakeProbe(0.0, "heavy", battery=True), ("user_active", "hot", "on_battery")),
    ],
)
def test_each_rule_has_its_reason(probe: FakeProbe, expected: tuple[str, ...]) -> None:
    assert reasons(ALL, probe) == expected
    assert set(expected) <= set(REASONS)


def test_no_rule_asks_nothing() -> None:
    class Untouchable(FakeProbe):
        def idle_seconds(self) -> float | None:
            raise AssertionError("asked")

    assert reasons(Rules(), Untouchable(0.0, "critical", battery=True)) == ()


def test_what_the_machine_cannot_tell_stops_nothing_and_is_said_once() -> None:
    conditions = Conditions(ALL, FakeProbe(None, None, None), Clock())
    with structlog.testing.capture_logs() as logs:
        conditions.look()
        conditions.look()
    assert conditions.reasons == ()
    said = [entry["condition"] for entry in logs if entry["event"] == "condition_unknown"]
    assert said == ["user_active", "hot", "on_battery"]


def test_a_change_is_logged_with_its_reasons() -> None:
    probe = FakeProbe(battery=True)
    conditions = Conditions(ALL, probe, Clock())
    with structlog.testing.capture_logs() as logs:
        for battery, event in ((True, "worker_paused"), (True, ""), (False, "worker_unpaused")):
            probe.battery = battery
            conditions.look()
            assert [entry["event"] for entry in logs] == ([event] if event else [])
            assert all(entry.get("reasons", ["on_battery"]) == ["on_battery"] for entry in logs)
            logs.clear()


@pytest.mark.parametrize("hands_over", [False, True])
def test_what_is_held_goes_elsewhere_only_while_paused_and_where_asked(*, hands_over: bool) -> None:
    probe = FakeProbe(battery=True)
    conditions = Conditions(replace(ALL, hands_over=hands_over), probe, Clock())
    conditions.look()
    assert conditions.hands_over is hands_over
    probe.battery = False
    conditions.look()
    assert not conditions.hands_over


def test_the_clock_counts_minutes_of_the_local_day(monkeypatch: pytest.MonkeyPatch) -> None:
    at = time.struct_time((2026, 11, 24, 22, 31, 59, 1, 328, 0))
    monkeypatch.setattr(time, "localtime", lambda: at)
    assert local_minute() == 22 * 60 + 31


def test_it_looks_again_by_itself() -> None:
    probe = FakeProbe(battery=True)
    conditions = Conditions(ALL, probe, Clock(), every=0.01)
    conditions.start()
    try:
        assert conditions.reasons == ("on_battery",)  # known before the first claim
        probe.battery = False
        wait_until(lambda: not conditions.reasons)
    finally:
        conditions.stop()


# -- settings ---------------------------------------------------------------------------


def test_rules_come_from_the_settings() -> None:
    settings = load_settings(
        conditions__hours="22:00-07:00, 12:00-13:00",
        conditions__user_idle_seconds=600,
        conditions__pause_when_hot=True,
        conditions__pause_on_battery=True,
        conditions__hand_over=True,
    )
    rules = Rules.of(settings)
    assert rules.hours == (Hours(22 * 60, 7 * 60), Hours(12 * 60, 13 * 60))
    assert (rules.user_seconds, rules.hot, rules.battery, rules.hands_over) == (
        600,
        True,
        True,
        True,
    )
    assert Rules.of(load_settings()) == Rules()


@pytest.mark.parametrize("wrong", ["22-7", "22:00", "25:00-07:00", "22:60-07:00", "07:00-07:00"])
def test_wrong_hours_are_named(wrong: str) -> None:
    with pytest.raises(InvalidSettings, match=r"conditions\.hours"):
        load_settings(conditions__hours=wrong)


# -- the Mac's own words, as its manual pages have them (unverified) --------------------


class Answers:
    """What the Mac's commands print."""

    def __init__(self, **printed: str) -> None:
        self._printed = printed

    def __call__(self, *command: str) -> str | None:
        return self._printed.get(command[0])


IDLE = '    | |   "HIDIdleTime" = 4512345678\n    | |   "HIDPointerAcceleration" = 0\n'


@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        ({"ioreg": IDLE}, (4.512345678, None, None)),
        ({"notifyutil": "com.apple.system.thermalpressurelevel 0"}, (None, "nominal", None)),
        ({"notifyutil": "com.apple.system.thermalpressurelevel 1"}, (None, "moderate", None)),
        ({"notifyutil": "com.apple.system.thermalpressurelevel 2"}, (None, "heavy", None)),
        ({"notifyutil": "com.apple.system.thermalpressurelevel 4"}, (None, "critical", None)),
        ({"pmset": "Now drawing from 'Battery Power'\n -InternalBattery-0"}, (None, None, True)),
        ({"pmset": "Now drawing from 'AC Power'"}, (None, None, False)),
        ({"ioreg": "", "notifyutil": "oops", "pmset": "what?"}, (None, None, None)),
        ({}, (None, None, None)),
    ],
)
def test_a_mac_is_read_by_its_commands(printed: dict[str, Any], expected: tuple[Any, ...]) -> None:
    probe = MacProbe(Answers(**printed))
    assert (probe.idle_seconds(), probe.thermal_pressure(), probe.on_battery()) == expected
