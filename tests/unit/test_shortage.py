"""What is not claimed while there is no room for a job that was handed back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlx_serving.worker.claims.demand import Group
from mlx_serving.worker.claims.shortage import Shortage
from mlx_serving.worker.engine.sequence import Request, SamplingParams

if TYPE_CHECKING:
    from mlx_serving.common.jobs import Lane

ALL = Group("a", ("a:interactive", "a:default", "a:bulk"))
OTHER = Group("b", ("b:default",))


def job(name: str, lane: Lane = "default", model: str = "a") -> list[Request]:
    return [Request(name, (1,), SamplingParams(), 4, lane=lane, model=model)]


def test_its_lane_and_lower_ones_of_its_model_are_closed() -> None:
    shortage = Shortage()
    assert shortage.open_part([ALL, OTHER]) == [ALL, OTHER]
    shortage.note(job("x"))
    assert shortage.open_part([ALL, OTHER]) == [Group("a", ("a:interactive",)), OTHER]
    assert shortage.closed == ["a:default", "a:bulk"]
    shortage.note(job("y", "interactive"))
    assert shortage.open_part([ALL, OTHER]) == [OTHER]


def test_they_open_when_there_is_room_for_the_first_of_them() -> None:
    shortage = Shortage()
    shortage.note(job("x"))
    shortage.note(job("later"))
    shortage.note(job("y", "interactive"))
    seen: list[str] = []

    def full(*choices: Request) -> bool:
        seen.append(choices[0].id)
        return False

    assert not shortage.settle(full)
    assert seen == ["x", "y"]
    assert shortage.settle(lambda *choices: choices[0].id == "y")
    assert shortage.closed == ["a:default", "a:bulk"]
    assert shortage.settle(lambda *_: True)
    assert not shortage
    assert not shortage.settle(lambda *_: True)
