"""Which texts a job's grammar takes: by llguidance itself, with markers spelled or as tokens."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from importlib import import_module
from typing import Any

import pytest
from llguidance import LLTokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from mlx_serving.common.errors import InvalidJob
from mlx_serving.common.job.schema import GenerationJob
from mlx_serving.worker.engine.structured.grammar import output_grammar
from mlx_serving.worker.engine.structured.grammar_trial import compile_grammar, try_grammar
from mlx_serving.worker.engine.structured.tool_formats import ModelFormat
from tests.support.schemas_for_tests import schema

MARKERS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
CITY = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"],
        "additionalProperties": False}  # fmt: skip
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f", "parameters": CITY}}
STRICT: dict[str, Any] = {"type": "function", "function": {**TOOL["function"], "strict": True}}
OTHER: dict[str, Any] = {"type": "function", "function": {"name": "g"}}


@cache
def tokenizer(*, tokens: bool) -> tuple[Tokenizer, LLTokenizer]:
    """Bytes, and the markers as tokens of their own or not."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    names = [*MARKERS, "<|end|>"] if tokens else ["<|end|>"]
    made.add_tokens([AddedToken(name, special=True) for name in names])
    return made, LLTokenizer(made.to_str(), eos_token=[len(alphabet) + len(names) - 1])


def model(*, thinks: bool = True, parser: str = "json_tools") -> ModelFormat:
    module = import_module(f"mlx_lm.tool_parsers.{parser}")
    start, end = MARKERS[:2] if thinks else (None, None)
    return ModelFormat(start, end, module.tool_call_start, module.tool_call_end, parser,
                       module.parse_tool_call, {}, None)  # fmt: skip


def grammar(made: GenerationJob, form: ModelFormat, *, tokens: bool, reasoning: bool) -> str:
    def token_of(marker: str) -> int | None:
        return tokenizer(tokens=True)[0].token_to_id(marker) if tokens else None

    spec = output_grammar(made, form, token_of, reasoning=reasoning)
    assert spec is not None
    return spec.text


def takes(
    made: GenerationJob, text: str, *, tokens: bool, thinks: bool = True, reasoning: bool = False
) -> bool:
    """Whether the grammar takes the text, and accepts its end."""
    encoder, inner = tokenizer(tokens=tokens)
    found = grammar(made, model(thinks=thinks), tokens=tokens, reasoning=reasoning)
    assert try_grammar(inner, found) == ""
    matcher, _ = compile_grammar(inner, found)
    ids = encoder.encode(text).ids
    return matcher.consume_tokens(ids) and matcher.is_accepting()


def job(**fields: Any) -> GenerationJob:
    return GenerationJob.build(model="m", messages=[{"role": "user", "content": "x"}], **fields)


both = pytest.mark.parametrize("tokens", [True, False], ids=["tokens", "spelled"])
CALL = '<tool_call>\n{"name": "f", "arguments": {"city": "Oslo"}}\n</tool_call>'
WRONG_CALL = CALL.replace("Oslo", "Bonn")


@both
def test_a_form_comes_after_the_models_reasoning_or_without_it(*, tokens: bool) -> None:
    made = job(response_format=schema(CITY))
    answer = '{"city": "Rome"}'
    assert takes(made, answer, tokens=tokens)
    assert takes(made, f"<think>any {{ text }}</think>\n\n{answer}", tokens=tokens)
    assert not takes(made, f"<think>any</think>text{answer}", tokens=tokens)
    assert not takes(made, "<think>any", tokens=tokens)
    assert not takes(made, '{"city": "Bonn"}', tokens=tokens)


@both
def test_a_prompt_that_opened_the_reasoning_is_closed_before_the_form(*, tokens: bool) -> None:
    made = job(response_format={"type": "regex", "regex": "[0-9]+/[a-z]"})
    assert takes(made, "so</think>12/a", tokens=tokens, reasoning=True)
    assert not takes(made, "so</think> 12/a", tokens=tokens, reasoning=True)
    assert not takes(made, "12/a", tokens=tokens, reasoning=True)


@both
def test_a_job_with_a_prompt_has_no_reasoning(*, tokens: bool) -> None:
    made = GenerationJob.build(model="m", prompt="x", response_format={"type": "json_object"})
    assert takes(made, "{}", tokens=tokens)
    assert not takes(made, "<think>a</think>{}", tokens=tokens)


@both
def test_the_jobs_own_grammar_is_taken_as_it_is(*, tokens: bool) -> None:
    made = job(response_format={"type": "grammar", "grammar": 'start: A "b"+\nA: "a" | "aa"'})
    assert takes(made, "aabb", tokens=tokens)
    assert takes(made, "<think>x</think>ab", tokens=tokens)
    assert not takes(made, "b", tokens=tokens)


@pytest.mark.parametrize("text", ["[0-9]{2}", "a|b", "(a|b)/c", "\\d+\\.\\d", "[/]", "é{2}|\\n"])
def test_a_regex_is_what_it_says(text: str) -> None:
    samples = {"[0-9]{2}": "12", "a|b": "b", "(a|b)/c": "a/c", "\\d+\\.\\d": "3.1", "[/]": "/",
               "é{2}|\\n": "éé"}  # fmt: skip
    made = job(response_format={"type": "regex", "regex": text})
    assert takes(made, samples[text], tokens=True, thinks=False)
    assert not takes(made, samples[text] + "!", tokens=True, thinks=False)


