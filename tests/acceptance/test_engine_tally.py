"""The engine on the shipped model: right answers, alone and among others, cut and resumed."""

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
from msgspec.structs import replace

from mlx_serving.common.job.schema import GenerationJob
from mlx_serving.tally.examples import Example, check
from mlx_serving.tally.tasks import MODEL_PATH, TASKS
from mlx_serving.worker.engine.engine import Engine
from mlx_serving.worker.engine.interface import Request, RequestChoice, SamplingParams
from mlx_serving.worker.engine.loader import EngineOptions, load_engine
from mlx_serving.worker.engine.text.prompts import PromptEncoder
from tests.support.engine_support import Collected, drive


@pytest.fixture(scope="module")
def engine() -> Engine:
    return load_engine(MODEL_PATH, EngineOptions(prefill_chunk_tokens=128), name="tally")


@pytest.fixture(scope="module")
def encoder(engine: Engine) -> PromptEncoder:
    return PromptEncoder(engine.tokenizer)


def examples(count: int, seed: int) -> Iterator[Example]:
    chance = random.Random(seed)
    names = sorted(TASKS)
    for index in range(count):
        yield TASKS[names[index % len(names)]].sample(chance)


def as_sent(message: dict[str, Any]) -> dict[str, Any]:
    """The API carries a call's arguments as a JSON string; the tasks hold the object."""
    message = json.loads(json.dumps(message))
    for call in message.get("tool_calls") or []:
        function = call.get("function", call)
        if not isinstance(function["arguments"], str):
            function["arguments"] = json.dumps(function["arguments"])
    return message


def job_of(example: Example) -> GenerationJob:
    fields: dict[str, Any] = {"tools": example.tools} if example.tools else {}
    messages = [as_sent(message) for message in example.messages]
    return GenerationJob.build(model="tally", messages=messages, max_tokens=512, **fields)


def requests_of(encoder: PromptEncoder, tasks: list[Example]) -> list[Request]:
    """Greedy, but for dice, which is drawn at temperature 1."""
    return [
        Request(
            str(index),
            encoder.encode(job_of(example)),
            SamplingParams(1.0 if example.task == "dice" else 0.0, seed=index),
            max_tokens=512,
        )
        for index, example in enumerate(tasks)
    ]


def assert_right(tasks: list[Example], rows: dict[str, Collected]) -> None:
    """Tally itself is right in 99 of 100; a crossed or lost token would spoil far more."""
    wrong = [
        (example.task, rows[str(index)].text)
        for index, example in enumerate(tasks)
        if not check(example, rows[str(index)].text)
    ]
    assert len(wrong) <= len(tasks) // 30, wrong
    assert {row.finish_reason for row in rows.values()} == {"stop"}


@pytest.mark.slow
def test_every_task_is_answered_in_a_churning_batch(engine: Engine, encoder: PromptEncoder) -> None:
    tasks = list(examples(64, seed=1))
    assert_right(tasks, drive(engine, requests_of(encoder, tasks), every=1))


def dice(encoder: PromptEncoder, count: int, seed: int, committed: tuple[int, ...] = ()) -> Request:
    messages = [{"role": "user", "content": f"dice {count}"}]
    job = GenerationJob.build(model="tally", messages=messages)
    prompt = encoder.encode(job)
    choices = (RequestChoice(0, committed),)
    return Request(f"dice{seed}", prompt, SamplingParams(1.0, seed=seed), 512, choices=choices)


def test_dice_are_the_same_alone_and_in_a_batch_of_32_and_across_a_resume(
    engine: Engine, encoder: PromptEncoder
) -> None:
    thrown = dice(encoder, 20, seed=42)
    alone = drive(engine, [thrown])[thrown.id]
    mates = [
        replace(mate, max_tokens=48) for mate in requests_of(encoder, list(examples(31, seed=2)))
    ]
    batched = drive(engine, [*mates[:11], thrown, *mates[11:]])[thrown.id]
    assert (batched.token_ids, batched.text) == (alone.token_ids, alone.text)
    half = len(alone.token_ids) // 2
    resumed = dice(encoder, 20, seed=42, committed=tuple(alone.token_ids[:half]))
    rest = drive(engine, [resumed, *mates[:5]])[thrown.id]
    assert rest.token_ids == alone.token_ids[half:]
    assert alone.text.endswith(rest.text)
    other = dice(encoder, 20, seed=43)
    assert drive(engine, [other])[other.id].text != alone.text


def test_dice_pass_a_chi_square_test(engine: Engine, encoder: PromptEncoder) -> None:
    throws = [dice(encoder, 30, seed=seed) for seed in range(40)]
    rows = drive(engine, throws)
    digits = [c for row in rows.values() for c in row.text if c.isdigit()]
    expected = len(digits) / 10
    statistic = sum((digits.count(str(d)) - expected) ** 2 / expected for d in range(10))
    assert len(digits) >= 1000
    assert statistic < 33.72  # 9 degrees of freedom, alpha = 1e-4


def test_a_stop_string_ends_a_count(engine: Engine, encoder: PromptEncoder) -> None:
    messages = [{"role": "user", "content": "count from 3 to 20"}]
    prompt = encoder.encode(GenerationJob.build(model="tally", messages=messages))
    row = drive(engine, [Request("c", prompt, SamplingParams(), 512, stop=(" 1",))])["c"]
    assert (row.text, row.finish_reason) == ("3 4 5 6 7 8 9", "stop")
