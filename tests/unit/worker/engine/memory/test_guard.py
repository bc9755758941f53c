"""The guard's policy on made-up numbers: how much room there is, and what it does when short."""

from typing import Final

import pytest

from mlx_serving.worker.engine.memory.guard import (
    MARGIN,
    SPIKE_LOOKS,
    KvUse,
    MemoryGuard,
    MemoryReading,
    Relief,
)

GIB: Final = 1 << 30
LIMIT: Final = 40 * GIB


def reading(
    active: float, *, cached: float = 0, peak: float = 0, available: float | None = None
) -> MemoryReading:
    """In GiB, of 40."""
    known = None if available is None else int(available * GIB)
    most = max(active, peak)
    return MemoryReading(int(active * GIB), int(cached * GIB), int(most * GIB), LIMIT, known)


def room(guard: MemoryGuard, at: MemoryReading, kv: float = 0) -> float:
    """In GiB, the margin of 2 GiB not taken off."""
    return guard.judge(at, KvUse(int(kv * GIB))).room_bytes / GIB + MARGIN * 40


def test_room_is_what_weights_leave_whatever_the_caches_hold_by_now() -> None:
    assert room(MemoryGuard(), reading(10)) == pytest.approx(30)
    assert room(MemoryGuard(), reading(25), kv=15) == pytest.approx(30)


def test_what_a_step_took_for_a_while_is_left_free_for_the_next_one() -> None:
    guard = MemoryGuard()
    guard.judge(reading(10), KvUse())
    assert room(guard, reading(10, peak=14)) == pytest.approx(26)
    assert room(guard, reading(10)) == pytest.approx(26)
    for _ in range(SPIKE_LOOKS):
        last = room(guard, reading(10))
    assert last == pytest.approx(30)


def test_rows_that_left_are_no_spike() -> None:
    guard = MemoryGuard()
    guard.judge(reading(30), KvUse(20 * GIB))
    assert room(guard, reading(10, peak=30)) == pytest.approx(30)


def test_what_other_programs_take_is_not_ours() -> None:
    assert room(MemoryGuard(), reading(10, available=12)) == pytest.approx(12)
    assert room(MemoryGuard(), reading(10, cached=3, available=12)) == pytest.approx(15)
    assert room(MemoryGuard(), reading(10, available=100)) == pytest.approx(30)


def test_it_trims_then_shrinks_then_refuses_one_step_a_look() -> None:
    guard = MemoryGuard()
    steps = [guard.judge(reading(39.5), KvUse()) for _ in range(5)]
    assert [step.relief for step in steps] == [
        Relief.TRIM, Relief.SHRINK, Relief.REFUSE, Relief.REFUSE, Relief.REFUSE,
    ]  # fmt: skip
    assert steps[2].room_bytes == 0


def test_short_is_less_than_a_fortieth_with_what_a_step_takes() -> None:
    assert MemoryGuard().judge(reading(39), KvUse()).relief is Relief.NONE
    assert MemoryGuard().judge(reading(39.01), KvUse()).relief is Relief.TRIM
    guard = MemoryGuard()
    guard.judge(reading(30), KvUse())
    assert guard.judge(reading(30, peak=39.5), KvUse()).relief is Relief.TRIM


def test_it_stays_where_it_is_until_there_is_room_to_spare() -> None:
    guard = MemoryGuard()
    for _ in range(3):
        guard.judge(reading(39.5), KvUse())
    assert guard.judge(reading(38.5), KvUse()).relief is Relief.REFUSE  # 3.75%
    assert guard.judge(reading(38), KvUse()).relief is Relief.NONE  # 5%
    assert guard.judge(reading(38.5), KvUse()).relief is Relief.NONE


def test_full_caches_are_not_short_of_memory() -> None:
    """What the room allows never leads to a refusal by itself."""
    guard = MemoryGuard()
    allowed = guard.judge(reading(10), KvUse()).room_bytes
    full = MemoryReading(10 * GIB + allowed, 0, 10 * GIB + allowed, LIMIT)
    assert guard.judge(full, KvUse(allowed)).relief is Relief.NONE


def test_a_request_that_prefixes_starve_costs_them_and_nothing_else() -> None:
    guard = MemoryGuard()
    starved = KvUse(20 * GIB, starved=True)
    reliefs = [guard.judge(reading(30), starved) for _ in range(4)]
    assert [r.relief for r in reliefs] == [Relief.TRIM, Relief.SHRINK, Relief.SHRINK, Relief.SHRINK]
    assert all(r.room_bytes for r in reliefs)
    assert guard.judge(reading(30), KvUse(20 * GIB)).relief is Relief.NONE


def test_more_active_than_the_limit_is_no_negative_room() -> None:
    judged = MemoryGuard().judge(reading(50, available=0), KvUse(GIB))
    assert (judged.relief, judged.room_bytes) == (Relief.TRIM, 0)


def test_a_reading_of_nothing_is_survived() -> None:
    assert MemoryGuard().judge(MemoryReading(0, 0, 0, 0, 0), KvUse()).room_bytes == 0
