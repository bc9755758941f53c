"""Penalties, logit bias and the mask of allowed tokens, in pure MLX operations."""

import mlx.core as mx
import numpy as np

from mlx_serving.worker.engine.sampling.draws import StepInputs
from mlx_serving.worker.engine.sampling.parameters import Column, Parameters


class Adjustments:
    """Final logits of one batch; rows without any of the three stay as they are."""

    def __init__(self, parameters: Parameters) -> None:
        """Sort the batch's history and bias by row."""
        self._parameters = parameters
        self._rows = mx.array(parameters.adjusted, dtype=mx.uint32)
        ints = np.array(parameters.ints)[list(parameters.adjusted)]
        self._positions = mx.array(ints[:, Column.POSITION])
        begins, prompts = ints[:, Column.HISTORY_BEGIN], ints[:, Column.PROMPT_END]
        ends = ints[:, Column.HISTORY_END]
        self._past = _Entries(parameters.history, begins, ends)
        self._past_completion = _Entries(parameters.history, prompts, ends)
        self._biases = _Entries(
            parameters.bias_tokens, ints[:, Column.BIAS_BEGIN], ints[:, Column.BIAS_END]
        )
        rows = [parameters.rows[index] for index in parameters.adjusted]
        self._penalised = mx.array([[row.params.penalised] for row in rows])
        self._masked = mx.array([[row.masked] for row in rows])

    def __call__(self, logits: mx.array, inputs: StepInputs) -> mx.array:
        """Return the final logits of logits [B, V]: float32 [B, V]."""
        everything = logits.astype(mx.float32)
        values = everything[self._rows]
        if self._parameters.penalised:
            values = mx.where(self._penalised, self._penalise(values, inputs), values)
        biases = self._parameters.bias_values[self._biases.places]
        values = values.at[self._biases.rows, self._biases.tokens].add(biases)
        if inputs.mask is not None:
            allowed = allowed_tokens(inputs.mask[self._rows], logits.shape[-1])
            values = mx.where(allowed | ~self._masked, values, -mx.inf)
        everything[self._rows] = values
        return everything

    def _penalise(self, values: mx.array, inputs: StepInputs) -> mx.array:
        # The input at position 0 is the last token of the prompt, every later one was sampled.
        recent = mx.concatenate([inputs.recent[:, : inputs.step], inputs.tokens[:, None]], axis=1)
        recent = recent[self._rows]
        real = recent >= 0  # the token of a broken row is none
        sampled = self._positions[:, None] + mx.arange(inputs.step + 1) > 0
        seen = self._count(self._past, recent, real, values) > 0
        count = self._count(self._past_completion, recent, real & sampled, values)
        floats = self._parameters.floats[self._rows]
        repetition, presence, frequency = floats[:, 3:4], floats[:, 4:5], floats[:, 5:6]
        repeated = mx.where(values > 0, values / repetition, values * repetition)
        values = mx.where(seen, repeated, values)
        return mx.where(count > 0, values - (presence + frequency * count), values)

    def _count(
        self, entries: "_Entries", recent: mx.array, counted: mx.array, values: mx.array
    ) -> mx.array:
        counts = mx.zeros(values.shape, dtype=mx.float32)
        counts = counts.at[entries.rows, entries.tokens].add(mx.array(1.0))
        rows = mx.arange(recent.shape[0])[:, None]
        return counts.at[rows, mx.maximum(recent, 0)].add(counted.astype(mx.float32))


class _Entries:
    """Parts [begin, end) of a flat array, each element with the row it belongs to."""

    def __init__(
        self,
        flat: mx.array,
        begins: "np.ndarray[tuple[int], np.dtype[np.int32]]",
        ends: "np.ndarray[tuple[int], np.dtype[np.int32]]",
    ) -> None:
        lengths = ends - begins
        places = [np.arange(begin, end) for begin, end in zip(begins, ends, strict=True)]
        self.places = mx.array(np.concatenate(places).astype(np.int32))
        self.rows = mx.array(np.repeat(np.arange(len(begins)), lengths).astype(np.int32))
        self.tokens = flat[self.places]


def allowed_tokens(mask: mx.array, vocab_size: int) -> mx.array:
    """Unpack bits int32 [R, ceil(V / 32)] to bool [R, V]."""
    bits = mx.arange(32, dtype=mx.uint32)
    words = mask.view(mx.uint32)[..., None]
    return ((words >> bits) & 1).reshape(mask.shape[0], -1)[:, :vocab_size] != 0
