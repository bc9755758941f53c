"""The GPU kernel's own source on the CPU: `native/tests/sampler_host.cpp` through ctypes."""

import ctypes
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_serving.worker.engine.sampling.draws import Draws, Logprobs, StepInputs
from mlx_serving.worker.engine.sampling.parameters import Parameters

SOURCE = Path(__file__).parents[1] / "native" / "tests" / "sampler_host.cpp"
COMPILER = shutil.which(os.environ.get("CXX", "c++"))


class _Pointers(ctypes.Structure):
    """A struct of pointers, as `Inputs` and `Outputs` are."""

    _fields_ = [(f"at{index}", ctypes.c_void_p) for index in range(5)]


class _OutputPointers(ctypes.Structure):
    _fields_ = [(f"at{index}", ctypes.c_void_p) for index in range(6)]


@cache
def library() -> Any:
    """Compile the shared library, once a test run, in a folder that goes with the process."""
    assert COMPILER, "needs a C++ compiler"
    library.folder = folder = tempfile.TemporaryDirectory()  # type: ignore[attr-defined]
    target = Path(folder.name) / "sampler_host.so"
    flags = ["-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-pthread"]
    subprocess.run([COMPILER, *flags, "-o", str(target), str(SOURCE)], check=True)
    run = ctypes.CDLL(str(target)).sampler_host_run
    run.restype = None
    run.argtypes = [
        ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, _Pointers, _OutputPointers,
    ]  # fmt: skip
    return run


class HostKernelDraw:
    """Draws as `KernelDraw` does; `threads` of the host stand for a group of the GPU."""

    threads = 1

    def __init__(self, parameters: Parameters, words: mx.array) -> None:
        del words
        self._parameters = parameters

    def __call__(self, logits: mx.array, inputs: StepInputs) -> Draws:
        parameters = self._parameters
        is_bfloat16 = logits.dtype == mx.bfloat16
        values = np.array(logits.view(mx.uint16) if is_bfloat16 else logits.astype(mx.float32))
        rows, vocab_size = values.shape
        top = max(1, parameters.top_logprobs or 0)
        mask = np.array(mx.zeros((rows, 1), mx.int32) if inputs.mask is None else inputs.mask)
        state = np.array(inputs.state)
        taken = [
            np.array(parameters.table), state, np.array(inputs.tokens), np.array(parameters.lists),
            mask,
        ]  # fmt: skip
        given = [
            np.zeros(rows, np.int32), np.zeros(rows, np.float32), np.zeros((rows, top), np.int32),
            np.zeros((rows, top), np.float32), np.zeros_like(state),
            np.zeros((max(1, len(parameters.adjusted)), vocab_size), np.float32),
        ]  # fmt: skip
        shapes = np.array([rows, vocab_size, state.shape[1], mask.shape[1]], np.uint64)
        library()(
            self.threads, int(is_bfloat16), values.ctypes.data, shapes.ctypes.data,
            _Pointers(*(array.ctypes.data for array in taken)),
            _OutputPointers(*(array.ctypes.data for array in given)),
        )  # fmt: skip
        tokens, chosen, top_tokens, top_values, state_after, _ = map(mx.array, given)
        asked = parameters.top_logprobs is not None
        logprobs = Logprobs(chosen, top_tokens, top_values) if asked else None
        return Draws(tokens, logprobs, state_after)


class HostGroupDraw(HostKernelDraw):
    """A group of several threads: barriers, shares and reductions are real."""

    threads = 8
