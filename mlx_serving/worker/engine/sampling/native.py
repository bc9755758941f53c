"""The kernel's source on the CPU, in `mlx_serving._native`."""

from functools import partial
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_serving.worker.engine.sampling.draws import Draw, Draws, Logprobs, StepInputs
from mlx_serving.worker.engine.sampling.parameters import Parameters, is_greedy
from mlx_serving.worker.engine.sampling.reference import ReferenceDraw
from mlx_serving.worker.engine.sampling.sampler import MakeDraw


class NativeDraw:
    """Draws for one batch by `_native.sample`; waits for the logits."""

    def __init__(
        self, native: ModuleType, parameters: Parameters, *, by_groups: bool = False
    ) -> None:
        """Take the native module and the packed batch.

        `by_groups` works as a GPU does, with several threads on a row: for tests.
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
    """Return the CPU's sampler: native, but for batches that an argmax serves without a wait."""

    def make(parameters: Parameters, words: mx.array) -> Draw:
        plain = not parameters.adjusted and parameters.top_logprobs is None
        if plain and all(is_greedy(row.params) for row in parameters.rows):
            return ReferenceDraw(parameters, words)
        return NativeDraw(native, parameters)

    return make
