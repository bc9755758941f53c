"""The transition table: its shape, its words, and what RQ shows."""

from __future__ import annotations

import pytest
from rq.job import JobStatus

from mlx_serving.common.states import RQ_STATUS, TERMINAL, TRANSITIONS, JobState, can_move
from tests.support.paths import ROOT

DOCUMENT = ROOT / "docs" / "reference" / "state_machine.md"


def test_the_allowed_moves_are_these() -> None:
    moves = {(old.value, new.value) for old in JobState for new in JobState if can_move(old, new)}
    assert moves == {
        ("queued", "running"),
        ("queued", "cancelled"),
        ("queued", "expired"),
        ("queued", "failed"),
        ("queued", "dead"),
        ("running", "queued"),
        ("running", "finished"),
        ("running", "failed"),
        ("running", "cancelled"),
        ("running", "expired"),
        ("running", "dead"),
    }


def test_terminal_states_are_left_by_no_move() -> None:
    assert {state.value for state in TERMINAL} == {
        "finished",
        "failed",
        "cancelled",
        "expired",
        "dead",
    }
    assert not any(can_move(state, new) for state in TERMINAL for new in JobState)


def test_every_state_has_a_line_in_the_tables() -> None:
    assert set(TRANSITIONS) == set(JobState) == set(RQ_STATUS)


@pytest.mark.parametrize("state", JobState)
def test_rq_knows_every_status_that_we_show(state: JobState) -> None:
    assert RQ_STATUS[state] in {status.value for status in JobStatus}


def test_the_document_lists_exactly_the_allowed_moves() -> None:
    rows = [line.split("|") for line in DOCUMENT.read_text().splitlines() if " → " in line]
    documented = {
        tuple(word.strip(" `") for word in cells[1].split("→")) for cells in rows if len(cells) > 2
    }
    assert documented == {
        (old.value, new.value) for old, moves in TRANSITIONS.items() for new in moves
    }
