"""The engine thread with an engine of strings: order, room, aborts, pauses, failures."""

from __future__ import annotations

import threading
import time
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest

from mlx_serving.worker.engine.interface import (
    Output,
    Request,
    RequestChoice,
    RequestRefusedError,
    SamplingParams,
)
from mlx_serving.worker.engine_thread import FIRST_STEP_SECONDS, EngineThread, LoopTimes
from tests.support.helpers import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


def request(name: str, choices: int = 1) -> Request:
    return Request(
        name, (1,), SamplingParams(), 4, choices=tuple(map(RequestChoice, range(choices)))
    )


class FakeEngine:
    """Holds `room` rows; each step gives each row a token. Errors are scripted by name.

    `rows` has a job's id once for each of its choices, `added` once.
    """

    def __init__(self, room: int = 2) -> None:
        self.room = room
        self.rows: list[str] = []
        self.added: list[str] = []
        self.aborted: list[str] = []
        self.steps = 0
        self.first_use = False
        self.error: BaseException | None = None
        self.on_launch = self.look = lambda: None  # before, and before and after each launch
        self.gate = threading.Event()
        self.gate.set()

    def can_add(self, request: Request) -> bool:
        return len(self.rows) + len(request.choices) <= self.room

    def add(self, request: Request) -> None:
        name = request.id
        if name == "crowded" and self.steps < 2:
            raise RequestRefusedError("no_room", "no room after all")
        if name == "refused":
            raise RequestRefusedError("too_large", "too large")
        if name == "broken":
            raise ZeroDivisionError
        self.rows += [name for _ in request.choices]
        self.added.append(name)

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        self.rows = [row for row in self.rows if row != request_id]

    def step(self) -> list[Output]:
        self.gate.wait(10)
        if self.error:
            raise self.error
        self.look()
        self.on_launch()
        self.look()
        self.steps += 1
        return [Output(row, 0, [self.steps]) for row in self.rows]

    @property
    def has_work(self) -> bool:
        return bool(self.rows)

    @property
    def request_ids(self) -> set[str]:
        return set(self.rows)


USUAL = LoopTimes()


class Bench:
    def __init__(self, times: LoopTimes = USUAL) -> None:
        self.engine = FakeEngine()
        self.outputs: list[Output] = []
        self.refused: list[tuple[str, str, str]] = []
        self.rooms = 0
        self.paused = False
        self.runner = EngineThread(
            lambda: self.engine,  # type: ignore[arg-type, return-value]
            on_outputs=self._take,
            on_refused=lambda *what: self.refused.append(what),
            on_room=self._room,
            paused=lambda: self.paused,
            times=times,
        )

    def _take(self, outputs: Sequence[Output]) -> None:
        self.outputs += outputs

    def _room(self) -> None:
        self.rooms += 1


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    bench.runner.start()
    assert bench.runner.ready.wait(5)
    yield bench
    bench.engine.gate.set()
    bench.runner.halt()
    assert bench.runner.halted.wait(5)
    bench.runner.join(5)


def test_requests_enter_in_order_as_there_is_room(bench: Bench) -> None:
    bench.runner.submit([request(name) for name in "abc"])
    wait_until(lambda: bench.engine.added == ["a", "b"])
    wait_until(lambda: [r.id for r in bench.runner.unadmitted() or ()] == ["c"])
    bench.runner.abort("a")
    wait_until(lambda: bench.engine.added == ["a", "b", "c"])
    assert bench.runner.unadmitted() == []
    assert bench.rooms >= 2


def test_what_waits_can_be_taken_back_once(bench: Bench) -> None:
    bench.runner.submit([request(name) for name in "abcd"])
    wait_until(lambda: len(bench.runner.unadmitted() or ()) == 2)
    assert bench.runner.withdraw({"a", "c"}) == {"c"}
    assert bench.runner.withdraw({"c"}) == set()
    assert [r.id for r in bench.runner.unadmitted() or ()] == ["d"]


