"""Which sampler is chosen, and what is said about it."""

import re
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_serving.worker.engine import acceleration, kernels
from mlx_serving.worker.engine.sampling import kernels as sampling_kernels
from mlx_serving.worker.engine.sampling.parameters import Column, Draws, Logprobs, StepInputs
from mlx_serving.worker.engine.sampling.reference import ReferenceDraw
from mlx_serving.worker.engine.sampling.self_check import NEAR_TIE
from tests.support.engine_support import tiny_engine


class _Next(ReferenceDraw):
    """Wrong by one token."""

    def __call__(self, logits: mx.array, inputs: StepInputs) -> Draws:
        draws = super().__call__(logits, inputs)
        return draws._replace(tokens=draws.tokens + (draws.tokens >= 0))


class _CountsNothing(ReferenceDraw):
    def __call__(self, logits: mx.array, inputs: StepInputs) -> Draws:
        return super().__call__(logits, inputs)._replace(state=inputs.state)


class _Flattered(ReferenceDraw):
    def __call__(self, logits: mx.array, inputs: StepInputs) -> Draws:
        draws = super().__call__(logits, inputs)
        assert draws.logprobs
        return draws._replace(logprobs=Logprobs(draws.logprobs.chosen / 2, *draws.logprobs[1:]))


class _DoesNotCompile:
    def __init__(self, *_: Any) -> None:
        message = "Failed to compile kernel"
        raise RuntimeError(message)


def pretend(monkeypatch: pytest.MonkeyPatch, draw: Any) -> None:
    """A GPU on which the kernel is `draw`."""
    monkeypatch.setattr(kernels, "dialect", lambda: "cuda")
    monkeypatch.setattr(sampling_kernels, "KernelDraw", draw)


class _Kernel(ReferenceDraw):
    """A kernel without a fault."""


def test_a_kernel_that_agrees_with_the_reference_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, _Kernel)
    make, report = acceleration.choose_sampler(prefer_native=True)
    assert make is _Kernel
    assert str(report) == "sampler: native (the cuda kernel, self-check passed)"
    assert str(report) in map(str, acceleration.reports(prefer_native=True))


@pytest.mark.parametrize(
    ("draw", "reason"),
    [
        (_Next, "float32, step 0: row 0: token"),
        (_CountsNothing, "float32, step 0: the tokens it counts"),
        (_Flattered, "float32, step 0: row 0: its log probabilities"),
        (_DoesNotCompile, "RuntimeError: Failed to compile kernel"),
    ],
)
def test_a_kernel_that_differs_is_replaced_by_the_reference(
    monkeypatch: pytest.MonkeyPatch, draw: type, reason: str
) -> None:
    pretend(monkeypatch, draw)
    make, report = acceleration.choose_sampler(prefer_native=True)
    assert make is ReferenceDraw
    assert report.implementation == "twin"
    assert report.reason.startswith(f"the cuda kernel failed its self-check: {reason}")


def test_the_setting_switches_the_kernel_off(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, _DoesNotCompile)
    make, report = acceleration.choose_sampler(prefer_native=False)
    assert make is ReferenceDraw
    assert str(report) == "sampler: twin (switched off by the settings)"


def test_an_engine_carries_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, _Next)
    pieces = {report.piece: report.implementation for report in tiny_engine().acceleration}
    assert pieces["sampler"] == "twin"


