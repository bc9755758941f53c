"""Which models may be in memory together: budget, pins, and who leaves first."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mlx_serving.worker.models.model_budget import ModelBudget

SIZES = {"a": 4, "b": 4, "c": 2}


def test_without_a_bound_all_are_loaded_and_none_leaves() -> None:
    budget = ModelBudget(SIZES)
    assert budget.first() == ("a", "b", "c")
    assert budget.victims("c", ["a", "b"]) == ()
    assert budget.most_at_once() == 3


def test_the_first_are_the_pinned_then_what_fits_in_order() -> None:
    assert ModelBudget(SIZES, 6).first() == ("a", "c")
    assert ModelBudget(SIZES, 6, frozenset({"b"})).first() == ("b", "c")
    assert ModelBudget(SIZES, 4, frozenset({"c"})).first() == ("c",)


def test_the_least_recently_used_leaves_and_no_more_than_needed() -> None:
    budget = ModelBudget(SIZES, 6)
    assert budget.victims("b", ["c", "a"]) == ("c", "a")
    assert budget.victims("b", ["a", "c"]) == ("a",)
    assert budget.victims("c", ["a"]) == ()


def test_a_pinned_model_stays() -> None:
    budget = ModelBudget(SIZES, 6, frozenset({"a"}))
    assert budget.victims("c", ["a"]) == ()
    assert budget.victims("b", ["a", "c"]) is None
    assert not budget.ever_fits("b")


def test_a_model_larger_than_the_budget_never_fits() -> None:
    budget = ModelBudget(SIZES, 3)
    assert budget.first() == ("c",)
    assert budget.victims("a", []) is None
    assert budget.most_at_once() == 1


def test_how_many_fit_at_once() -> None:
    assert ModelBudget(SIZES, 6).most_at_once() == 2
    assert ModelBudget(SIZES, 4).most_at_once() == 1
    assert ModelBudget(SIZES, 1).most_at_once() == 1


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 30), st.data()
)  # fmt: skip
def test_whatever_is_asked_for_the_budget_holds(
    sizes: list[int], limit: int, data: st.DataObject
) -> None:
    named = {str(i): size for i, size in enumerate(sizes)}
    pinned = data.draw(st.sets(st.sampled_from(sorted(named))))
    budget = ModelBudget(named, limit, frozenset(p for p in pinned if named[p] == min(sizes)))
    if not budget.fits(budget.pinned):
        return
    loaded = list(budget.first())
    for model in data.draw(st.lists(st.sampled_from(sorted(named)), max_size=12)):
        if model in loaded:
            loaded.remove(model)
            loaded.append(model)
            continue
        leave = budget.victims(model, loaded)
        if leave is None:
            assert not budget.ever_fits(model)
            continue
        assert not budget.pinned & set(leave)
        loaded = [m for m in loaded if m not in leave] + [model]
        assert budget.fits(loaded)
        assert len(loaded) <= budget.most_at_once()
