"""The fused kernel: on a GPU through MLX's custom kernels, on the CPU in `mlx_serving._native`."""

from __future__ import annotations

from functools import cache, partial
from typing import TYPE_CHECKING, Any, Final

import mlx.core as mx
import numpy as np

from mlx_serving.worker.engine.kernels import Dialect, dialect, make_kernel, read_source
from mlx_serving.worker.engine.sampling.parameters import (
    Draw,
    Draws,
    Logprobs,
    Parameters,
    StepInputs,
    is_greedy,
)
from mlx_serving.worker.engine.sampling.reference import ReferenceDraw

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from mlx_serving.worker.engine.sampling.sampler import MakeDraw

FOLDER: Final = "sampler"
BODY: Final = "main.inc"
PARTS: Final = ("row.h", "noise.h", "passes.h", "adjustments.h", "filters.h", "sampler.h")


_INPUTS: Final = ["logits", "rows", "state", "inputs", "lists", "mask"]


_OUTPUTS: Final = [
    "tokens", "chosen_logprobs", "top_tokens", "top_logprobs", "state_after", "scratch",
]  # fmt: skip


_OUTPUT_DTYPES: Final = [mx.int32, mx.float32, mx.int32, mx.float32, mx.int32, mx.float32]


_THREADS: Final[dict[str, int]] = {"cuda": 1024, "metal": 512}  # a power of two


_UNUSED: Final = 8  # elements of an array that is not read


def kernel_source(language: Dialect) -> tuple[str, str]:
    """Return the kernel's header and body."""
    header = read_source(FOLDER, f"{language}.h", *PARTS)
    return header, read_source(FOLDER, f"{language}_threads.inc", BODY)


@cache
def _kernel(language: Dialect) -> Callable[..., list[mx.array]]:
    header, body = kernel_source(language)
    kernel: Callable[..., list[mx.array]] = make_kernel(
        "sampler", (_INPUTS, _OUTPUTS), language, source=body, header=header
    )
    return kernel


class KernelDraw:
    """Draws for one batch, with one launch for each call."""

    def __init__(self, parameters: Parameters, words: mx.array) -> None:
        """Take the packed batch; the kernel hashes token ids itself and needs no `words`.

        Raises:
            RuntimeError: MLX computes on a CPU.
        """
        del words
        self._parameters = parameters
        language = dialect()
        if language is None:
            raise RuntimeError("the sampling kernel needs a GPU")
        self._kernel = _kernel(language)
        self._threads = _THREADS[language]
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


class NativeDraw:
    """Draws for one batch by `_native.sample`; waits for the logits."""

    def __init__(
        self, native: ModuleType, parameters: Parameters, *, by_groups: bool = False
    ) -> None:
        """Take the native module and the packed batch.

        `by_groups`: compute with several threads for each row, as a GPU does; for tests.
        """
        self._sample = partial(native.sample, by_groups=by_groups)
        self._parameters = parameters
        self._table, self._lists = np.array(parameters.table), np.array(parameters.lists)

    def __call__(self, logits: mx.array, inputs: StepInputs) -> Draws:
        """See `Draw`."""
        parameters = self._parameters
        rows, top = parameters.size, max(1, parameters.top_logprobs or 0)
        # The buffer protocol has no bfloat16; every float16 is a float32.
        is_bfloat16 = logits.dtype == mx.bfloat16
        values = logits.view(mx.uint16) if is_bfloat16 else logits.astype(mx.float32)
        outputs: list[np.ndarray[Any, Any]] = [
            np.empty(rows, np.int32),
            np.empty(rows, np.float32),
            np.empty((rows, top), np.int32),
            np.empty((rows, top), np.float32),
            np.empty(inputs.state.shape, np.int32),
            np.empty((max(1, len(parameters.adjusted)), parameters.vocab_size), np.float32),
        ]
        mask = None if inputs.mask is None else np.array(inputs.mask)
        state, tokens = np.array(inputs.state), np.array(inputs.tokens)
        self._sample(np.array(values), self._table, state, tokens, self._lists, mask, outputs)
        drawn, chosen, top_tokens, top_values, state_after = map(mx.array, outputs[:-1])
        asked = parameters.top_logprobs is not None
        return Draws(
            drawn, Logprobs(chosen, top_tokens, top_values) if asked else None, state_after
        )


def native_sampler(native: ModuleType) -> MakeDraw:
    """Return the CPU's sampler: native, except for greedy batches, whose argmax need not wait."""

    def make(parameters: Parameters, words: mx.array) -> Draw:
        plain = not parameters.adjusted and parameters.top_logprobs is None
        if plain and all(is_greedy(row.params) for row in parameters.rows):
            return ReferenceDraw(parameters, words)
        return NativeDraw(native, parameters)

    return make
