"""Penalties, logit bias and the mask of allowed tokens, in pure MLX operations."""

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_serving.worker.engine.sampling.parameters import Column, Parameters, StepInputs


class Adjustments:
    """Final logits of one batch; rows without any of the three are unchanged."""

    def __init__(self, parameters: Parameters) -> None:
        """Sort the batch's history and bias by row."""
        self._parameters = parameters
        self._rows = mx.array(parameters.adjusted, dtype=mx.uint32)
        table = np.array(parameters.table)[list(parameters.adjusted)]
        self._positions = mx.array(table[:, Column.POSITION])
        begins, prompts, ends, biases, values, counts = table[:, Column.HISTORY_BEGIN :].T
        self._past = _Entries(parameters.lists, begins, ends)
        self._past_completion = _Entries(parameters.lists, prompts, ends)
        self._biased = _Entries(parameters.lists, biases, biases + counts)
        self._biases = _Entries(parameters.lists, values, values + counts).values.view(mx.float32)
        rows = [parameters.rows[index] for index in parameters.adjusted]
        self._penalised = mx.array([[row.params.penalised] for row in rows])
        self._masked = mx.array([[row.masked] for row in rows])

    def __call__(self, logits: mx.array, inputs: StepInputs) -> mx.array:
        """Return the final logits of logits [B, V]: float32 [B, V]."""
        everything = logits.astype(mx.float32)
        values = everything[self._rows]
        if self._parameters.penalised:
            values = mx.where(self._penalised, self._penalise(values, inputs), values)
        values = values.at[self._biased.rows, self._biased.values].add(self._biases)
        if inputs.mask is not None:
            allowed = allowed_tokens(inputs.mask[self._rows], logits.shape[-1])
            values = mx.where(allowed | ~self._masked, values, -mx.inf)
        everything[self._rows] = values
        return everything

    def _penalise(self, values: mx.array, inputs: StepInputs) -> mx.array:
        # The input at position 0 is the last token of the prompt, every later one was sampled.
        before = inputs.state[:, 1 : inputs.step + 1]
        recent = mx.concatenate([before, inputs.tokens[:, None]], axis=1)
        recent = recent[self._rows]
        real = recent >= 0  # a broken row has no token
        sampled = self._positions[:, None] + mx.arange(inputs.step + 1) > 0
        seen = self._count(self._past, recent, real, values) > 0
        count = self._count(self._past_completion, recent, real & sampled, values)
        repetition, presence, frequency = (
            self._parameters.floats(column)[self._rows]
            for column in (Column.REPETITION, Column.PRESENCE, Column.FREQUENCY)
        )
        repeated = mx.where(values > 0, values / repetition, values * repetition)
        values = mx.where(seen, repeated, values)
        return mx.where(count > 0, values - (presence + frequency * count), values)

    def _count(
        self, entries: "_Entries", recent: mx.array, counted: mx.array, values: mx.array
    ) -> mx.array:
        counts = mx.zeros(values.shape, dtype=mx.float32)
        counts = counts.at[entries.rows, entries.values].add(mx.array(1.0))
        rows = mx.arange(recent.shape[0])[:, None]
        return counts.at[rows, mx.maximum(recent, 0)].add(counted.astype(mx.float32))


class _Entries:
    """Slices [begin, end) of a flat array, each element with the row that it belongs to."""

    def __init__(self, flat: mx.array, begins: NDArray[np.int32], ends: NDArray[np.int32]) -> None:
        places = [np.arange(begin, end) for begin, end in zip(begins, ends, strict=True)]
        self.rows = mx.array(np.repeat(np.arange(len(begins)), ends - begins).astype(np.int32))
        self.values = flat[mx.array(np.concatenate(places).astype(np.int32))]


def allowed_tokens(mask: mx.array, vocab_size: int) -> mx.array:
    """Unpack bits int32 [R, ceil(V / 32)] to bool [R, V]."""
    bits = mx.arange(32, dtype=mx.uint32)
    words = mask.view(mx.uint32)[..., None]
    return ((words >> bits) & 1).reshape(mask.shape[0], -1)[:, :vocab_size] != 0
