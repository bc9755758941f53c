"""How a death is read, and whom it speaks against."""

from __future__ import annotations

import signal

import pytest

from mlx_serving.common.attempts import Attempt
from mlx_serving.common.protocol.calls import Blame
from mlx_serving.worker.process.crash import Cause, classify, judge, loaded_at_death
from mlx_serving.worker.process.inflight_file import InflightRow, RowState


@pytest.mark.parametrize(
    ("exit_code", "memory_pressure", "cause"),
    [
        (0, False, Cause.DRAINED),
        (0, True, Cause.DRAINED),
        (78, False, Cause.CONFIGURATION),
        (69, False, Cause.STALLED),
        (69, True, Cause.STALLED),
        (70, False, Cause.CRASHED),
        (1, False, Cause.CRASHED),
        (255, False, Cause.CRASHED),
        (-signal.SIGABRT, False, Cause.CRASHED),
        (-signal.SIGSEGV, False, Cause.CRASHED),
        (-signal.SIGBUS, False, Cause.CRASHED),
        (-signal.SIGILL, False, Cause.CRASHED),
        (-signal.SIGFPE, False, Cause.CRASHED),
        (-signal.SIGTRAP, True, Cause.CRASHED),
        (-signal.SIGKILL, False, Cause.KILLED),
        (-signal.SIGKILL, True, Cause.OUT_OF_MEMORY),
        (-signal.SIGTERM, True, Cause.KILLED),
        (-signal.SIGHUP, False, Cause.KILLED),
        (-signal.SIGINT, False, Cause.KILLED),
    ],
)
def test_what_an_exit_code_says(exit_code: int, memory_pressure: bool, cause: Cause) -> None:  # noqa: FBT001
    assert classify(exit_code, memory_pressure=memory_pressure) is cause


@pytest.mark.parametrize("exit_code", [-signal.SIGABRT, -signal.SIGKILL])
def test_a_child_that_its_parent_ended_for_its_silence_stalled(exit_code: int) -> None:
    assert classify(exit_code, memory_pressure=True, silenced=True) is Cause.STALLED


def test_a_model_over_whose_load_a_child_stalled_is_left_alone() -> None:
    left_alone = {cause for cause in Cause if cause.faults_load}
    assert left_alone == {Cause.CRASHED, Cause.OUT_OF_MEMORY, Cause.STALLED}


def test_only_deaths_of_the_engines_own_doing_charge() -> None:
    charging = {cause for cause in Cause if cause.charges}
    assert charging == {Cause.CRASHED, Cause.OUT_OF_MEMORY}


def rows(states: str) -> list[InflightRow]:
    """One row a letter: Held, Entering, Running, Proven, Loading; the ids are their places."""
    letters = {state.name[0]: state for state in RowState}
    return [
        InflightRow(Attempt(str(n), 1, "0f"), letters[letter], n) for n, letter in enumerate(states)
    ]


def companies(states: str) -> list[int]:
    blamed = {row.attempt.job_id: row.max_unproven for row in judge(rows(states), Cause.CRASHED)}
    return [blamed[str(n)] for n in range(len(states))]


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ("", []),
        ("HH", [0, 0]),
        ("R", [1]),
        ("P", [1]),
        ("RR", [1, 1]),
        ("RRR", [2, 2, 2]),
        ("PPPP", [2, 2, 2, 2]),
        ("PPR", [0, 0, 1]),
        ("ERRR", [1, 2, 2, 2]),
        ("EEEERR", [2, 2, 2, 2, 3, 3]),
        ("HEPP", [0, 1, 0, 0]),
        ("R" * 64, [32] * 64),
    ],
)
def test_company_shrinks_to_half_of_the_suspects(states: str, expected: list[int]) -> None:
    assert companies(states) == expected


@pytest.mark.parametrize("cause", [c for c in Cause if not c.charges])
def test_a_death_from_outside_charges_nobody(cause: Cause) -> None:
    assert judge(rows("HERP"), cause) == [Blame(row.attempt) for row in rows("HERP")]


@pytest.mark.parametrize(
    ("states", "alone"),
    [("R", True), ("E", True), ("HRH", True), ("P", True), ("RP", False), ("ER", False)],
)
def test_alone_is_who_was_the_only_one_in_the_engine(states: str, alone: bool) -> None:  # noqa: FBT001
    blamed = judge(rows(states), Cause.CRASHED)
    assert any(row.alone and row.max_unproven for row in blamed) is alone


def test_the_closest_suspects_run_first_the_untouched_last() -> None:
    order = [row.attempt.job_id for row in judge(rows("HRRERRP"), Cause.CRASHED)]
    assert order == ["3", "1", "2", "4", "5", "0", "6"]


@pytest.mark.parametrize("size", range(1, 65))
def test_any_batch_comes_down_to_one_row_in_seven_crashes(size: int) -> None:
    crashes = 0
    while size > 1:
        size = companies("R" * size)[0]
        crashes += 1
    assert crashes <= 6
    assert companies("R") == [1]


def test_a_death_while_a_model_was_loaded_charges_nobody() -> None:
    given = [*rows("HERP"), InflightRow(Attempt("org/big", 0, ""), RowState.LOADING, 9)]
    assert loaded_at_death(given) == ["org/big"]
    assert loaded_at_death(rows("HERP")) == []
    for cause in Cause:
        blamed = judge(given, cause)
        assert [(b.attempt.job_id, b.max_unproven, b.alone) for b in blamed] == [
            (str(n), 0, False) for n in range(4)
        ]
