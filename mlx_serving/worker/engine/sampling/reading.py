"""Log probabilities from the device to the host's own types."""

import math
from collections.abc import Iterable

import numpy as np

from mlx_serving.worker.engine.sampling.draws import Logprobs
from mlx_serving.worker.engine.sequence import TokenLogprobs


def read_logprobs(logprobs: Logprobs, asked: Iterable[tuple[int, int, int]]) -> list[TokenLogprobs]:
    """Read what some rows asked for; waits for the device.

    `asked` names (row, token it sampled, how many of the likeliest). Tokens without any
    probability are left out: their log probability is not a number that JSON has.
    """
    chosen, ids, top = (np.array(values) for values in logprobs)
    return [
        TokenLogprobs(
            token,
            float(chosen[row]),
            tuple(
                (int(i), float(p))
                for i, p in zip(ids[row, :count], top[row, :count], strict=True)
                if p > -math.inf
            ),
        )
        for row, token, count in asked
    ]
