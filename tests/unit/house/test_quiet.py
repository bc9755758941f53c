"""Turns of tests in several processes; each file handle stands for one of them."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from tests.support.quiet import turn

if TYPE_CHECKING:
    from pathlib import Path


def test_turns_side_by_side(tmp_path: Path) -> None:
    with turn(tmp_path, alone=False), turn(tmp_path, alone=False):
        pass


@pytest.mark.parametrize(("first", "second"), [(True, False), (False, True), (True, True)])
def test_who_is_alone_waits_for_all_others_and_they_for_him(
    tmp_path: Path,
    first: bool,  # noqa: FBT001 -- parametrized
    second: bool,  # noqa: FBT001
) -> None:
    entered = threading.Event()

    def other() -> None:
        with turn(tmp_path, alone=second):
            entered.set()

    thread = threading.Thread(target=other)
    with turn(tmp_path, alone=first):
        thread.start()
        assert not entered.wait(0.05)
    assert entered.wait(5)
    thread.join()


def test_nobody_overtakes_who_waits_to_be_alone(tmp_path: Path) -> None:
    order: list[str] = []

    def enter(name: str, *, alone: bool) -> None:
        with turn(tmp_path, alone=alone):
            order.append(name)

    quiet = threading.Thread(target=enter, args=["quiet"], kwargs={"alone": True})
    late = threading.Thread(target=enter, args=["late"], kwargs={"alone": False})
    with turn(tmp_path, alone=False):
        quiet.start()
        quiet.join(0.05)  # it is at the gate
        late.start()
        late.join(0.05)
    quiet.join()
    late.join()
    assert order == ["quiet", "late"]
