"""Several engines as one: which of them a step is the first of."""

from __future__ import annotations

from mlx_serving.worker.engine.engine_set import EngineSet
from mlx_serving.worker.engine.sequence import Request, SamplingParams
from mlx_serving.worker.engine.simulated import SimulatedEngine, SimulatedOptions

FREE = SimulatedOptions(0.0, 0.0)


def request(model: str) -> Request:
    return Request(f"of {model}", (1,), SamplingParams(), 4, model=model)


def is_first(engines: EngineSet) -> bool:
    return engines.first_use


def test_a_models_first_step_is_first_until_it_has_ended() -> None:
    engines, seen = EngineSet(), []
    engines.put("a", SimulatedEngine(FREE))
    assert is_first(engines)
    engines.on_launch = lambda: seen.append(("launch", engines.first_use))
    engines.on_stepped = lambda: seen.append(("stepped", engines.first_use))
    engines.add(request("a"))
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
    assert is_first(engines)  # the next one may be b's
    engines.add(request("b"))
    engines.step()
    assert not is_first(engines)
    engines.put("b", SimulatedEngine(FREE))
    assert is_first(engines)
    engines.drop("b")
    assert not is_first(engines)
