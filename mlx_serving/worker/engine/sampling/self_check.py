"""Runs an implementation beside the reference on this device, with rows that reach every branch.

Tokens must be equal, except for near-ties: log and exp differ by an ulp between device libraries,
so another token passes if the reference scores it within `NEAR_TIE` of its own.
"""

import random
from collections.abc import Iterator
from typing import Final

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_serving.worker.engine.interface import SamplingParams
from mlx_serving.worker.engine.sampling.noise import token_words
from mlx_serving.worker.engine.sampling.parameters import (
    Draw,
    Draws,
    Parameters,
    RowSampling,
    StepInputs,
    is_greedy,
    pack,
)
from mlx_serving.worker.engine.sampling.reference import ReferenceDraw
from mlx_serving.worker.engine.sampling.sampler import MakeDraw

NEAR_TIE: Final = 1e-3  # of a score; its scale is that of logit / temperature + noise
LOGPROB_TOLERANCE: Final = 1e-3
DTYPES: Final = (mx.float32, mx.float16, mx.bfloat16)
_VOCAB_SIZE: Final = 1031  # a prime: no two threads have equal shares
_ROWS: Final = 24
_STEPS: Final = 3
_STATE_COLUMNS: Final = 9


def first_difference(make: MakeDraw, dtype: mx.Dtype | None = None) -> str | None:
    """Return the first difference between an implementation and the reference as text, or None.

    For logits of `dtype`; None: of every one in `DTYPES`. The reference computes on the CPU: a GPU
    would first have to compile each of its operations, for this check alone.
    """
    device = mx.default_device()
    with mx.stream(mx.cpu):
        for each in DTYPES if dtype is None else (dtype,):
            found = _first_difference(make, each, device)
            if found is not None:
                return f"{str(each).removeprefix('mlx.core.')}, {found}"
    return None


def _first_difference(make: MakeDraw, dtype: mx.Dtype, device: mx.Device) -> str | None:
    words = token_words(_VOCAB_SIZE)
    mx.eval(words)
    parameters = pack(_rows(random.Random(0)), _VOCAB_SIZE)  # noqa: S311 - test data
    with mx.stream(device):
        draw = make(parameters, words)

    def draw_there(logits: mx.array, inputs: StepInputs) -> Draws:
        with mx.stream(device):
            draws = draw(logits, inputs)
            mx.eval(draws.arrays)
        return draws

    reference = ReferenceDraw(parameters, words)
    for step, (logits, tokens, mask) in enumerate(_steps(dtype)):
        state = mx.broadcast_to(mx.arange(_STATE_COLUMNS), (_ROWS, _STATE_COLUMNS))
        state = mx.where(mx.arange(_STATE_COLUMNS) == 0, step, state)
        mx.eval(logits, tokens, mask, state)  # so that two devices share no pending array
        inputs = StepInputs(step, tokens, state, mask)
        found = _compare(reference, draw_there, logits, inputs, parameters)
        if found is not None:
            return f"step {step}: {found}"
    return None


def _rows(chance: random.Random) -> Iterator[RowSampling]:
    """Yield rows with each filter off, at its limits and in between, in one batch."""
    for index in range(_ROWS):
        penalties = (1.3, 0.7, -0.4) if index % 3 == 0 else (1.0, 0.0, 0.0)
        params = SamplingParams(
            temperature=chance.choice([0.0, 0.3, 1.0, 50.0]),
            top_p=chance.choice([1.0, 0.9, 0.5, 1e-6, 0.99999]),
            top_k=chance.choice([0, 1, 40, _VOCAB_SIZE]),
            min_p=chance.choice([0.0, 0.0, 0.05]),
            seed=chance.randrange(2**64),
            repetition_penalty=penalties[0],
            presence_penalty=penalties[1],
            frequency_penalty=penalties[2],
            logit_bias=((3, 4.5), (1000, -2.0)) if index % 4 == 0 else (),
            logprobs=None if index % 2 else 3,
        )
        history = [chance.randrange(_VOCAB_SIZE) for _ in range(20)]
        yield RowSampling(params, index % 3, index % 5, history, 12, masked=index % 6 == 1)


def _steps(dtype: mx.Dtype) -> Iterator[tuple[mx.array, mx.array, mx.array]]:
    """Yield logits [B, V] with -inf, ties and broken rows; input tokens; masks."""
    for step in range(_STEPS):
        chance = np.random.default_rng(step)
        logits = chance.normal(0.0, 3.0, (_ROWS, _VOCAB_SIZE)).astype(np.float32)
        logits[step::5] = np.round(logits[step::5])
        logits[step::7, ::2] = -np.inf
        logits[1], logits[2, 17], logits[4, 900] = -np.inf, np.nan, np.inf
        tokens = chance.integers(0, _VOCAB_SIZE, _ROWS).astype(np.int32)
        words = chance.integers(-(2**31), 2**31, (_ROWS, -(-_VOCAB_SIZE // 32)))
        yield mx.array(logits).astype(dtype), mx.array(tokens), mx.array(words.astype(np.int32))


def _compare(
    reference: ReferenceDraw,
    draw: Draw,
    logits: mx.array,
    inputs: StepInputs,
    parameters: Parameters,
) -> str | None:
    expected, got = reference(logits, inputs), draw(logits, inputs)
    ours, theirs = np.array(expected.tokens), np.array(got.tokens)
    rows = np.flatnonzero(ours != theirs)
    if rows.size:
        final = reference.final(logits, inputs)
        scores = np.array(reference.scores(final, inputs.step))
        plain = np.array(final.astype(mx.float32))
        for row in rows:
            values = plain if is_greedy(parameters.rows[row].params) else scores
            gap = abs(values[row, ours[row]] - values[row, theirs[row]])
            if min(ours[row], theirs[row]) < 0 or not gap <= NEAR_TIE:
                return f"row {row}: token {theirs[row]} for {ours[row]}"
    if not np.array_equal(np.array(expected.state), np.array(got.state)):
        return "the tokens it counts"
    return _compare_logprobs(expected, got, parameters, ours == theirs)


def _compare_logprobs(
    expected: Draws, got: Draws, parameters: Parameters, same: NDArray[np.bool_]
) -> str | None:
    if expected.logprobs is None or got.logprobs is None:
        return None if expected.logprobs is got.logprobs else "log probabilities are missing"
    tokens = np.array(expected.tokens)
    ours, our_ids, our_top = (np.array(values) for values in expected.logprobs)
    theirs, their_ids, their_top = (np.array(values) for values in got.logprobs)
    for row, sampling in enumerate(parameters.rows):
        asked = sampling.params.logprobs
        if asked is None or tokens[row] < 0 or not same[row]:
            continue
        close = np.allclose(ours[row], theirs[row], atol=LOGPROB_TOLERANCE)
        ids = (our_ids[row, :asked] == their_ids[row, :asked]).all()
        top = np.allclose(our_top[row, :asked], their_top[row, :asked], atol=LOGPROB_TOLERANCE)
        if not (close and ids and top):
            return f"row {row}: its log probabilities"
    return None
