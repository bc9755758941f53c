"""response_format, tool_choice and strict tools as a job's fields: checked, carried, versioned."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mlx_serving.common import limits
from mlx_serving.common.errors import InvalidJob
from mlx_serving.common.job.output_format import chosen_tools, enforces_tools, must_call
from mlx_serving.common.job.schema import GenerationJob

F: dict[str, Any] = {"type": "function", "function": {"name": "f", "parameters": {}}}
G: dict[str, Any] = {"type": "function", "function": {"name": "g", "strict": True}}
CHAT = [{"role": "user", "content": "hi"}]
NAMED = {"type": "function", "function": {"name": "f"}}


def job(**fields: Any) -> GenerationJob:
    return GenerationJob.build(model="m", messages=CHAT, **fields)


def schema(value: Any, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": value, **more}}


FORMS: list[dict[str, Any]] = [
    {"type": "json_object"},
    schema({"type": "object"}),
    schema({"type": "object"}, strict=True, description="An object"),
    schema({"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"type": "null"}}}),
    schema({"$ref": "#/anyOf/1", "anyOf": [{}, {"type": "null"}]}),
    schema({"$ref": "#"}),
    schema({"enum": [{"$ref": "http://data, not a reference"}]}),
    schema({"properties": {"$ref": {"type": "string"}}}),
    {"type": "regex", "regex": "[0-9]+"},
    {"type": "grammar", "grammar": 'start: "a"'},
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: json.dumps(form)[:50])
def test_a_form_is_carried_to_the_worker(form: dict[str, Any]) -> None:
    made = job(response_format=form)
    wire = json.loads(json.dumps(made.to_wire()))
    assert wire["response_format"] == form
    assert GenerationJob.from_wire(wire) == made


def test_a_schema_keeps_the_order_of_its_properties() -> None:
    """It is the order in which the model writes them."""
    names = ["z", "a", "m", "b"]
    form = schema({"type": "object", "properties": {name: {} for name in names}})
    wire = json.loads(json.dumps(job(response_format=form).to_wire()))
    assert list(wire["response_format"]["json_schema"]["schema"]["properties"]) == names


def test_plain_text_is_the_default_spelled_out() -> None:
    assert job(response_format={"type": "text"}) == job()


S = "response_format.json_schema"
WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, "response_format.type"),
    ({"type": "xml"}, "response_format.type"),
    ({"type": ["text"]}, "response_format.type"),
    ({"type": "text", "regex": "a"}, "response_format.regex"),
    ({"type": "json_object", "schema": {}}, "response_format.schema"),
    ({"type": "json_schema"}, S),
    ({"type": "json_schema", "json_schema": []}, S),
    ({"type": "json_schema", "json_schema": {"schema": {}}}, f"{S}.name"),
    (schema({}, strict="yes"), f"{S}.strict"),
    (schema({}, description=1), f"{S}.description"),
    (schema({}, scheme={}), f"{S}.scheme"),
    (schema(True), f"{S}.schema"),
    (schema(None), f"{S}.schema"),
    (schema({"enum": ["x" * 100] * 1000}), f"{S}.schema"),
    (schema({"$ref": "other.json"}), f"{S}.schema.$ref"),
    (schema({"$ref": "https://example.com/a.json#/b"}), f"{S}.schema.$ref"),
    (schema({"anyOf": [{}, {"$ref": "#/$defs/a"}]}), f"{S}.schema.anyOf[1].$ref"),
    (schema({"$ref": "#/anyOf/2", "anyOf": [{}]}), f"{S}.schema.$ref"),
    ({"type": "regex"}, "response_format.regex"),
    ({"type": "regex", "regex": ""}, "response_format.regex"),
    ({"type": "regex", "regex": "a" * (limits.REGEX_CHARS + 1)}, "response_format.regex"),
    ({"type": "grammar", "grammar": 5}, "response_format.grammar"),
    ({"type": "grammar", "grammar": "a" * (limits.GRAMMAR_CHARS + 1)}, "response_format.grammar"),
]


def numbered(cases: list[tuple[dict[str, Any], str]]) -> list[str]:
    return [f"{number}-{path}" for number, (_, path) in enumerate(cases)]


@pytest.mark.parametrize(("form", "path"), WRONG, ids=numbered(WRONG))
def test_a_wrong_form_is_refused_by_the_path_of_its_field(form: dict[str, Any], path: str) -> None:
    with pytest.raises(InvalidJob) as raised:
        job(response_format=form)
    assert [error.path for error in raised.value.errors] == [path]


def test_a_deep_schema_is_refused_before_anybody_reads_it() -> None:
    inner: dict[str, Any] = {}
    for _ in range(30_000):
        inner = {"items": inner}
    with pytest.raises(InvalidJob, match="nested deeper"):
        job(response_format=schema(inner))


CHOICES: list[tuple[dict[str, Any], str]] = [
    ({"tools": [F], "tool_choice": "always"}, "tool_choice"),
    ({"tools": [F], "tool_choice": 1}, "tool_choice"),
    ({"tools": [F], "tool_choice": {"type": "function"}}, "tool_choice"),
    ({"tools": [F], "tool_choice": {**NAMED, "more": 1}}, "tool_choice"),
    ({"tools": [G], "tool_choice": NAMED}, "tool_choice.function.name"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [], "tool_choice": "required"}, "tool_choice"),
    (
        {"tools": [F], "tool_choice": "required", "response_format": {"type": "json_object"}},
        "response_format",
    ),
    (
        {"tools": [{"type": "function", "function": {
            "name": "f", "strict": True, "parameters": {"$ref": "http://x"}}}]},
        "tools[0].function.parameters.$ref",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "path"), CHOICES, ids=numbered(CHOICES))
def test_a_wrong_choice_of_tools_is_refused_by_path(fields: dict[str, Any], path: str) -> None:
    with pytest.raises(InvalidJob) as raised:
        job(**fields)
    assert [error.path for error in raised.value.errors] == [path]


def names(**fields: Any) -> list[str]:
    made = job(**fields)
    return [tool.function.name for tool in chosen_tools(made.tools, made.tool_choice)]


def test_the_choice_says_which_tools_there_are_and_whether_one_must_be_called() -> None:
    assert names() == []
    assert names(tools=[F, G]) == names(tools=[F, G], tool_choice="required") == ["f", "g"]
    assert names(tools=[F, G], tool_choice="none") == []
    assert names(tools=[F, G], tool_choice=NAMED) == ["f"]
    assert must_call(job(tools=[F], tool_choice="required").tool_choice)
    assert must_call(job(tools=[F], tool_choice=NAMED).tool_choice)
    assert not must_call(job(tools=[F], tool_choice="auto").tool_choice)


@pytest.mark.parametrize(
    ("fields", "enforced"),
    [
        ({"tools": [F]}, False),
        ({"tools": [F], "tool_choice": "auto"}, False),
        ({"tools": [F, G], "tool_choice": "none"}, False),
        ({"tools": [F, G]}, True),
        ({"tools": [F], "tool_choice": "required"}, True),
        ({"tools": [F], "tool_choice": NAMED}, True),
    ],
)
def test_tools_are_enforced_if_one_is_strict_or_must_be_called(
    fields: dict[str, Any], *, enforced: bool
) -> None:
    made = job(**fields)
    assert enforces_tools(made.tools, made.tool_choice) is enforced
    assert GenerationJob.from_wire(json.loads(json.dumps(made.to_wire()))) == made
