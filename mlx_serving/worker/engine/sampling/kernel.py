"""The fused kernel on a GPU: `native/kernels/sampler/` through MLX's custom kernels."""

from collections.abc import Callable
from functools import cache
from typing import Final

import mlx.core as mx

from mlx_serving.worker.engine.kernels import Dialect, dialect, make_kernel, read_source
from mlx_serving.worker.engine.sampling.draws import Draws, Logprobs, StepInputs
from mlx_serving.worker.engine.sampling.parameters import Parameters

FOLDER: Final = "sampler"
BODY: Final = "main.inc"
PARTS: Final = ("row.h", "noise.h", "passes.h", "adjustments.h", "filters.h", "sampler.h")
_INPUTS: Final = ["logits", "rows", "state", "inputs", "lists", "mask"]
_OUTPUTS: Final = [
    "tokens", "chosen_logprobs", "top_tokens", "top_logprobs", "state_after", "scratch",
]  # fmt: skip
_OUTPUT_DTYPES: Final = [mx.int32, mx.float32, mx.int32, mx.float32, mx.int32, mx.float32]
_THREADS: Final[dict[str, int]] = {"cuda": 1024, "metal": 512}  # a power of two
_UNUSED: Final = 8  # elements of an array that no row reads


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
    """Draws for one batch, one launch a call."""

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