@pytest.mark.parametrize(("gap", "passes"), [(NEAR_TIE / 2, True), (NEAR_TIE * 20, False)])
def test_another_token_passes_only_in_a_near_tie(
    monkeypatch: pytest.MonkeyPatch, gap: float, *, passes: bool
) -> None:
    """The kernel takes the second best of row 0, whose best the reference scores by `gap` more."""

    class SecondBest(ReferenceDraw):
        def __call__(self, logits: mx.array, inputs: StepInputs) -> Draws:
            draws = super().__call__(logits, inputs)
            order = mx.argsort(self.scores(self.final(logits, inputs), inputs.step)[0])
            first = mx.arange(draws.tokens.size) == 0
            tokens = mx.where(first, order[-2].astype(mx.int32), draws.tokens)
            return draws._replace(tokens=tokens)

    scores = ReferenceDraw.scores

    def tied(self: ReferenceDraw, final: mx.array, step: int) -> mx.array:
        found = scores(self, final, step)
        best = found.max(axis=-1, keepdims=True)
        second = mx.argsort(found, axis=-1)[:, -2:-1]
        return mx.where(mx.arange(found.shape[1]) == second, best - gap, found)

    pretend(monkeypatch, SecondBest)
    monkeypatch.setattr(ReferenceDraw, "scores", tied)
    make, _ = acceleration.choose_sampler(prefer_native=True, logits_dtype=mx.float32)
    assert (make is SecondBest) == passes


@pytest.mark.parametrize("draw", [_Kernel, _Next])
def test_a_cpu_uses_the_native_piece_where_it_agrees(
    monkeypatch: pytest.MonkeyPatch, draw: type
) -> None:
    monkeypatch.setattr(kernels, "dialect", lambda: None)
    monkeypatch.setattr(acceleration, "load_native", lambda: (object(), "built"))
    monkeypatch.setattr(sampling_kernels, "native_sampler", lambda _: draw)
    make, report = acceleration.choose_sampler(prefer_native=True)
    if draw is _Kernel:
        assert make is _Kernel
        assert str(report) == "sampler: native (the native piece, self-check passed)"
    else:
        assert make is ReferenceDraw
        assert report.reason.startswith("the native piece failed its self-check: float32, step 0")


def test_a_cpu_without_the_module_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "dialect", lambda: None)
    monkeypatch.setattr(acceleration, "load_native", lambda: (None, "not built"))
    make, report = acceleration.choose_sampler(prefer_native=True)
    assert make is ReferenceDraw
    assert str(report) == "sampler: twin (not built)"


def test_the_native_piece_names_a_buffer_that_does_not_fit() -> None:
    module = pytest.importorskip("mlx_serving._native")
    logits, state, taken = np.zeros((2, 9), np.float32), np.zeros((2, 8), np.int32), np.zeros(2)
    fits = [np.zeros(64, np.int32) for _ in range(6)]
    table = np.zeros((2, len(Column)), np.int32)
    for changed, message in (
        ({"table": table[:1]}, "table: holds too few elements"),
        ({"table": table.T}, "table: must be contiguous"),
        ({"inputs": taken}, "inputs: elements must have 4 bytes"),
        ({"outputs": fits[:5]}, "outputs: must be 6 buffers"),
        ({"logits": logits[0]}, "logits: must have 2 dimensions"),
    ):
        arguments = {
            "logits": logits, "table": table, "state": state, "inputs": taken.astype(np.int32),
            "lists": fits[0], "mask": None, "outputs": fits,
        } | changed  # fmt: skip
        with pytest.raises(ValueError, match=message):
            module.sample(**arguments)


def test_both_dialects_have_their_source() -> None:
    for dialect, barrier in (("cuda", "__syncthreads"), ("metal", "threadgroup_barrier")):
        header, body = sampling_kernels.kernel_source(dialect)  # type: ignore[arg-type]
        assert barrier in header
        assert "sample_row" in header
        assert "mlxs::sample_row(row, result, group);" in body
        assert "#include" not in header + body


METAL_WORDS = {
    "bfloat", "constant", "device", "fragment", "half", "kernel", "sampler", "texture", "thread",
    "threadgroup", "uchar", "uint", "uniform", "ulong", "ushort", "vertex", "visible",
}  # fmt: skip


def test_the_shared_source_uses_no_word_of_metals() -> None:
    """No Metal compiler runs here; these are plain names in every other dialect."""
    for name in (*sampling_kernels.PARTS, sampling_kernels.BODY):
        code = re.sub(r"//.*", "", kernels.read_source(sampling_kernels.FOLDER, name))
        assert METAL_WORDS & set(re.findall(r"[A-Za-z_]\w*", code)) == set()
