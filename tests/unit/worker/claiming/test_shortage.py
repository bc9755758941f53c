"""What is not claimed while there is no room for a job that was handed back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlx_serving.worker.claiming.placement import ModelQueues
from mlx_serving.worker.claiming.shortage import CLOSED_SECONDS, PASSED_SECONDS, Shortage
from mlx_serving.worker.engine.interface import Request, SamplingParams

if TYPE_CHECKING:
    from mlx_serving.common.queues import Lane

ALL = ModelQueues("a", ("a:interactive", "a:default", "a:bulk"))
OTHER = ModelQueues("b", ("b:default",))


def job(name: str, lane: Lane = "default", model: str = "a") -> Request:
    return Request(name, (1,), SamplingParams(), 4, lane=lane, model=model)


def test_its_lane_and_lower_ones_of_its_model_are_closed() -> None:
    shortage = Shortage()
    assert shortage.open_part([ALL, OTHER]) == [ALL, OTHER]
    shortage.note(job("x"))
    assert shortage.open_part([ALL, OTHER]) == [ModelQueues("a", ("a:interactive",)), OTHER]
    assert shortage.closed == ["a:default", "a:bulk"]
    shortage.note(job("y", "interactive"))
    assert shortage.open_part([ALL, OTHER]) == [OTHER]


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def full(*_: Request) -> bool:
    return False


def test_they_open_when_there_is_room_for_the_last_that_was_handed_back() -> None:
    shortage = Shortage()
    shortage.note(job("earlier"))
    shortage.note(job("x"))
    shortage.note(job("y", "interactive"))
    seen: list[str] = []

    def look(request: Request) -> bool:
        seen.append(request.id)
        return False

    assert not shortage.settle(look)
    assert seen == ["x", "y"]
    assert shortage.settle(lambda request: request.id == "y")
    assert shortage.closed == ["a:default", "a:bulk"]
    assert shortage.settle(lambda *_: True)
    assert not shortage
    assert not shortage.settle(lambda *_: True)


def test_nothing_stays_closed_for_ever_and_the_job_gets_its_turn_again() -> None:
    """It may have been cancelled, or run elsewhere, or higher lanes may leave it no room."""
    clock = Clock()
    shortage = Shortage(clock)
    shortage.note(job("x"))
    clock.now += CLOSED_SECONDS - 0.1
    assert not shortage.settle(full)
    assert (shortage.closed, shortage.passes("a")) == (["a:default", "a:bulk"], False)
    clock.now += 0.2
    assert not shortage.settle(full)
    assert (shortage.closed, shortage.passes("a"), shortage.passes("b")) == ([], True, False)
    clock.now += PASSED_SECONDS
    assert not shortage.settle(full)
    assert not shortage


def test_a_job_that_is_noted_while_room_is_sought_stays_noted() -> None:
    shortage = Shortage()
    shortage.note(job("x"))

    def noting(*_: Request) -> bool:
        shortage.note(job("z"))
        return True

    shortage.settle(noting)
    assert shortage.closed == ["a:default", "a:bulk"]
