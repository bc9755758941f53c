"""A worker's models come up, leave and fail, with loads of the test's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from mlx_serving.worker.engine.engine_set import EngineSet
from mlx_serving.worker.engine.scheduling.limits import BatchSize
from mlx_serving.worker.engine.simulated import (
    SimulatedEngine,
    SimulatedOptions,
    SimulatedPromptEncoder,
    plan,
    spell,
)
from mlx_serving.worker.models.loaded_models import (
    LoadedModels,
    ModelTooLargeError,
    ModelUnusableError,
)
from mlx_serving.worker.models.loading import LoadedModel, finish
from mlx_serving.worker.models.model_budget import ModelBudget

if TYPE_CHECKING:
    from collections.abc import Generator


class Shelf:
    """Models that take a byte each; some are `missing`, some `broken`: found out while loading."""

    def __init__(self, *models: str, budget: int | None = None, **pins: Any) -> None:
        self.missing: set[str] = set()
        self.broken: set[str] = set()
        self.loads: list[str] = []
        self.closed: list[str] = []
        self.changed: list[str] = []
        self.sizes = dict.fromkeys(models, 1)
        self.loaded_models = LoadedModels(
            models, EngineSet(), self.load, self.sizes.__getitem__, self.changed.append
        )
        self.budget = ModelBudget(self.sizes, budget, frozenset(pins.get("pinned", ())))

    def load(self, model: str) -> Generator[None, None, LoadedModel]:
        self.loads.append(model)
        if model in self.missing:
            raise FileNotFoundError(f"no {model} here")
        yield
        if model in self.broken:
            raise ValueError(f"{model} is broken")
        engine = SimulatedEngine(SimulatedOptions.zero_cost(BatchSize(8)))
        encode = SimulatedPromptEncoder().encode
        return LoadedModel(engine, encode, plan, spell, lambda: self.closed.append(model))

    def first(self) -> LoadedModels:
        self.loaded_models.load_first(self.budget)
        return self.loaded_models

    def bring_up(self, model: str) -> None:
        victims = self.loaded_models.victims(model)
        assert victims is not None
        finish(self.loaded_models.bring_up(model, victims))  # type: ignore[arg-type]


def test_all_that_fit_are_loaded_before_the_first_claim() -> None:
    shelf = Shelf("a", "b", "c", budget=2)
    assert shelf.first().resident() == ("a", "b")
    assert shelf.loads == shelf.changed == ["a", "b"]


def test_the_least_recently_used_leaves_and_is_closed() -> None:
    shelf = Shelf("a", "b", "c", budget=2)
    loaded_models = shelf.first()
    loaded_models.touch("b")
    loaded_models.touch("a")
    shelf.bring_up("c")
    assert loaded_models.resident() == ("a", "c")
    assert shelf.closed == ["b"]
    assert [loaded_models.engines.has(m) for m in "abc"] == [True, False, True]


def test_a_missing_model_leaves_its_place_to_the_next() -> None:
    shelf = Shelf("a", "b", budget=1)
    shelf.missing = {"a"}
    loaded_models = shelf.first()
    assert loaded_models.resident() == ("b",)
    assert loaded_models.status().failures == {"a": "FileNotFoundError: no a here"}
    assert not loaded_models.loadable("a")
    assert loaded_models.loadable("b")


def test_where_nothing_loads_the_first_reason_is_raised() -> None:
    shelf = Shelf("a", "b")
    shelf.missing = {"a", "b"}
    with pytest.raises(FileNotFoundError, match="no a here"):
        shelf.first()


def test_a_single_model_larger_than_the_budget_says_so() -> None:
    shelf = Shelf("a", budget=1)
    shelf.sizes["a"] = 2
    with pytest.raises(
        ModelTooLargeError, match=r"2 bytes do not fit into worker\.model_budget_bytes 1"
    ):
        shelf.first()


def test_a_model_that_is_missing_makes_nobody_leave() -> None:
    shelf = Shelf("a", "b", "c", budget=2)
    loaded_models = shelf.first()
    shelf.missing = {"c"}
    shelf.bring_up("c")
    assert loaded_models.resident() == ("a", "b")
    assert (shelf.closed, loaded_models.loading) == ([], "")
    assert "c" in loaded_models.status().failures
    shelf.missing = set()
    loaded_models.touch("b")
    shelf.bring_up("c")
    assert loaded_models.resident() == ("b", "c")
    assert loaded_models.status().failures == {}


def test_a_model_that_breaks_while_it_is_loaded_is_tried_ever_more_rarely(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr("mlx_serving.worker.models.loaded_models.time.monotonic", lambda: now)
    shelf = Shelf("a", "b", budget=1)
    loaded_models = shelf.first()
    shelf.broken = {"b"}
    pauses = []
    for _ in range(8):
        shelf.bring_up("b")
        failed_at = now
        while not loaded_models.loadable("b"):
            now += 10
        pauses.append(now - failed_at)
    assert pauses == [60, 120, 240, 480, 960, 1920, 3600, 3600]
    assert loaded_models.resident() == ()


def test_a_model_that_a_process_died_over_is_left_alone_while_there_are_others() -> None:
    shelf = Shelf("a", "b")
    shelf.loaded_models.avoid(["a"])
    assert shelf.first().resident() == ("b",)
    assert not shelf.loaded_models.loadable("a")
    alone = Shelf("a")
    alone.loaded_models.avoid(["a"])
    assert alone.first().resident() == ("a",)


def test_where_all_are_to_be_left_alone_it_says_so() -> None:
    shelf = Shelf("a", "b")
    shelf.loaded_models.avoid(["a", "b"])
    with pytest.raises(ModelUnusableError, match=r"a: the worker's process died .*; b: "):
        shelf.first()


def test_what_is_leaving_is_not_claimed_for() -> None:
    loaded_models = Shelf("a", "b").first()
    loaded_models.leaving = frozenset({"a"})
    assert loaded_models.resident() == ("b",)
    assert loaded_models.get("a") is not None


def test_capacities_are_remembered_after_a_model_left() -> None:
    shelf = Shelf("a", "b", budget=1)
    loaded_models = shelf.first()
    shelf.bring_up("b")
    assert set(loaded_models.status().capacities) == {"a", "b"}
