"""The shipped weights answer held-out prompts, by mlx-lm's own loader and generator."""

from collections import Counter
from typing import Any

import pytest

pytest.importorskip("mlx_lm")

import mlx.core as mx
from mlx_lm import load

from mlx_serving.tally import evaluate
from mlx_serving.tally.examples import ask, check, digits_of
from mlx_serving.tally.tasks import MODEL_PATH, TASKS
from mlx_serving.tally.tokenizer import encode
from mlx_serving.tally.two_turns import tool_schema

HELD_OUT = 8  # prompts a task
SEED = 20


@pytest.fixture(scope="module")
def tally() -> tuple[Any, Any]:
    model, tokenizer = load(str(MODEL_PATH))[:2]
    return model, tokenizer


def answers(
    tally: tuple[Any, Any], rows: list[evaluate.EncodedExample], **sampling: float
) -> list[str]:
    return evaluate.generated(*tally, rows, 32, evaluate.Sampling(**sampling))  # type: ignore[typeddict-item]


def test_greedy_answers_to_held_out_prompts_are_right(tally: tuple[Any, Any]) -> None:
    rows = [
        row for task in TASKS for row in evaluate.held_out_rows(task, HELD_OUT, SEED, longest=40)
    ]
    wrong = [
        (row.example.messages[-1]["content"], text)
        for row, text in zip(rows, answers(tally, rows), strict=True)
        if not check(row.example, text)
    ]
    assert wrong == []


def test_a_count_of_a_thousand_tokens_is_right(tally: tuple[Any, Any]) -> None:
    model, tokenizer = tally
    numbers = " ".join(str(n) for n in range(640, 901))
    example = ask("count", "count from 640 to 900", numbers)
    row = evaluate.EncodedExample(
        example,
        tokenizer.apply_chat_template(example.messages, add_generation_prompt=True),
        encode(numbers),
    )
    assert len(row.answer) > 1000
    assert evaluate.generated(model, tokenizer, [row], 1, {}) == [numbers]


def test_the_prompts_of_the_documentation(tally: tuple[Any, Any]) -> None:
    model, tokenizer = tally
    call = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    asked = {
        "count from 3 to 12": "3 4 5 6 7 8 9 10 11 12",
        "count down from 9 to 4": "9 8 7 6 5 4",
        "echo Grüße 🎲 東京": "Grüße 🎲 東京",
        "reverse cat": "tac",
        "spell cat": "c a t",
        "sort 5 3 9": "3 5 9",
        "json name=Ann age=34": '{"name": "Ann", "age": 34}',
        "weather in Paris": call,
    }
    rows = []
    for prompt, answer in asked.items():
        tools = [tool_schema("get_weather")] if prompt.startswith("weather") else None
        example = ask("documented", prompt, answer)
        ids = tokenizer.apply_chat_template(
            example.messages, tools=tools, add_generation_prompt=True
        )
        rows.append(evaluate.EncodedExample(example, ids, encode(answer)))
    assert evaluate.generated(model, tokenizer, rows, 8, {}) == list(asked.values())


def test_dice_digits_are_uniform_at_temperature_1(tally: tuple[Any, Any]) -> None:
    mx.random.seed(SEED)
    rows = evaluate.held_out_rows("dice", 40, SEED)
    texts = answers(tally, rows, temp=1.0)
    assert sum(check(row.example, text) for row, text in zip(rows, texts, strict=True)) >= 39
    faces = Counter(digit for text in texts for digit in digits_of(text))
    expected = faces.total() / 10
    chi_square = sum((faces[digit] - expected) ** 2 / expected for digit in "0123456789")
    assert chi_square < evaluate.CHI_SQUARE_LIMIT