def test_it_has_what_was_submitted_until_that_is_over(bench: Bench) -> None:
    assert not bench.runner.has("a")
    bench.runner.submit([request(name) for name in "abcd"])
    assert [bench.runner.has(name) for name in "abcd"] == [True] * 4
    bench.runner.withdraw({"d"})
    bench.runner.abort("a")
    wait_until(lambda: not bench.runner.has("a") and not bench.runner.has("d"))
    wait_until(lambda: bench.engine.rows == ["b", "c"])
    bench.engine.rows.remove("b")  # the engine lost it without a word
    wait_until(lambda: not bench.runner.has("b"))
    assert bench.runner.has("c")


def test_an_abort_reaches_what_waits(bench: Bench) -> None:
    bench.runner.submit([request(name) for name in "abc"])
    wait_until(lambda: len(bench.runner.unadmitted() or ()) == 1)
    bench.runner.abort("c")
    wait_until(lambda: bench.runner.unadmitted() == [])
    bench.runner.abort("a")
    wait_until(lambda: bench.engine.rows == ["b"])
    assert "c" not in bench.engine.added


def test_the_choices_of_a_job_enter_together_or_not_at_all(bench: Bench) -> None:
    bench.engine.room = 3
    bench.runner.submit([request("a"), request("b", 3), request("c")])
    wait_until(lambda: bench.engine.added == ["a"])
    wait_until(lambda: len(bench.runner.unadmitted() or ()) == 2)
    assert bench.engine.rows == ["a"]
    bench.runner.abort("a")
    wait_until(lambda: bench.engine.rows == ["b"] * 3)
    bench.runner.abort("b")
    wait_until(lambda: bench.engine.rows == ["c"])


def test_a_request_that_finds_less_room_than_it_seemed_waits_in_its_place(bench: Bench) -> None:
    bench.runner.submit([request("a")])
    wait_until(lambda: bench.engine.added == ["a"])
    bench.runner.submit([request("crowded"), request("b")])
    wait_until(lambda: "crowded" in bench.engine.added)
    assert bench.engine.added[:2] == ["a", "crowded"]
    assert bench.refused == []


@pytest.mark.parametrize(("name", "code"), [("refused", "too_large"), ("broken", "engine_error")])
def test_a_request_that_cannot_enter_fails_alone(bench: Bench, name: str, code: str) -> None:
    bench.runner.submit([request(name), request("a")])
    wait_until(lambda: bench.engine.added == ["a"])
    assert [(who, what) for who, what, _ in bench.refused] == [(name, code)]
    assert bench.runner.failure is None


def test_a_pause_stops_steps_but_is_progress(bench: Bench) -> None:
    bench.paused = True
    bench.runner.submit([request("a")])
    wait_until(lambda: bench.engine.added == ["a"])
    steps = bench.engine.steps
    wait_until(lambda: bench.runner._turns > 20)
    assert bench.engine.steps == steps
    assert bench.runner.stalled_for < 1
    bench.paused = False
    wait_until(lambda: bench.engine.steps > steps)


def test_a_step_that_does_not_come_back_is_a_stall(bench: Bench) -> None:
    bench.engine.gate.clear()
    bench.runner.submit([request("a")])
    wait_until(lambda: bench.runner.stalled_for > 0.6)
    bench.engine.gate.set()
    wait_until(lambda: bench.runner.stalled_for < 0.1)


def test_a_models_first_step_may_take_long(bench: Bench) -> None:
    bench.engine.first_use = True
    assert bench.runner.stall_seconds == FIRST_STEP_SECONDS
    assert bench.runner.time_left > 58
    bench.engine.first_use = False
    assert bench.runner.stall_seconds == 10
    assert 8 < bench.runner.time_left <= 10


def test_a_stall_time_that_is_longer_than_a_first_steps_stands() -> None:
    bench = Bench(LoopTimes(stall_seconds=100.0))
    bench.runner.engine = bench.engine  # type: ignore[assignment]
    bench.engine.first_use = True
    assert bench.runner.stall_seconds == 100


