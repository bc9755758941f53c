"""The clock of a batch's window: one wrong look decides nothing."""

from __future__ import annotations

from mlx_serving.producer.batch.window_clock import AGREE_SECONDS, WindowClock

DAY = 86_400.0
EPOCH = 1_000_000.0


def looked(clock: WindowClock, first_s: int, last_s: int, ahead_s: float = EPOCH) -> WindowClock:
    """A look a second."""
    for second in range(first_s, last_s + 1):
        clock.look(ahead_s + second, float(second))
    return clock


def test_before_any_look_it_knows_nothing() -> None:
    assert (WindowClock().now_s(1.0), WindowClock().sure) == (None, False)


def test_it_is_sure_once_looks_have_agreed_for_a_while() -> None:
    clock = looked(WindowClock(), 0, int(AGREE_SECONDS) - 1)
    assert not clock.sure
    assert looked(clock, int(AGREE_SECONDS), int(AGREE_SECONDS)).sure
    assert clock.now_s(50.0) == EPOCH + 50  # without a look, it goes on


def test_wrong_looks_in_between_change_nothing() -> None:
    clock = looked(WindowClock(), 0, 20)
    looked(clock, 21, 25, ahead_s=EPOCH + DAY)
    assert clock.now_s(25.0) == EPOCH + 25
    looked(clock, 26, 40)
    assert clock.now_s(40.0) == EPOCH + 40


def test_a_wrong_first_look_makes_nobody_sure() -> None:
    clock = looked(WindowClock(), 0, 0, ahead_s=EPOCH + DAY)
    assert not clock.sure
    looked(clock, 1, 1)
    assert (clock.now_s(1.0), clock.sure) == (EPOCH + 1, False)
    looked(clock, 2, 12)
    assert (clock.now_s(12.0), clock.sure) == (EPOCH + 12, True)


def test_looks_that_go_on_to_agree_are_believed() -> None:
    """A machine slept, and its monotonic clock with it."""
    clock = looked(WindowClock(), 0, 20)
    looked(clock, 21, 21 + int(AGREE_SECONDS), ahead_s=EPOCH + DAY)
    assert clock.now_s(40.0) == EPOCH + DAY + 40


def test_a_clock_that_is_slewed_is_followed() -> None:
    clock = WindowClock()
    for second in range(100):
        clock.look(EPOCH + second * 1.5, float(second))
    assert (clock.now_s(99.0), clock.sure) == (EPOCH + 99 * 1.5, True)