@both
def test_required_takes_calls_of_the_tools_and_nothing_else(*, tokens: bool) -> None:
    made = job(tools=[TOOL, OTHER], tool_choice="required")
    second = '<tool_call>\n{"name": "g", "arguments": {"any": [1]}}\n</tool_call>'
    assert takes(made, CALL, tokens=tokens)
    assert takes(made, f"<think>hm</think>\n\n{CALL}\n{second}", tokens=tokens)
    assert not takes(made, "text", tokens=tokens)
    assert not takes(made, WRONG_CALL, tokens=tokens)
    assert not takes(made, CALL.replace('"f"', '"h"'), tokens=tokens)


@both
def test_a_named_function_is_called_once(*, tokens: bool) -> None:
    choice = {"type": "function", "function": {"name": "f"}}
    made = job(tools=[OTHER, TOOL], tool_choice=choice)
    assert takes(made, CALL, tokens=tokens)
    assert not takes(made, f"{CALL}\n{CALL}", tokens=tokens)
    assert not takes(made, CALL.replace('"f"', '"g"'), tokens=tokens)


@both
def test_strict_tools_leave_all_other_text_free(*, tokens: bool) -> None:
    made = job(tools=[STRICT])
    for text in ("", "any <text>", f"<think>x</think> a {CALL} b {CALL}", CALL, "<tool_ca"):
        assert takes(made, text, tokens=tokens), text
    assert not takes(made, f"a {WRONG_CALL}", tokens=tokens)
    assert not takes(made, "<tool_call>", tokens=tokens)


@both
def test_strict_tools_beside_a_form_take_either(*, tokens: bool) -> None:
    made = job(tools=[STRICT], response_format=schema(CITY))
    assert takes(made, '{"city": "Oslo"}', tokens=tokens)
    assert takes(made, CALL, tokens=tokens)
    assert not takes(made, "text", tokens=tokens)
    assert not takes(made, WRONG_CALL, tokens=tokens)


def test_references_of_a_tools_schema_lead_into_that_schema() -> None:
    parameters = {"$defs": {"c": {"const": "x"}}, "properties": {"a": {"$ref": "#/$defs/c"}},
                  "required": ["a"], "additionalProperties": False}  # fmt: skip
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    made = job(tools=[OTHER, tool], tool_choice="required")
    text = '<tool_call>\n{"name": "f", "arguments": {"a": "x"}}\n</tool_call>'
    assert takes(made, text, tokens=True)
    assert not takes(made, text.replace('"x"', '"y"'), tokens=True)


def test_blanks_between_the_parts_of_a_json_text_are_bounded() -> None:
    made = job(response_format={"type": "json_object"})
    assert takes(made, '{\n  "a": 1\n}', tokens=True, thinks=False)
    assert not takes(made, "{" + " " * 65 + "}", tokens=True, thinks=False)


def test_a_schema_may_not_change_the_compilers_options() -> None:
    lenient = {"x-guidance": {"lenient": True}, "type": "array", "uniqueItems": True}
    _, inner = tokenizer(tokens=True)
    found = grammar(job(response_format=schema(lenient)), model(), tokens=True, reasoning=False)
    assert "uniqueItems" in try_grammar(inner, found)


def test_a_tool_that_is_not_strict_may_have_a_schema_that_no_grammar_has() -> None:
    odd = {"properties": {"a": {"type": "array", "uniqueItems": True}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": odd}}]
    made = job(tools=tools, tool_choice="required")
    text = '<tool_call>\n{"name": "f", "arguments": {"a": [1]}}\n</tool_call>'
    assert takes(made, text, tokens=True)


@pytest.mark.parametrize(("field", "more"), [("tool_choice", {"tool_choice": "required"}),
                                             ("tools", {})])  # fmt: skip
def test_a_format_of_calls_that_can_not_be_enforced_is_refused(
    field: str, more: dict[str, Any]
) -> None:
    unknown = replace(model(), parser_name="new_format")
    with pytest.raises(InvalidJob, match=f"{field}: .*new_format.*can't be enforced"):
        grammar(job(tools=[STRICT], **more), unknown, tokens=True, reasoning=False)


def test_jobs_that_ask_for_nothing_have_no_grammar() -> None:
    for made in (job(), job(tools=[TOOL]), job(tools=[STRICT], tool_choice="none")):
        assert output_grammar(made, model(), lambda _: None, reasoning=False) is None


def test_errors_name_the_field_that_the_grammar_comes_from() -> None:
    def path(**fields: Any) -> str:
        spec = output_grammar(job(**fields), model(), lambda _: None, reasoning=False)
        assert spec is not None
        assert json.loads(spec.text)["grammars"]
        return spec.path

    assert path(response_format=schema({})) == "response_format.json_schema.schema"
    assert path(response_format={"type": "json_object"}) == "response_format"
    assert path(tools=[OTHER, STRICT]) == "tools"
    named = {"type": "function", "function": {"name": "f"}}
    assert path(tools=[OTHER, STRICT], tool_choice=named) == "tools[1].function.parameters"
