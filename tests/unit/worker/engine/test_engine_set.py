"""Several engines as one: which of them a step is the first of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlx_serving.worker.engine.engine_set import EngineSet
from mlx_serving.worker.engine.interface import Request, RequestChoice, SamplingParams
from mlx_serving.worker.engine.simulated import SimulatedEngine, SimulatedOptions

if TYPE_CHECKING:
    from mlx_serving.worker.engine.row import SampledToken

FREE = SimulatedOptions(0.0, 0.0)


def request(model: str, tokens: int = 1) -> Request:
    return Request(f"of {model}", (1,) * tokens, SamplingParams(), 4, model=model)


def is_first(engines: EngineSet) -> bool:
    return engines.first_use


def test_a_models_first_step_is_first_until_it_has_ended() -> None:
    engines, seen = EngineSet(), []
    engines.put("a", SimulatedEngine(FREE))
    assert not is_first(engines)  # nothing of it is about to run
    engines.on_launch = lambda: seen.append(("launch", engines.first_use))
    engines.on_stepped = lambda: seen.append(("stepped", engines.first_use))
    engines.add(request("a"))
    assert is_first(engines)
    engines.step()
    assert seen[-1] == ("stepped", True)  # the step counts as progress before it counts as timed
    assert not is_first(engines)
    seen.clear()
    engines.step()
    assert {first for _, first in seen} == {False}


def test_a_further_model_has_a_first_step_of_its_own() -> None:
    engines = EngineSet()
    engines.put("a", SimulatedEngine(FREE))
    engines.add(request("a"))
    engines.step()
    engines.put("b", SimulatedEngine(FREE))
    seen: list[bool] = []
    engines.on_launch = lambda: seen.append(engines.first_use)
    engines.step()
    assert not any(seen)  # what runs is a's, and that was timed
    assert not is_first(engines)
    engines.add(request("b"))
    assert is_first(engines)  # the next one may be b's
    engines.step()
    assert not is_first(engines)
    engines.put("b", SimulatedEngine(FREE))
    engines.add(request("b"))
    assert is_first(engines)
    engines.drop("b")
    assert not is_first(engines)


def test_a_model_that_nobody_used_makes_no_other_one_first() -> None:
    """It may be in memory for days."""
    engines = EngineSet()
    for model in "ab":
        engines.put(model, SimulatedEngine(FREE))
    engines.add(request("a"))
    engines.step()
    assert engines.has_work
    assert not is_first(engines)


def test_a_step_that_only_launched_is_not_timed() -> None:
    """As a first step that computes prompts with its rows: the next one waits for it."""
    engines, engine = EngineSet(), SimulatedEngine(FREE)
    decode, steps = engine._runner.decode, []

    def launched() -> list[SampledToken]:
        steps.append(decode())
        return steps[-1] if len(steps) > 1 else []

    engine._runner.decode = launched  # type: ignore[method-assign]
    engines.put("a", engine)
    engines.add(request("a"))
    assert not engines.step()
    assert engine.running
    assert is_first(engines)
    assert engines.step()
    assert not is_first(engines)


def test_a_step_that_waited_for_a_part_of_a_prompt_is_timed() -> None:
    engines = EngineSet()
    engines.put("a", SimulatedEngine(FREE))
    engines.add(request("a", 200))
    assert not engines.step()
    assert engines.waiting
    assert not is_first(engines)


def test_what_ends_without_the_device_times_nothing() -> None:
    engines = EngineSet()
    engines.put("a", SimulatedEngine(FREE))
    choices = (RequestChoice(0, committed=(1, 2, 3, 4)),)
    engines.add(Request("ended", (1,), SamplingParams(), 4, choices=choices, model="a"))
    assert [output.finish_reason for output in engines.step()] == ["length"]
    engines.add(request("a"))
    assert is_first(engines)
