"""The sampler in pure MLX operations; every other implementation is checked against it.

Order: penalties (repetition, then frequency and presence), logit bias, the mask of allowed tokens;
then the filters in Hugging Face transformers' and vLLM V0's order: temperature, top-k, top-p over
the mass that top-k left, min-p against the most likely token. Top-k and top-p end in the least
logit they keep, so tokens tied with it are kept too. A token is then picked by the Gumbel-max
trick, argmax(logit / temperature + noise), which draws exactly from the softmax of the kept ones.
"""

from collections.abc import Sequence
from typing import Final

import mlx.core as mx

from mlx_serving.worker.engine.interface import INVALID_TOKEN
from mlx_serving.worker.engine.sampling.adjustments import Adjustments
from mlx_serving.worker.engine.sampling.logprobs import LogprobReport
from mlx_serving.worker.engine.sampling.noise import hash_tokens, negative_gumbel, position_keys
from mlx_serving.worker.engine.sampling.parameters import (
    Column,
    Draws,
    Parameters,
    StepInputs,
    is_greedy,
)

_SUM_BLOCK: Final = 512  # values; sums of block sums are more exact than one running sum


def cumulative_before(values: mx.array) -> mx.array:
    """Return for each of values float32 [R, V] the sum of the values before it in its row."""
    rows, size = values.shape
    blocks = mx.pad(values, [(0, 0), (0, -size % _SUM_BLOCK)]).reshape(rows, -1, _SUM_BLOCK)
    within = mx.cumsum(blocks, axis=-1, inclusive=False)
    sums = within[..., -1] + blocks[..., -1]
    before = mx.cumsum(sums, axis=-1, inclusive=False)
    return (within + before[..., None]).reshape(rows, -1)[:, :size]


def kept_threshold(
    descending: mx.array, temperature: mx.array, top_k: mx.array, top_p: mx.array
) -> mx.array:
    """Return the least logit that top-k and top-p keep in each row: float32 [R, 1].

    `descending` float32 [R, V]: each row sorted. `top_k` int32 [R, 1] in [1, V]; `temperature`
    and `top_p` float32 [R, 1]; top_p 1 keeps all.
    """
    kth = mx.take_along_axis(descending, top_k - 1, axis=-1)
    scaled = (descending - descending[:, :1]) / temperature
    mass = mx.where(descending >= kth, mx.exp(scaled), 0.0)
    above = cumulative_before(mass)
    total = above[:, -1:] + mass[:, -1:]
    kept = (above < top_p * total).sum(axis=-1, keepdims=True)
    nucleus = mx.take_along_axis(descending, mx.maximum(kept - 1, 0), axis=-1)
    return mx.maximum(kth, mx.where(top_p < 1.0, nucleus, -mx.inf))


def not_usable(logits: mx.array) -> mx.array:
    """Say which rows hold NaN or +inf, or nothing but -inf: bool [B]."""
    top = logits.max(axis=-1)
    # NaN and both infinities are the values that differ from 0 when subtracted from themselves.
    return (top - top) != 0


class ReferenceDraw:
    """Draws for one batch; sorts only if a row has top-k or top-p."""

    def __init__(self, parameters: Parameters, words: mx.array) -> None:
        """Take the packed batch and `token_words` of the vocabulary."""
        self._parameters = parameters
        self._words = words
        self._adjustments = Adjustments(parameters) if parameters.adjusted else None
        asked = parameters.top_logprobs
        self._report = LogprobReport(parameters) if asked is not None else None
        params = [row.params for row in parameters.rows]
        greedy = [is_greedy(p) for p in params]
        self._greedy = mx.array(greedy)
        self._all_greedy = all(greedy)
        filtered = [
            index
            for index, p in enumerate(params)
            if not greedy[index] and (p.top_p < 1.0 or 0 < p.top_k < parameters.vocab_size)
        ]
        self._filtered = _rows_or_all(filtered, len(params)) if filtered else None

    def __call__(self, logits: mx.array, inputs: StepInputs) -> Draws:
        """See `Draw`."""
        broken = not_usable(logits)
        final = self.final(logits, inputs)
        if self._adjustments is not None:
            broken = broken | not_usable(final)
        tokens = mx.where(broken, INVALID_TOKEN, self._tokens(final, inputs.step))
        logprobs = None if self._report is None else self._report(logits, tokens)
        state = state_after(inputs) if self._parameters.penalised else inputs.state
        return Draws(tokens, logprobs, state)

    def final(self, logits: mx.array, inputs: StepInputs) -> mx.array:
        """Return the logits after penalties, bias and mask; unchanged if there are none."""
        return logits if self._adjustments is None else self._adjustments(logits, inputs)

    def _tokens(self, final: mx.array, step: int) -> mx.array:
        likeliest = mx.argmax(final, axis=-1).astype(mx.int32)
        if self._all_greedy:
            return likeliest
        drawn = mx.argmax(self.scores(final, step), axis=-1).astype(mx.int32)
        return mx.where(self._greedy, likeliest, drawn)

    def scores(self, final: mx.array, step: int) -> mx.array:
        """Return the scores whose argmax is drawn, -inf for filtered tokens: float32 [B, V]."""
        logits = final.astype(mx.float32)
        parameters = self._parameters
        temperature = parameters.floats(Column.TEMPERATURE)
        scaled = (logits - logits.max(axis=-1, keepdims=True)) / temperature
        positions = (parameters.table[:, Column.POSITION] + step).astype(mx.uint32)
        streams = parameters.table[:, Column.STREAM_FIRST : Column.POSITION].view(mx.uint32)
        noise = negative_gumbel(hash_tokens(position_keys(streams, positions), self._words))
        kept = scaled >= parameters.floats(Column.LOG_MIN_P)
        threshold = self._threshold(final)
        if threshold is not None:
            kept = kept & (logits >= threshold)
        return mx.where(kept, scaled - noise, -mx.inf)

    def _threshold(self, final: mx.array) -> mx.array | None:
        if self._filtered is None:
            return None
        rows = self._filtered
        if isinstance(rows, mx.array):
            final = final[rows]
        temperature = self._parameters.floats(Column.TEMPERATURE)[rows]
        top_k = self._parameters.ints(Column.TOP_K)[rows]
        top_p = self._parameters.floats(Column.TOP_P)[rows]
        # Sorted in its own dtype: half the bytes if no row is adjusted.
        descending = mx.sort(final, axis=-1)[:, ::-1].astype(mx.float32)
        threshold = kept_threshold(descending, temperature, top_k, top_p)
        if not isinstance(rows, mx.array):
            return threshold
        everything = mx.full((self._parameters.size, 1), -mx.inf)
        everything[rows] = threshold
        return everything


def state_after(inputs: StepInputs) -> mx.array:
    """Return the next call's state; tokens beyond its columns are not kept."""
    columns = mx.arange(inputs.state.shape[1])
    state = mx.where(columns == inputs.step + 1, inputs.tokens[:, None], inputs.state)
    return mx.where(columns == 0, inputs.step + 1, state)


def _rows_or_all(rows: Sequence[int], count: int) -> mx.array | slice:
    return slice(None) if len(rows) == count else mx.array(list(rows), dtype=mx.uint32)
