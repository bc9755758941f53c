"""Which implementation is chosen, and what is said about it."""

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from mlx_serving.worker.engine import acceleration, native
from mlx_serving.worker.engine.text.detokenizer import Detokenizer
from mlx_serving.worker.engine.text.vocabulary import Vocabulary
from tests.support.tokenizers_for_tests import BYTE_LEVEL


def _pretend(monkeypatch: pytest.MonkeyPatch, module: Any, reason: str = "built") -> None:
    monkeypatch.setattr(acceleration, "load_native", lambda: (module, reason))


def _native(detokenizer: type) -> Any:
    return SimpleNamespace(Vocabulary=Vocabulary, Detokenizer=detokenizer)


class _Upper(Detokenizer):
    def push(self, slots: list[int], tokens: list[int]) -> list[tuple[str, bool]]:
        return [(text.upper(), stopped) for text, stopped in super().push(slots, tokens)]


class _Broken(Detokenizer):
    def finish(self, slot: int) -> str:
        msg = f"no slot {slot}"
        raise RuntimeError(msg)


def test_a_native_piece_that_agrees_with_its_twin_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, _native(Detokenizer))
    report = acceleration.reports(prefer_native=True)[0]
    assert str(report) == "detokenizer: native (self-check passed)"


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (_Upper, "byte_level: its text differs from the twin's"),
        (_Broken, "byte_level: RuntimeError: no slot 0"),
    ],
)
def test_a_native_piece_that_differs_is_replaced_by_its_twin(
    monkeypatch: pytest.MonkeyPatch, broken: type, reason: str
) -> None:
    _pretend(monkeypatch, _native(broken))
    detokenizer, report = acceleration.make_detokenizer(BYTE_LEVEL.tokenizer, prefer_native=True)
    assert type(detokenizer) is Detokenizer
    assert report.implementation == "twin"
    assert report.reason == f"the native piece failed its self-check: {reason}"


def test_the_setting_switches_native_off(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, _native(_Broken))
    found = [str(report) for report in acceleration.reports(prefer_native=False)]
    assert found == [
        "detokenizer: twin (switched off by the settings)",
        "sampler: twin (switched off by the settings)",
        "prefix index: twin (switched off by the settings)",
    ]


def test_an_install_without_the_module_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "mlx_serving._native", None)
    report = acceleration.reports(prefer_native=True)[0]
    assert str(report) == "detokenizer: twin (this install was built without the native module)"


def test_a_module_that_does_not_load_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> ModuleType:
        msg = f"{name}: wrong ELF class"
        raise ImportError(msg)

    monkeypatch.setattr(native, "import_module", fail)
    report = acceleration.reports(prefer_native=True)[0]
    assert report.reason.endswith("does not load: mlx_serving._native: wrong ELF class")


def test_the_chosen_detokenizer_decodes() -> None:
    for prefer_native in (True, False):
        detokenizer, _ = acceleration.make_detokenizer(
            BYTE_LEVEL.tokenizer, prefer_native=prefer_native
        )
        slot = detokenizer.open()
        assert detokenizer.push([slot], BYTE_LEVEL.ids("a")) == [("a", False)]
