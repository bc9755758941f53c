"""What the chaos run's auditor takes for a right answer, and for the same one."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING, Any

import pytest

from mlx_serving.common.events import ChoiceLogprobs, TokenLogprob
from mlx_serving.common.results import ChoiceResult, FunctionResult, ToolCallResult
from mlx_serving.tally.two_turns import tool_schema
from tests.chaos import work
from tests.chaos.answers import difference, told, wrong

if TYPE_CHECKING:
    from tests.chaos.work import Work


def choice(text: str = "", call: tuple[str, str] | None = None, **more: Any) -> dict[str, Any]:
    calls = [ToolCallResult("id", "function", FunctionResult(*call))] if call else None
    why = "tool_calls" if call else "stop"
    given: dict[str, Any] = {
        "index": 0,
        "text": text,
        "token_ids": [1, 2],
        "finish_reason": why,
    } | more
    return told([ChoiceResult(tool_calls=calls, **given)])[0]


def made(maker: Any) -> Work:
    found: Work = maker(Random(1))
    return found


PEOPLE = '[{"name": "Anna", "age": 3, "mood": "é"}, {"name": "Bert", "age": 4, "mood": "🙂"}]'
LINES = "".join(f"abc = {n};\n" for n in range(10, 15))
CITY = work.Work("call", {}, call=("get_time", {"city": "Paris"}))
PARAMETERS = tool_schema("get_time")["function"]["parameters"]
ANY_CITY = replace(CITY, call=("get_time", None), schema=PARAMETERS)


@pytest.mark.parametrize(
    ("asked", "good", "bad"),
    [
        (made(work.schema), choice(PEOPLE), choice(PEOPLE.replace("Anna", "Ann"))),
        (made(work.schema), choice(PEOPLE), choice(PEOPLE[:-1])),
        (made(work.regex), choice("abcé=12;" * 4), choice("abcé=12;" * 3)),
        (made(work.grammar), choice(LINES), choice(LINES[:-1])),
        (CITY, choice(call=("get_time", '{"city":"Paris"}')), choice("get_time")),
        (CITY, choice(call=("get_time", '{"city": "Paris"}')),
         choice(call=("get_time", '{"city": "Rome"}'))),
        (ANY_CITY, choice(call=("get_time", '{"city": "é"}')),
         choice(call=("add", '{"city": "é"}'))),
        (ANY_CITY, choice(call=("get_time", '{"city": "é"}')),
         choice(call=("get_time", '{"city": 1}'))),
    ],
)  # fmt: skip
def test_an_answer_is_what_was_asked_for(
    asked: Work, good: dict[str, Any], bad: dict[str, Any]
) -> None:
    assert wrong(asked, [good]) == ""
    assert wrong(asked, [bad])
    assert wrong(asked, [good, good]) == "2 choices"


@pytest.mark.parametrize(
    ("other", "where"),
    [
        (choice("ab"), ""),
        (choice("abc"), "choice 0, text: 'abc' for 'ab'"),
        (choice("ab", token_ids=[1, 3]), "choice 0, token_ids: 2 for 2, they part at 1"),
        (choice("ab", finish_reason="length"), "choice 0, finish_reason: 'length' for 'stop'"),
        (choice("ab", call=("f", "{}"), finish_reason="stop"), "choice 0, calls"),
        (choice("ab", reasoning="hm"), "choice 0, reasoning"),
    ],
)
def test_two_answers_are_compared_in_all_they_say(other: dict[str, Any], where: str) -> None:
    assert difference([other], [choice("ab")]).startswith(where)
    assert bool(difference([other], [choice("ab")])) == bool(where)


def test_log_probabilities_may_differ_in_their_last_bits() -> None:
    def at(*values: float) -> dict[str, Any]:
        content = [TokenLogprob("a", value) for value in values]
        return choice("ab", logprobs=ChoiceLogprobs(content))

    assert difference([at(-1.0, -2.0)], [at(-1.000001, -2.0)]) == ""
    assert difference([at(-1.0, -2.0)], [at(-1.1, -2.0)])
    assert difference([at(-1.0)], [at(-1.0, -2.0)])


def test_a_choice_that_is_missing_is_a_difference() -> None:
    assert difference([choice("ab")], [choice("ab")] * 2) == "1 choices for 2"
