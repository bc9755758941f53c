"""When a child is replaced by plan: by tokens, steps, hours, or memory that does not come down."""

from __future__ import annotations

import pytest

from mlx_serving.common.settings import load_settings
from mlx_serving.worker.process.recycling import (
    LEAST_GROWTH_BYTES,
    WINDOW_LOOKS,
    MemoryFloor,
    RecycleRules,
    Recycling,
)

LIMIT = 8 << 30


class Age:
    def __init__(self, **rules: float) -> None:
        self.now = 50.0
        self.recycling = Recycling(RecycleRules(**rules), lambda: self.now)  # type: ignore[arg-type]

    def due(self, tokens: float = 0, steps: int = 0, *, memory_grown: bool = False) -> str | None:
        return self.recycling.due(tokens=tokens, steps=steps, memory_grown=memory_grown)


def test_nothing_is_due_without_a_rule() -> None:
    age = Age()
    age.now += 1e9
    assert age.due(tokens=1e12, steps=10**12) is None


def test_each_rule_is_due_when_it_is_reached_and_not_before() -> None:
    assert Age(tokens=100).due(tokens=99) is None
    assert Age(tokens=100).due(tokens=100) == "tokens"
    assert Age(steps=7).due(steps=6) is None
    assert Age(steps=7).due(steps=7) == "steps"
    age = Age(hours=2.0)
    age.now += 7199
    assert age.due() is None
    age.now += 1
    assert age.due() == "hours"


def test_memory_that_stays_high_comes_first() -> None:
    assert Age(tokens=1).due(tokens=5, memory_grown=True) == "memory"


def test_workers_that_start_together_are_not_replaced_together() -> None:
    settings = load_settings(
        engine__recycle_after_hours=10.0, engine__recycle_after_tokens=1_000_000
    )
    rules = [RecycleRules.of(settings, f"mac-{n}") for n in range(50)]
    assert len({rule.hours for rule in rules}) > 40
    assert all(9.0 <= rule.hours <= 10.0 for rule in rules)
    assert all(900_000 <= rule.tokens <= 1_000_000 for rule in rules)


def test_a_rule_that_is_off_stays_off() -> None:
    off = load_settings(engine__recycle_after_hours=0, engine__recycle_after_tokens=0)
    rules = RecycleRules.of(off, "mac-1")
    assert (rules.tokens, rules.hours) == (0, 0.0)


def watched(*floors: int, spike: int = 0) -> MemoryFloor:
    """A floor for each window, with a spike in every second look, the first one too."""
    floor = MemoryFloor()
    for used in floors:
        for look in range(WINDOW_LOOKS):
            floor.see(used + (0 if look % 2 else spike))
    return floor


def test_what_a_step_takes_for_a_while_is_no_growth() -> None:
    assert not watched(1 << 30, 1 << 30, spike=4 << 30).grown(LIMIT)


def test_a_floor_that_rises_is() -> None:
    base = 1 << 30
    assert not watched(base, base + LEAST_GROWTH_BYTES).grown(LIMIT)
    assert watched(base, base + LEAST_GROWTH_BYTES + 1).grown(LIMIT)
    assert watched(base, base + LEAST_GROWTH_BYTES + 1, spike=4 << 30).grown(LIMIT)
    assert not watched(base, base + LEAST_GROWTH_BYTES + 1).grown(100 << 30)  # 5% of that is more


def test_nothing_is_said_before_two_minutes() -> None:
    floor = watched(1 << 30)
    for _ in range(WINDOW_LOOKS - 1):
        floor.see(9 << 30)
    assert not floor.grown(LIMIT)
    floor.see(9 << 30)
    assert floor.grown(LIMIT)


@pytest.mark.parametrize("windows", [1, 2])
def test_a_load_on_purpose_begins_it_again(windows: int) -> None:
    floor = watched(1 << 30)
    floor.begin_again()
    for _ in range(windows * WINDOW_LOOKS):
        floor.see(9 << 30)
    assert not floor.grown(LIMIT)
