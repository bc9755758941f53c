"""In which order queues are claimed from, and which model is brought up: by tables."""

from __future__ import annotations

import pytest

from mlx_serving.worker.claiming.placement import ModelQueues, Wanted, claim_order, next_to_load

PATIENCE = 15.0


def test_lanes_come_before_models() -> None:
    waiting = {"a:bulk": 5, "a:default": 1, "b:interactive": 2, "b:default": 3}
    assert claim_order(["a", "b"], waiting) == [
        ModelQueues("b", ("b:interactive",)),
        ModelQueues("a", ("a:default",)),
        ModelQueues("b", ("b:default",)),
        ModelQueues("a", ("a:bulk",)),
    ]


def test_queues_of_one_model_in_a_row_are_one_claim() -> None:
    waiting = {"b:interactive": 1, "b:default": 1, "b:bulk": 1, "a:default": 0}
    queues = ("b:interactive", "b:default", "b:bulk")
    assert claim_order(["a", "b"], waiting) == [ModelQueues("b", queues)]
    assert claim_order(["a"], waiting) == []


def test_whose_turn_it_is_comes_first_in_its_lane() -> None:
    waiting = {"a:default": 9, "b:default": 9}
    assert [g.model for g in claim_order(["b", "a"], waiting)] == ["b", "a"]


@pytest.mark.parametrize(
    ("wanted", "idle", "loaded"),
    [
        # Nobody has it: whoever has nothing to do loads it at once …
        (Wanted("m", 0.0), True, True),
        (Wanted("m", 0.0, victims_served=1.0), True, True),
        # … and nobody while there is work for what is here, or rows of what would leave …
        (Wanted("m", 14.9), False, False),
        (Wanted("m", 14.9, victims_busy=True, victims_served=99.0), True, False),
        # … but not for ever, and not before what leaves has had its time.
        (Wanted("m", 15.0), False, True),
        (Wanted("m", 15.0, victims_busy=True, victims_served=15.0), False, True),
        (Wanted("m", 99.0, victims_busy=True, victims_served=14.9), False, False),
        # Another worker has it: that one serves it, until it is clear that it can't keep up.
        (Wanted("m", 14.9, elsewhere=True), True, False),
        (Wanted("m", 15.0, elsewhere=True), True, True),
        (Wanted("m", 15.0, elsewhere=True, victims_busy=True, victims_served=99.0), True, False),
        (Wanted("m", 99.0, elsewhere=True), False, False),
    ],
)
def test_when_a_model_is_loaded(wanted: Wanted, *, idle: bool, loaded: bool) -> None:
    assert next_to_load([wanted], idle=idle, patience=PATIENCE) == ("m" if loaded else None)


def test_the_one_that_was_waited_for_longest_comes_first() -> None:
    wanted = [Wanted("a", 1.0), Wanted("b", 3.0), Wanted("c", 20.0, elsewhere=True)]
    assert next_to_load(wanted, idle=True, patience=PATIENCE) == "c"
    assert next_to_load(wanted[:2], idle=True, patience=PATIENCE) == "b"
    assert next_to_load(wanted[:2], idle=False, patience=PATIENCE) is None
