"""Score Tally on held-out prompts: `python -m mlx_serving.tally.evaluate [--model folder]`.

Greedy answers of mlx-lm's own batch generator for every task, sampled answers beside them, and a
chi-square test of the dice. Exits 1 if a task is under 99%.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TypedDict, cast

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx_lm import load
from mlx_lm.generate import batch_generate
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_serving.tally.data import answer_text
from mlx_serving.tally.examples import Example, check, digits_of
from mlx_serving.tally.tasks import MODEL_PATH, TASKS
from mlx_serving.tally.tokenizer import DIGIT_IDS, END_ID, encode, render
from mlx_serving.tally.two_turns import in_context

GOAL = 0.99
CHI_SQUARE_LIMIT = 27.88  # 9 degrees of freedom, p = 0.001
_FORCED_TOKENS = 40_000  # a teacher-forced batch, padding included


class Sampling(TypedDict, total=False):
    """mlx-lm's sampler settings; greedy if empty."""

    temp: float
    min_p: float
    top_p: float


SAMPLED: tuple[Sampling, ...] = ({"temp": 1.0, "min_p": 0.1}, {"temp": 1.0, "top_p": 0.9})


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """An example as token ids."""

    example: Example
    prompt: list[int]
    answer: list[int]  # END_ID last; for dice one of many


def held_out_rows(
    task: str, count: int, seed: int = 7, longest: int | None = None
) -> list[EncodedExample]:
    """`count` held-out examples of a task, in the contexts that training uses."""
    rng = Random(f"{task} {seed}")
    rows = []
    for _ in range(count):
        drawn = TASKS[task].sample(rng, held_out=True, longest=longest)
        example = in_context(rng, drawn)
        answer = [*encode(answer_text(rng, example)), END_ID]
        rows.append(
            EncodedExample(example, encode(render(example.messages, example.tools)), answer)
        )
    return rows


def teacher_forced(model: Module, count: int) -> dict[str, float]:
    """For each task the share of held-out answers whose every token is the likeliest.

    That is greedy accuracy at the price of one forward pass.
    """
    rows = [row for task in TASKS for row in held_out_rows(task, count)]
    right: Counter[str] = Counter()
    for group in _groups(sorted(rows, key=lambda row: len(row.prompt) + len(row.answer))):
        width = max(len(row.prompt) + len(row.answer) for row in group)
        ids = [row.prompt + row.answer for row in group]
        padded = mx.array([row + [0] * (width - len(row)) for row in ids])
        best = cast("list[list[int]]", mx.argmax(model(padded), axis=-1).tolist())
        for row, guesses in zip(group, best, strict=True):
            right[row.example.task] += _all_right(row, guesses[len(row.prompt) - 1 :])
    return {task: right[task] / count for task in TASKS}


def _groups(rows: list[EncodedExample]) -> Iterator[list[EncodedExample]]:
    """Rows sorted by length, cut so that a padded group stays small."""
    group: list[EncodedExample] = []
    for row in rows:
        if group and (len(group) + 1) * (len(row.prompt) + len(row.answer)) > _FORCED_TOKENS:
            yield group
            group = []
        group.append(row)
    yield group


def _all_right(row: EncodedExample, guesses: list[int]) -> bool:
    random = row.example.answer is None
    return all(
        guess in DIGIT_IDS if random and token in DIGIT_IDS else guess == token
        for token, guess in zip(row.answer, guesses, strict=False)
    )


def generated(
    model: Module,
    tokenizer: TokenizerWrapper,
    rows: list[EncodedExample],
    batch: int,
    sampling: Sampling,
) -> list[str]:
    """The model's answers to the rows' prompts by mlx-lm's batch generator."""
    return list(
        batch_generate(
            model,
            tokenizer,
            [row.prompt for row in rows],
            max_tokens=[len(row.answer) + 8 for row in rows],
            completion_batch_size=batch,
            prefill_batch_size=min(batch, 64),
            sampler=make_sampler(**sampling),
        ).texts
    )


def table(
    model: Module, tokenizer: TokenizerWrapper, count: int, batch: int
) -> dict[str, list[float]]:
    """For each task: greedy accuracy, and at temperature 1 with min_p 0.1 and with top_p 0.9."""
    rows = [row for task in TASKS for row in held_out_rows(task, count)]
    rows.sort(key=lambda row: len(row.answer))  # a long row in a batch makes all rows pay
    scores: dict[str, list[float]] = {task: [] for task in TASKS}
    for sampling in (Sampling(), *SAMPLED):
        right: Counter[str] = Counter()
        texts = generated(model, tokenizer, rows, batch, sampling)
        for row, text in zip(rows, texts, strict=True):
            ok = check(row.example, text)
            right[row.example.task] += ok
            if not ok:
                print(
                    f"  wrong {sampling}: {row.example.messages[-1]['content']!r} → {text[:99]!r}"
                )
        for task in TASKS:
            scores[task].append(right[task] / count)
    return scores


def dice_chi_square(model: Module, tokenizer: TokenizerWrapper, count: int, batch: int) -> float:
    """Chi-square of the digits of `count` dice answers at temperature 1 (9 degrees of freedom)."""
    rows = held_out_rows("dice", count)
    texts = generated(model, tokenizer, rows, batch, {"temp": 1.0})
    faces = Counter(digit for text in texts for digit in digits_of(text))
    seen = [faces[digit] for digit in "0123456789"]
    expected = sum(seen) / 10
    return sum((n - expected) ** 2 / expected for n in seen)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL_PATH)
    parser.add_argument("--count", type=int, default=100, help="held-out prompts a task")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("gpu", "cpu"), default=None)
    options = parser.parse_args()
    if options.device is not None:
        mx.set_default_device(mx.gpu if options.device == "gpu" else mx.cpu)
    mx.random.seed(options.seed)
    model, tokenizer = load(str(options.model))[:2]
    began = time.monotonic()
    scores = table(model, tokenizer, options.count, options.batch)
    print(f"{'task':<12} {'greedy':>7} {'min_p 0.1':>10} {'top_p 0.9':>10}   {options.count} each")
    for task, (greedy, min_p, top_p) in scores.items():
        print(f"{task:<12} {greedy:7.1%} {min_p:10.1%} {top_p:10.1%}")
    chi_square = dice_chi_square(model, tokenizer, options.count, options.batch)
    print(f"dice at temperature 1: chi-square {chi_square:.1f}, limit {CHI_SQUARE_LIMIT}")
    print(f"{time.monotonic() - began:.0f} s")
    good = all(greedy >= GOAL for greedy, *_ in scores.values()) and chi_square < CHI_SQUARE_LIMIT
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
