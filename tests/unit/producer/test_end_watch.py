"""What `result` waits with: a job's state, asked for seldom while its end would be published."""

from __future__ import annotations

import pytest

from mlx_serving.producer.end_watch import EndWatch
from mlx_serving.producer.patience import LONGEST_SILENCE_S, POLL_S, SILENCE_S
from mlx_serving.producer.snapshot_reader import COMMON_S, common_wait_s
from tests.unit.producer.test_assembler import end, tokens


def watch() -> EndWatch:
    """One that has subscribed and read that its job goes on."""
    watch = EndWatch()
    watch.subscribed()
    watch.replay([], committed=0, over=False)
    assert not watch.needs_replay
    return watch


def test_it_asks_first_and_once_it_has_subscribed() -> None:
    watch = EndWatch()
    assert watch.needs_replay
    watch.replay([], committed=0, over=False)
    assert (watch.needs_replay, watch.ended, watch.wants_live) == (False, False, True)
    watch.subscribed()
    assert watch.needs_replay


def test_tokens_are_no_reason_to_ask() -> None:
    one = watch()
    assert one.receive(tokens(1)) == []
    assert not one.needs_replay


@pytest.mark.parametrize("payload", [end(7), b"no event"])
def test_an_end_is_believed_only_by_the_state(payload: bytes) -> None:
    one = watch()
    one.receive(payload)
    assert (one.needs_replay, one.ended) == (True, False)
    one.replay([], committed=7, over=True)
    assert (one.ended, one.wants_live) == (True, False)


def test_it_asks_ever_less_often_and_often_again_after_a_loss() -> None:
    one = watch()
    waits = []
    for _ in range(6):
        waits.append(one.patience_s)
        one.silent()
        one.replay([], committed=0, over=False)
    assert waits == [1, 2, 4, 8, LONGEST_SILENCE_S, LONGEST_SILENCE_S]
    one.disconnected()
    assert (one.needs_replay, one.patience_s) == (True, POLL_S)
    for _ in range(6):
        one.silent()
    assert one.patience_s == SILENCE_S


@pytest.mark.parametrize("wait_s", [1.2, 7.3, 15.0])
def test_long_waits_end_together(wait_s: float) -> None:
    began = (100.0, 100.05, 100.1)
    waits = [common_wait_s(wait_s, now_s) for now_s in began]
    ends = {round(now_s + wait, 6) for now_s, wait in zip(began, waits, strict=True)}
    assert len(ends) == 1
    assert all(wait_s - COMMON_S <= wait <= wait_s for wait in waits)


def test_short_waits_stay_as_they_are() -> None:
    assert common_wait_s(0.25, 100.9) == 0.25
