"""The pause between restarts. Processes are in the integration tests."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from mlx_serving.common.settings import load_settings
from mlx_serving.worker.process.supervisor import BackOff, default_name
from mlx_serving.worker.status import monitor
from mlx_serving.worker.status.status import Snapshot


def test_it_doubles_from_half_a_second_to_thirty() -> None:
    back_off = BackOff()
    pauses = [back_off.after(1.0, held_jobs=False) for _ in range(9)]
    assert pauses == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]


def test_a_child_that_lived_a_minute_starts_it_again() -> None:
    back_off = BackOff()
    pauses = [back_off.after(lived, held_jobs=False) for lived in (1, 1, 1, 59.9, 60.0, 1)]
    assert pauses == [0.5, 1, 2, 4, 0.5, 1]


def test_a_death_with_jobs_in_hand_does_not_count() -> None:
    """Forty crashes in a row may be one search for eight culprits."""
    back_off = BackOff()
    assert {back_off.after(1.0, held_jobs=True) for _ in range(40)} == {0.5}
    assert back_off.after(1.0, held_jobs=False) == 1.0


def test_a_very_long_series_overflows_nothing() -> None:
    back_off = BackOff(deaths=10_000)
    assert back_off.after(0.0, held_jobs=False) == 30.0


def test_names_of_workers_differ() -> None:
    assert len({default_name() for _ in range(50)}) == 50


def test_a_child_that_died_while_it_was_silent_is_not_killed_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its id may be another process's by then."""
    watched = monitor.Monitor(load_settings(), "tally", "w")
    silent = SimpleNamespace(child="up", silent_for=99.0, snapshot=Snapshot())
    monkeypatch.setattr(watched.tracker, "status", lambda: silent)
    monkeypatch.setattr(monitor, "_abort", lambda _: pytest.fail("it was dead already"))
    child = SimpleNamespace(exitcode=None, is_alive=lambda: True)
    child.join = lambda _: setattr(child, "exitcode", -6)
    assert not watched.watch(child)  # type: ignore[arg-type]
