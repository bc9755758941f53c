"""Training batches, each a pure function of (seed, bucket, index).

So worker processes may make them in any order. No mlx here: the processes stay light.
"""

from dataclasses import dataclass
from random import Random

import numpy as np
from numpy.typing import NDArray

from mlx_serving.tally.examples import Example, dice_size, group_digits
from mlx_serving.tally.tasks import TASKS
from mlx_serving.tally.tokenizer import DIGIT_IDS, END_ID, encode, render
from mlx_serving.tally.two_turns import in_context


@dataclass(frozen=True, slots=True)
class Bucket:
    """Rows of one length. Examples of half to all of `length` tokens are drawn by `weights`."""

    length: int  # tokens a row predicts
    rows: int  # at the full batch
    longest: int  # numbers a count lists
    weights: dict[str, int]


BUCKETS = (
    Bucket(
        64,
        1024,
        12,
        {"count": 3, "count_down": 3, "echo": 4, "reverse": 5, "spell": 3, "sort": 5, "dice": 3}
        | {"json": 2, "second_turn": 2},
    ),
    Bucket(
        128,
        512,
        30,
        {"count": 2, "count_down": 2, "echo": 3, "reverse": 2, "spell": 1, "sort": 3, "dice": 6}
        | {"json": 4, "second_turn": 4},
    ),
    Bucket(
        416,
        144,
        100,
        {"count": 3, "count_down": 3, "dice": 1, "json": 1, "tool_call": 6, "tool_result": 5},
    ),
    Bucket(1088, 56, 280, {"count": 1, "count_down": 1}),
    Bucket(4224, 4, 999, {"count": 1, "count_down": 1}),
)


@dataclass(frozen=True, slots=True)
class TrainingBatch:
    """Rows of tokens; arrays are [rows, length + 1], [rows, length], [rows, length]."""

    tokens: NDArray[np.int16]
    weights: NDArray[np.float32]  # of the loss at each target; they sum to 1
    any_digit: NDArray[np.bool_]  # targets where each of the ten digits is right


def make_batch(seed: int, bucket: int, index: int, rows: int) -> TrainingBatch:
    """Batch number `index` of a bucket."""
    rng = Random(f"{seed} {bucket} {index}")
    shape = BUCKETS[bucket]
    tokens = np.zeros((rows, shape.length + 1), np.int16)
    weights = np.zeros((rows, shape.length), np.float32)
    any_digit = np.zeros((rows, shape.length), np.bool_)
    for row in range(rows):
        prompt, answer, random = draw_row(rng, shape)
        ids = prompt + answer
        tokens[row, : len(ids)] = ids
        first = len(prompt) - 1  # the target at i is the token at i + 1
        # Between a mean over tokens and a mean over answers: long counts are mostly easy tokens.
        weights[row, first : len(ids) - 1] = len(answer) ** -0.5
        if random:
            any_digit[row, first : len(ids) - 1] = np.isin(answer, DIGIT_IDS)
    return TrainingBatch(tokens, weights / weights.sum(), any_digit)


def draw_row(rng: Random, bucket: Bucket) -> tuple[list[int], list[int], bool]:
    """Prompt ids, answer ids with the end token, and whether its digits are random."""
    while True:
        name = rng.choices(list(bucket.weights), list(bucket.weights.values()))[0]
        for _ in range(30):
            drawn = TASKS[name].sample(rng, held_out=False, longest=bucket.longest)
            example = in_context(rng, drawn)
            prompt = encode(render(example.messages, example.tools))
            answer = [*encode(answer_text(rng, example)), END_ID]
            if bucket.length // 2 < len(prompt) + len(answer) <= bucket.length + 1:
                return prompt, answer, example.answer is None


def answer_text(rng: Random, example: Example) -> str:
    """The right answer; for dice any one of them, since any digit counts as the target."""
    if example.answer is not None:
        return example.answer
    faces = "0123456789" if rng.random() < 0.6 else rng.choices("0123456789", k=rng.randint(1, 4))
    return group_digits("".join(rng.choices(faces, k=dice_size(example))))
