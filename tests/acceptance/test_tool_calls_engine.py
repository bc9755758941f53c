"""Tally's tool calls in the engine: read, forced, resumed at every token, and answered."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import jsonschema
import pytest
from msgspec.structs import replace

from mlx_serving.common.errors import InvalidJob
from mlx_serving.tally.tasks import TASKS
from mlx_serving.tally.two_turns import tool_schema
from mlx_serving.worker.engine.interface import Parts
from tests.support.output_support import Row, decode, decode_one, job, request, resumed

WEATHER = [{"role": "user", "content": "weather in Paris"}]
TOOLS = [tool_schema("get_weather"), tool_schema("add")]
STRICT = [{**tool, "function": {**tool["function"], "strict": True}} for tool in TOOLS]


def ask(**fields: Any) -> Any:
    given: dict[str, Any] = {"messages": WEATHER, "tools": TOOLS, "temperature": 0, **fields}
    return job(**given)


def parts(row: Row) -> Parts:
    return Parts(row.text, row.reasoning, row.tool_calls)


def test_a_call_is_no_text_and_ends_the_choice_as_such() -> None:
    row = decode_one(request(ask()))
    (call,) = row.tool_calls
    assert (call.index, call.name, json.loads(call.arguments)) == (
        0, "get_weather", {"city": "Paris"})  # fmt: skip
    assert (row.text, row.finish_reason) == ("", "tool_calls")
    assert "<tool_call>" in "".join(map(str, _tokens(row))), "every token is named"


def _tokens(row: Row) -> list[str]:
    from tests.support.output_support import tally

    return [tally().tokenizer.decode([token]) for token in row.token_ids]


def test_tool_choice_none_leaves_a_call_as_text() -> None:
    row = decode_one(request(ask(tool_choice="none")))
    assert row.tool_calls == []
    assert row.finish_reason == "stop"


def test_a_row_resumes_at_every_token_of_a_call_and_of_its_markers() -> None:
    one = request(ask())
    straight = decode_one(one)
    within = len(straight.token_ids) - 1  # after the last one the call is out
    cuts = [replace(resumed(one, straight.token_ids[:cut]), id=f"job:{cut}")
            for cut in range(1, within)]  # fmt: skip
    for cut in cuts:
        row = decode_one(cut)
        assert [*cut.choices[0].committed, *row.token_ids] == straight.token_ids
        assert parts(row) == parts(straight), "the call was not out yet, so it comes now"
        assert row.finish_reason == "tool_calls"


def test_what_was_out_before_a_resume_is_not_told_again() -> None:
    """Cut where each event ended: what came before and what comes after are the whole."""
    marked = "echo a <tool_cal <tool_call>"
    one = request(ask(messages=[{"role": "user", "content": marked}], max_tokens=40))
    straight = decode_one(one)
    tokens, before = [], Parts()
    for output in straight.outputs[:-1]:
        tokens += output.token_ids
        before += Parts(output.text, output.reasoning, output.tool_calls)
        row = decode_one(resumed(one, tokens))
        assert before + parts(row) == parts(straight)


@pytest.mark.parametrize("seed", range(6))
def test_required_forces_a_call_of_one_of_the_tools(seed: int) -> None:
    asked = ask(messages=[{"role": "user", "content": "count from 3 to 5"}],
                tool_choice="required", temperature=1, seed=seed)  # fmt: skip
    row = decode_one(request(asked))
    assert row.finish_reason == "tool_calls"
    assert row.text.strip() == ""
    for call in row.tool_calls:
        _check(call.name, call.arguments)


def _check(name: str, arguments: str) -> None:
    (tool,) = [t for t in TOOLS if t["function"]["name"] == name]
    jsonschema.validate(json.loads(arguments), tool["function"]["parameters"])


@pytest.mark.parametrize("name", ["get_weather", "add"])
def test_a_named_function_is_the_one_that_is_called(name: str) -> None:
    choice = {"type": "function", "function": {"name": name}}
    row = decode_one(request(ask(tool_choice=choice, temperature=1, seed=2)))
    (call,) = row.tool_calls
    assert call.name == name
    _check(call.name, call.arguments)


def test_strict_tools_leave_text_free_and_hold_calls_to_their_schema() -> None:
    counting = [{"role": "user", "content": "count from 3 to 6"}]
    free = decode_one(request(job(messages=counting, temperature=0)))
    assert free.text == "3 4 5 6"
    rows = decode(
        [request(ask(tools=STRICT, temperature=1, seed=n), f"strict{n}") for n in range(8)]
    )
    calls = [call for row in rows.values() for call in row.tool_calls]
    assert calls
    for call in calls:
        _check(call.name, call.arguments)


def test_strict_tools_beside_a_response_format_give_either() -> None:
    form = {"type": "json_object"}
    row = decode_one(request(ask(tools=STRICT, response_format=form)))
    assert row.tool_calls or isinstance(json.loads(row.text), dict)


def test_a_tool_whose_schema_no_grammar_has_is_refused_by_its_path() -> None:
    odd = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": odd, "strict": True}}]
    with pytest.raises(InvalidJob, match=r"tools\[0\]\.function\.parameters: .*uniqueItems"):
        request(ask(tools=tools))


def test_many_prompts_call_the_right_tool() -> None:
    chance = Random(7)
    examples = [TASKS["tool_call"].sample(chance) for _ in range(12)]
    ones = [
        request(ask(messages=example.messages, tools=example.tools), f"e{index}")
        for index, example in enumerate(examples)
    ]
    rows = decode(ones)
    for index, example in enumerate(examples):
        (call,) = rows[f"e{index}"].tool_calls
        answer = example.answer or ""
        body = json.loads(answer.removeprefix("<tool_call>").removesuffix("</tool_call>"))
        assert (call.name, json.loads(call.arguments)) == (body["name"], body["arguments"])


def test_the_turn_after_the_tools_reply_answers() -> None:
    (call,) = decode_one(request(ask())).tool_calls
    function = {"name": call.name, "arguments": call.arguments}
    called = {"id": call.id, "type": "function", "function": function}
    reply = json.dumps({"temperature": 21, "sky": "clear"})
    messages = [
        *WEATHER,
        {"role": "assistant", "content": "", "tool_calls": [called]},
        {"role": "tool", "tool_call_id": call.id, "content": reply},
    ]
    row = decode_one(request(ask(messages=messages)))
    assert (row.text, row.finish_reason) == ("Paris: 21 degrees, clear", "stop")