def test_a_step_that_comes_to_its_launch_goes_on(bench: Bench) -> None:
    ages: list[float] = []

    def slow() -> None:
        time.sleep(0.2)
        ages.append(bench.runner.stalled_for)

    bench.engine.look = slow
    bench.runner.submit([request("a")])
    wait_until(lambda: len(ages) >= 2)
    before, after = ages[:2]
    assert min(before, after) > 0.15  # each is counted from where the step was last
    assert max(before, after) < 0.39


def test_an_idle_engine_is_not_stalled(bench: Bench) -> None:
    turns = bench.runner._turns
    wait_until(lambda: bench.runner._turns > turns + 1)
    assert bench.runner.stalled_for < 0.7


def test_a_failing_step_is_kept_and_ends_the_thread(bench: Bench) -> None:
    bench.engine.error = MemoryError("out of memory")
    bench.runner.submit([request("a")])
    assert bench.runner.halted.wait(5)
    assert isinstance(bench.runner.failure, MemoryError)


def test_a_halt_hands_the_last_outputs_over(bench: Bench) -> None:
    bench.runner.submit([request("a")])
    wait_until(lambda: bench.engine.steps > 2)
    bench.runner.halt()
    assert bench.runner.halted.wait(5)
    assert [o.token_ids for o in bench.outputs] == [[n] for n in range(1, bench.engine.steps + 1)]


def test_a_steps_outputs_go_when_the_next_one_is_launched(bench: Bench) -> None:
    """And not while it is built: then two threads would want the interpreter."""
    handed: list[int] = []
    bench.engine.look = lambda: handed.append(len(bench.outputs))
    bench.runner.submit([request("a")])
    wait_until(lambda: bench.engine.steps > 3)
    assert handed[:8] == [0, 0, 0, 1, 1, 2, 2, 3]


def test_the_last_steps_outputs_wait_for_no_launch(bench: Bench) -> None:
    bench.runner.submit([request("a")])
    wait_until(lambda: bench.engine.steps > 2)
    bench.paused = True
    wait_until(lambda: len(bench.outputs) == bench.engine.steps)


def test_a_load_that_fails_is_ready_with_the_failure() -> None:
    def load() -> FakeEngine:
        raise FileNotFoundError

    runner = EngineThread(
        load,  # type: ignore[arg-type]
        on_outputs=lambda _: None, on_refused=lambda *_: None, on_room=lambda: None,
        paused=lambda: False,
    )  # fmt: skip
    runner.start()
    assert runner.ready.wait(5)
    assert isinstance(runner.failure, FileNotFoundError)
    assert runner.engine is None


def test_slices_of_other_work_alternate_with_steps(bench: Bench) -> None:
    steps: list[int] = []

    def slices() -> Iterator[None]:
        for _ in range(5):
            steps.append(bench.engine.steps)
            yield

    bench.runner.submit([request("a")])
    wait_until(lambda: bench.engine.steps > 2)
    bench.runner.interleave(slices())
    wait_until(lambda: len(steps) == 5)
    assert [after - before for before, after in pairwise(steps)] == [1] * 4


def test_slices_go_on_where_nothing_decodes(bench: Bench) -> None:
    turns: list[int] = []
    bench.runner.interleave(iter_slices(turns, 100))
    wait_until(lambda: len(turns) == 100, timeout=1)


def iter_slices(turns: list[int], count: int) -> Iterator[None]:
    for turn in range(count):
        turns.append(turn)
        yield


def test_a_slice_has_a_longer_deadline_than_a_step() -> None:
    bench = Bench(LoopTimes(slice_seconds=0.5))
    bench.runner.start()
    assert bench.runner.ready.wait(5)
    gate = threading.Event()
    stalls: list[float] = []

    def slices() -> Iterator[None]:
        gate.wait(10)
        yield

    bench.runner.interleave(slices())
    began = time.monotonic()
    wait_until(lambda: bench.runner._in_slice)
    while time.monotonic() < began + 0.4:
        stalls.append(bench.runner.stalled_for)
    assert max(stalls) == 0.0
    wait_until(lambda: bench.runner.stalled_for > 0.1)
    gate.set()
    wait_until(lambda: bench.runner.stalled_for < 0.1)
    bench.runner.halt()
    assert bench.runner.halted.wait(5)
