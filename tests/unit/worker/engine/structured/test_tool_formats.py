"""Every format of calls that mlx-lm knows, and text that is none."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_serving.worker.engine.interface import Parts
from mlx_serving.worker.engine.structured.tool_formats import ModelFormat, RequestFormat
from tests.support.paths import ROOT

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        },
    },
}
WANTED = {"city": "Paris", "days": 3}

# As the models' own templates write a call.
SAMPLES: dict[str, str] = json.loads((ROOT / "tests" / "fixtures" / "tool_calls.json").read_text())


@dataclass
class FakeTokenizer:
    """What `ModelFormat` asks mlx-lm's wrapper."""

    name: str
    think_start: str | None = "<think>"
    think_end: str | None = "</think>"
    response_transitions: dict[str, Any] = field(default_factory=dict)
    response_initial_state: str | None = None
    structural_markers: tuple[str, ...] = ()
    has_thinking: bool = True
    has_tool_calling: bool = True

    def __post_init__(self) -> None:
        module = import_module(f"mlx_lm.tool_parsers.{self.name}")
        self.tool_call_start, self.tool_call_end = module.tool_call_start, module.tool_call_end
        self.tool_parser = module.parse_tool_call
        self.init_kwargs = {"tool_parser_type": self.name}


def form(name: str, tools: tuple[dict[str, Any], ...] = (TOOL,)) -> RequestFormat:
    return RequestFormat(ModelFormat.of(FakeTokenizer(name)), "normal", tools)


def parse(name: str, text: str, tools: tuple[dict[str, Any], ...] = (TOOL,)) -> Parts:
    made = form(name, tools).open("job:1", 0)
    return made.push(text) + made.finish(whole=True)


@pytest.mark.parametrize("name", SAMPLES)
def test_a_call_in_each_format_is_read(name: str) -> None:
    parts = parse(name, f"<think>hm</think>so: {SAMPLES[name]}")
    assert (parts.text, parts.reasoning) == ("so: ", "hm")
    assert [(call.name, json.loads(call.arguments)) for call in parts.tool_calls] == [
        ("get_weather", WANTED)
    ]


@pytest.mark.parametrize("name", SAMPLES)
def test_without_tools_a_call_is_text(name: str) -> None:
    assert parse(name, SAMPLES[name], ()) == Parts(SAMPLES[name])


@pytest.mark.parametrize("name", SAMPLES)
def test_a_call_of_a_function_that_nobody_offered_is_text(name: str) -> None:
    text = SAMPLES[name].replace("get_weather", "get_secrets")
    assert parse(name, text) == Parts(text)


def test_an_id_of_the_model_is_kept() -> None:
    (call,) = parse("kimi_k2", SAMPLES["kimi_k2"]).tool_calls
    assert call.id == "functions.get_weather:0"


@pytest.mark.parametrize(
    "call",
    [
        '{"name": "get_weather", "arguments": [1]}',
        '{"name": "get_weather", "arguments": {"city": NaN}}',
        '{"name": "get_weather", "arguments": {"city": "\\ud800"}}',
        '{"name": ["get_weather"], "arguments": {}}',
        '["get_weather"]',
        "[]",
        "null",
        '{"name": "get_weather", "arguments": ' + '{"a":' * 5000 + "1" + "}" * 5000 + "}",
    ],
)
def test_a_call_that_no_event_could_carry_is_text(call: str) -> None:
    text = f"<tool_call>{call}</tool_call>"
    assert parse("json_tools", text) == Parts(text)


def test_arguments_that_are_a_json_text_are_read_once_more() -> None:
    text = '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"Oslo\\"}"}</tool_call>'
    assert parse("json_tools", text).tool_calls[0].arguments == '{"city": "Oslo"}'


pieces = st.sampled_from([*"<>{}[]()=\"',:/\\|\n 3aé", "get_weather", "name", "arguments", "null"])


@pytest.mark.parametrize("name", SAMPLES)
@settings(max_examples=60, deadline=2000)
@given(data=st.data())
def test_no_text_makes_a_parser_raise(name: str, data: st.DataObject) -> None:
    """Samples with pieces cut out and put in, and bodies of nothing but pieces."""
    sample = SAMPLES[name]
    if data.draw(st.booleans()):
        start = data.draw(st.integers(0, len(sample)))
        stop = data.draw(st.integers(start, len(sample)))
        middle = "".join(data.draw(st.lists(pieces, max_size=6)))
        text = sample[:start] + middle + sample[stop:]
    else:
        fake = FakeTokenizer(name)
        body = "".join(data.draw(st.lists(pieces, max_size=30)))
        text = f"{fake.tool_call_start}{body}{fake.tool_call_end}"
    parts = parse(name, text)
    for call in parts.tool_calls:
        assert call.name == "get_weather"
        assert isinstance(json.loads(call.arguments), dict)
    if not parts.tool_calls and "think>" not in text:
        assert parts.text == text
