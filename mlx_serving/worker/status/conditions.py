"""Whether this worker may work now: hours, the machine's user, heat, battery.

A worker that may not work claims nothing. It goes on with the jobs that it holds or, if a setting
says so, hands them over. A condition that the machine can't tell does not stop the worker: it would
wait for ever for a sensor that is not there.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, Protocol, Self, TypeVar

import structlog

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mlx_serving.common.settings import Settings

log = structlog.get_logger(__name__)

LOOK_SECONDS: Final = 5.0
Pressure = Literal["nominal", "moderate", "heavy", "critical"]
HOT: Final[tuple[Pressure, ...]] = ("heavy", "critical")
REASONS: Final = ("outside_hours", "user_active", "hot", "on_battery")
T = TypeVar("T")


class Probe(Protocol):
    """What a machine says of its conditions. None: it can't tell."""

    def idle_seconds(self) -> float | None:
        """Seconds since its user last touched keyboard, mouse or trackpad."""

    def thermal_pressure(self) -> Pressure | None:
        """How hot it runs; from `heavy` on the system slows it down."""

    def on_battery(self) -> bool | None:
        """Whether it draws its power from a battery."""


class SilentProbe:
    """A machine that can't tell anything."""

    def idle_seconds(self) -> None:
        """Not known."""

    def thermal_pressure(self) -> None:
        """Not known."""

    def on_battery(self) -> None:
        """Not known."""


SILENT: Final = SilentProbe()


@dataclass(frozen=True, slots=True)
class Hours:
    """A span of the day in minutes since midnight; it may end after the next midnight."""

    begin: int
    end: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read text like `22:00-07:00`, which the settings have checked."""
        begin, end = (int(t[:2]) * 60 + int(t[3:]) for t in text.split("-"))
        return cls(begin, end)

    def holds(self, minute: int) -> bool:
        """Whether it contains this minute of the day."""
        if self.begin < self.end:
            return self.begin <= minute < self.end
        return minute >= self.begin or minute < self.end


@dataclass(frozen=True, slots=True)
class Rules:
    """When a worker backs off.

    `hours` are those in which it works; (): all. It backs off until its machine's user has been
    idle for `user_seconds`; 0: it does not look. `hot`, `battery`: whether it backs off for these.
    `hands_over`: whether it then gives up the jobs that it holds.
    """

    hours: tuple[Hours, ...] = ()
    user_seconds: float = 0.0
    hot: bool = False
    battery: bool = False
    hands_over: bool = False

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """Read them from the settings."""
        given = settings.conditions
        return cls(
            tuple(map(Hours.parse, given.hours)), given.user_idle_seconds, given.pause_when_hot,
            given.pause_on_battery, given.hand_over,
        )  # fmt: skip

    @property
    def any(self) -> bool:
        """Whether there is any rule."""
        return bool(self.hours or self.user_seconds or self.hot or self.battery)


def local_minute() -> int:
    """The minute of the day by this machine's wall clock and time zone."""
    now = time.localtime()
    return now.tm_hour * 60 + now.tm_min


class Conditions:
    """Asks the probe every few seconds, in a thread of its own because that may take seconds."""

    def __init__(
        self,
        rules: Rules = Rules(),
        probe: Probe = SILENT,
        minute: Callable[[], int] = local_minute,
        every: float = LOOK_SECONDS,
    ) -> None:
        self.rules = rules
        self.reasons: tuple[str, ...] = ()  # why this worker may not work; (): it may
        self._probe, self._minute, self._every = probe, minute, every
        self._unknown: set[str] = set()
        self._stopping = threading.Event()

    @property
    def hands_over(self) -> bool:
        """Whether the jobs that are held are to go to other workers now."""
        return bool(self.reasons) and self.rules.hands_over

    def start(self) -> None:
        """Look now, and then every few seconds until `stop`."""
        if self.rules.any:
            self.look()
            threading.Thread(target=self._watch, name="conditions", daemon=True).start()

    def stop(self) -> None:
        """End the thread."""
        self._stopping.set()

    def _watch(self) -> None:
        while not self._stopping.wait(self._every):
            self.look()

    def look(self) -> None:
        """Look once, and log what changed."""
        before, self.reasons = self.reasons, tuple(self.found())
        if self.reasons and self.reasons != before:
            log.info("worker_paused", reasons=list(self.reasons), hands_over=self.rules.hands_over)
        elif before and not self.reasons:
            log.info("worker_unpaused")

    def found(self) -> Iterator[str]:
        """Yield those of `REASONS` that apply now."""
        rules, probe = self.rules, self._probe
        if rules.hours and not any(hours.holds(self._minute()) for hours in rules.hours):
            yield "outside_hours"
        if rules.user_seconds:
            idle = self._known("user_active", probe.idle_seconds())
            if idle is not None and idle < rules.user_seconds:
                yield "user_active"
        if rules.hot and self._known("hot", probe.thermal_pressure()) in HOT:
            yield "hot"
        if rules.battery and self._known("on_battery", probe.on_battery()):
            yield "on_battery"

    def _known(self, condition: str, value: T | None) -> T | None:
        if value is not None:
            self._unknown.discard(condition)
        elif condition not in self._unknown:
            self._unknown.add(condition)
            log.warning("condition_unknown", condition=condition)
        return value


ANY_TIME: Final = Conditions()
