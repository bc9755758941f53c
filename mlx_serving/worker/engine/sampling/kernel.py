"""The fused kernel on a GPU: `native/kernels/sampler.h` through MLX's custom kernels."""

import hashlib
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal

import mlx.core as mx

from mlx_serving.worker.engine.sampling.draws import Draws, Logprobs, StepInputs
from mlx_serving.worker.engine.sampling.parameters import Parameters

Dialect = Literal["cuda", "metal"]

_PARTS: Final = ("row.h", "noise.h", "passes.h", "adjustments.h", "filters.h", "sampler.h")
_INCLUDES: Final = re.compile(r"^#(pragma once|include .*)\n", re.MULTILINE)
_INPUTS: Final = ["logits", "rows", "state", "inputs", "lists", "mask"]
_OUTPUTS: Final = [
    "tokens", "chosen_logprobs", "top_tokens", "top_logprobs", "state_after", "scratch",
]  # fmt: skip
_OUTPUT_DTYPES: Final = [mx.int32, mx.float32, mx.int32, mx.float32, mx.int32, mx.float32]
_THREADS: Final[dict[str, int]] = {"cuda": 1024, "metal": 512}  # a power of two
_UNUSED: Final = 8  # elements of an array that no row reads


def gpu_dialect() -> Dialect | None:
    """Return the dialect of the default device, None on a CPU."""
    if mx.default_device().type != mx.DeviceType.gpu:
        return None
    return "metal" if mx.metal.is_available() else "cuda"


def kernel_source(dialect: Dialect) -> tuple[str, str]:
    """Return the kernel's header and body."""
    folder = kernels_folder()
    header = "".join((folder / name).read_text() for name in (f"{dialect}.h", *_PARTS))
    body = "".join((folder / f"{name}.inc").read_text() for name in (f"{dialect}_threads", "main"))
    # MLX compiles one text: parts are joined in the order in which they include each other.
    return _INCLUDES.sub("", header), body


def kernels_folder() -> Path:
    """Return where the sources are: in the package, or in the tree of an editable install."""
    installed = Path(__file__).parent / "kernels"
    return installed if installed.exists() else Path(__file__).parents[4] / "native" / "kernels"


@cache
def _kernel(dialect: Dialect) -> Callable[..., list[mx.array]]:
    header, body = kernel_source(dialect)
    make: Any = mx.fast.cuda_kernel if dialect == "cuda" else mx.fast.metal_kernel
    # MLX keeps compiled CUDA kernels on disk by name: another source must have another name.
    digest = hashlib.sha256((header + body).encode()).hexdigest()[:16]
    kernel: Callable[..., list[mx.array]] = make(
        name=f"mlx_serving_sampler_{digest}",
        input_names=_INPUTS,
        output_names=_OUTPUTS,
        header=header,
        source=body,
    )
    return kernel


class KernelDraw:
    """Draws for one batch, one launch a call."""

    def __init__(self, parameters: Parameters, words: mx.array) -> None:
        """Take the packed batch; the kernel hashes token ids itself and needs no `words`.

        Raises:
            RuntimeError: MLX computes on a CPU.
        """
        del words
        self._parameters = parameters
        dialect = gpu_dialect()
        if dialect is None:
            raise RuntimeError("the sampling kernel needs a GPU")
        self._kernel = _kernel(dialect)
        self._threads = _THREADS[dialect]
        self._top = max(1, parameters.top_logprobs or 0)
        adjusted = len(parameters.adjusted)
        self._scratch = (adjusted, parameters.vocab_size) if adjusted else (1, _UNUSED)

    def __call__(self, logits: mx.array, inputs: StepInputs) -> Draws:
        """See `Draw`."""
        parameters = self._parameters
        rows = parameters.size
        tokens, chosen, top_tokens, top, state, _ = self._kernel(
            inputs=[
                logits, parameters.table, inputs.state, inputs.tokens, parameters.lists,
                _no_mask() if inputs.mask is None else inputs.mask,
            ],
            template=[("T", logits.dtype), ("kThreads", self._threads)],
            grid=(rows * self._threads, 1, 1),
            threadgroup=(self._threads, 1, 1),
            output_shapes=[
                (rows,), (rows,), (rows, self._top), (rows, self._top), inputs.state.shape,
                self._scratch,
            ],
            output_dtypes=_OUTPUT_DTYPES,
        )  # fmt: skip
        asked = parameters.top_logprobs is not None
        return Draws(tokens, Logprobs(chosen, top_tokens, top) if asked else None, state)


@cache
def _no_mask() -> mx.array:
    return mx.zeros((1, _UNUSED), dtype=mx.int32)
