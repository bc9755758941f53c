"""Tally's tasks: right answers, their checks, and the held-out split."""

import json
import subprocess
import sys
from random import Random
from typing import cast

import pytest

from mlx_serving.tally import tasks, tokenizer
from mlx_serving.tally.examples import Example, ask, check, group_digits, is_held_out
from mlx_serving.tally.tasks import TASKS

SAMPLES = 200


def samples(task: str, *, held_out: bool | None = None) -> list[Example]:
    rng = Random(f"{task} {held_out}")
    return [TASKS[task].sample(rng, held_out=held_out) for _ in range(SAMPLES)]


def prompt_of(example: Example) -> str:
    return str(example.messages[-1]["content"])


def test_the_eleven_tasks() -> None:
    assert list(TASKS) == [
        "count",
        "count_down",
        "echo",
        "reverse",
        "spell",
        "sort",
        "json",
        "dice",
        "tool_call",
        "tool_result",
        "second_turn",
    ]


def test_count_lists_every_number_between_its_bounds() -> None:
    for example in samples("count"):
        low, high = (int(n) for n in prompt_of(example).removeprefix("count from ").split(" to "))
        assert example.answer == " ".join(str(n) for n in range(low, high + 1))
        assert 0 <= low <= high <= 999


def test_count_down_lists_them_from_above() -> None:
    for example in samples("count_down"):
        high, low = (
            int(n) for n in prompt_of(example).removeprefix("count down from ").split(" to ")
        )
        assert example.answer == " ".join(str(n) for n in range(high, low - 1, -1))
        assert 0 <= low <= high <= 999


def test_a_count_may_run_to_thousands_of_tokens() -> None:
    assert max(len(tokenizer.encode(e.answer or "")) for e in samples("count")) > 2000


def test_echo_gives_the_text_back_and_holds_every_utf8_width() -> None:
    texts = [prompt_of(example).removeprefix("echo ") for example in samples("echo")]
    assert [example.answer for example in samples("echo")] == texts
    widths = {len(char.encode()) for text in texts for char in text}
    assert widths == {1, 2, 3, 4}
    assert all(text == text.strip() and len(text.encode()) <= 48 for text in texts)


@pytest.mark.parametrize(
    ("task", "answer_of"),
    [
        ("reverse", lambda words: words[0][::-1]),
        ("spell", lambda words: " ".join(words[0])),
        ("sort", lambda words: " ".join(sorted(words, key=int))),
        (
            "json",
            lambda words: json.dumps(
                {
                    key: int(value) if value.isdigit() else value
                    for key, value in (word.split("=") for word in words)
                }
            ),
        ),
    ],
)
def test_answers_follow_from_the_prompt(task: str, answer_of: object) -> None:
    assert callable(answer_of)
    for example in samples(task):
        assert example.answer == answer_of(prompt_of(example).split()[1:])


def test_a_tool_call_names_an_offered_tool_and_its_parameters() -> None:
    for example in samples("tool_call"):
        body = (example.answer or "").removeprefix("<tool_call>\n").removesuffix("\n</tool_call>")
        call = json.loads(body)
        offered = {tool["function"]["name"]: tool["function"] for tool in example.tools or []}
        properties = offered[call["name"]]["parameters"]["properties"]
        assert list(call["arguments"]) == list(properties)
        assert all(str(value) in prompt_of(example) for value in call["arguments"].values())


def test_the_turn_after_a_tools_reply_reads_the_reply() -> None:
    for example in samples("tool_result"):
        reply = json.loads(prompt_of(example))
        assert all(str(value) in (example.answer or "") for value in reply.values())


def test_a_second_turn_repeats_or_reverses_the_first_answer() -> None:
    for example in samples("second_turn"):
        first = str(example.messages[1]["content"])
        reversed_first = (first[::-1], " ".join(reversed(first.split())))
        if prompt_of(example) == "again":
            assert example.answer == first
        else:
            assert example.answer in reversed_first


@pytest.mark.parametrize("task", TASKS)
def test_the_split_is_disjoint_and_holds_a_tenth_out(task: str) -> None:
    training = {example.key for example in samples(task, held_out=False)}
    held_out = {example.key for example in samples(task, held_out=True)}
    assert not training & held_out
    share = sum(is_held_out(example) for example in samples(task)) / SAMPLES
    assert 0.02 < share < 0.25


def test_training_rows_hold_no_held_out_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    data = pytest.importorskip("mlx_serving.tally.data", exc_type=ImportError)
    drawn: list[Example] = []
    real = data.in_context

    def recording(rng: Random, example: Example) -> Example:
        drawn.append(example)
        return cast("Example", real(rng, example))

    monkeypatch.setattr(data, "in_context", recording)
    data.make_batch(0, 0, 0, 200)
    assert len(drawn) >= 200
    assert not any(is_held_out(example) for example in drawn)


@pytest.mark.parametrize("task", ["reverse", "spell"])
def test_a_word_that_is_one_token_is_never_taken_letter_by_letter(task: str) -> None:
    words = {prompt_of(example).split()[1] for example in samples(task)}
    assert not words & set(tokenizer.WORD_IDS)


def test_check_wants_the_very_answer_but_for_spaces_around_it() -> None:
    example = ask("count", "count from 3 to 5", "3 4 5")
    assert check(example, " 3 4 5\n")
    assert not check(example, "3 4")
    assert not check(example, "3 4 5 6")


@pytest.mark.parametrize("size", [1, 10, 11, 80])
def test_check_counts_dice_digits_and_their_groups(size: int) -> None:
    example = ask("dice", f"dice {size}", None)
    digits = "".join(Random(size).choices("0123456789", k=size))
    assert check(example, group_digits(digits))
    assert not check(example, group_digits(digits + "0"))
    assert not check(example, group_digits(digits[1:]))
    assert not check(example, " ".join(digits) if size > 1 else "x")


def test_equal_seeds_sample_equal_examples() -> None:
    for task in TASKS.values():
        assert task.sample(Random(3)) == task.sample(Random(3))


def test_a_web_backend_can_import_the_tasks_without_mlx_or_numpy() -> None:
    code = (
        "import sys, mlx_serving.tally.tasks;"
        "sys.exit(any(m in sys.modules for m in ('mlx', 'mlx.core', 'numpy', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_model_folder_ships_with_the_package() -> None:
    files = {file.name for file in tasks.MODEL_PATH.iterdir()}
    assert files >= {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    assert sum(file.stat().st_size for file in tasks.MODEL_PATH.iterdir()) <= 4_000_000
