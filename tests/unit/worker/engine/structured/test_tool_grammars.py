"""Forced calls in every format that mlx-lm reads: whatever the grammar lets through is a call."""

from __future__ import annotations

import json
import re
from functools import cache
from importlib import import_module
from random import Random
from typing import TYPE_CHECKING, Any, Final

import jsonschema
import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from mlx_serving.common.errors import InvalidJob
from mlx_serving.common.job.schema import GenerationJob
from mlx_serving.worker.engine.structured.grammar import output_grammar
from mlx_serving.worker.engine.structured.grammar_trial import compile_grammar, try_grammar
from mlx_serving.worker.engine.structured.tool_formats import ModelFormat, RequestFormat
from mlx_serving.worker.engine.structured.tool_grammars.spelling import _MARKER
from tests.support.paths import ROOT

if TYPE_CHECKING:
    from mlx_serving.worker.engine.interface import Parts

SAMPLES: Final[dict[str, str]] = json.loads(
    (ROOT / "tests" / "fixtures" / "tool_calls.json").read_text()
)
STEPS: Final = 4000  # bytes; a call of these tools has some hundred
HOSTILE: Final = (
    "null", "Null", "none", "3", "true", " a", '"x"', "[1]", "{", "}", ",", "\n", "]]>", "<",
    "</parameter>", "</arg_value>", "</tool_call>", "<escape>", '<|"|>', "&lt;", "\\", "'",
)  # fmt: skip
SCALARS: Final[dict[str, Any]] = {
    "city": {"type": "string", "maxLength": 12},
    "unit": {"type": "string", "enum": ["c", "f", "no unit"]},
    "days": {"type": "integer", "minimum": 0, "maximum": 99},
    "share": {"type": "number", "minimum": 0, "maximum": 1},
    "exact": {"type": "boolean"},
}
NESTED: Final[dict[str, Any]] = {
    "tags": {"type": "array", "items": {"type": "integer"}, "maxItems": 3},
    "place": {
        "type": "object",
        "properties": {"x": {"type": "integer"}, "name": {"type": "string", "maxLength": 3}},
        "required": ["x"],
        "additionalProperties": False,
    },
}
SECTIONS: Final = ("mistral", "kimi_k2", "kimi_k3", "minimax_m2", "muse_spark", "pythonic")
FLAT: Final = ("function_gemma",)  # formats whose values are no arrays and no objects


def tool(name: str, properties: dict[str, Any], required: tuple[str, ...] = (), **more: Any) -> Any:
    parameters = {"type": "object", "properties": properties, "required": list(required),
                  "additionalProperties": False}  # fmt: skip
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


WEATHER: Final = tool(
    "get_weather", {"city": {"type": "string"}, "days": {"type": "integer"}}, ("city",)
)


def tools_of(name: str, **more: Any) -> list[Any]:
    values = SCALARS if name in FLAT else {**SCALARS, **NESTED}
    return [
        tool("all_of_them", values, tuple(values), **more),
        tool("any_of_them", values, **more),
        tool("nothing", {}, **more),
    ]


def model(name: str) -> ModelFormat:
    module = import_module(f"mlx_lm.tool_parsers.{name}")
    start, end = module.tool_call_start, module.tool_call_end
    edges = {"normal": ((start, "tool"),), "tool": ((end, "normal"),) if end else ()}
    return ModelFormat(None, None, start, end, name, module.parse_tool_call, edges, None)


@cache
def tokenizer(name: str, *, tokens: bool) -> tuple[Tokenizer, LLTokenizer]:
    """Bytes, and all markers of a format as tokens of their own or not."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    form = model(name)
    whole = f"{form.tool_start}{SAMPLES[name]}{form.tool_end}"
    markers = sorted(set(_MARKER.findall(whole))) if tokens else []
    made.add_tokens([AddedToken(marker, special=True) for marker in [*markers, "<|end|>"]])
    return made, LLTokenizer(made.to_str(), eos_token=[len(alphabet) + len(markers)])


def start(name: str, job: GenerationJob, *, tokens: bool, trial: bool = False) -> LLMatcher:
    encoder, inner = tokenizer(name, tokens=tokens)

    def token_of(marker: str) -> int | None:
        return encoder.token_to_id(marker) if tokens else None

    spec = output_grammar(job, model(name), token_of, reasoning=False)
    assert spec is not None
    matcher, reason = compile_grammar(inner, spec.text)
    assert reason == ""
    if trial:
        assert try_grammar(inner, spec.text) == ""
    return matcher


def job(tools: list[Any], choice: Any = "required") -> GenerationJob:
    return GenerationJob.build(
        model="m", messages=[{"role": "user", "content": "x"}], tools=tools, tool_choice=choice
    )


def read(name: str, text: str, tools: list[Any]) -> Parts:
    parser = RequestFormat(model(name), "normal", tuple(tools)).open("job:1", 0)
    return parser.push(text) + parser.finish(whole=True)


def walk(matcher: LLMatcher, encoder: Tokenizer, chance: Random) -> str:
    """A text that the grammar takes: by chance, and with a bias to what is hard to read back."""
    end = encoder.get_vocab_size() - 1
    ids: list[int] = []
    for _ in range(STEPS):
        if matcher.is_stopped():
            break
        if chance.random() < 0.2:
            wanted = encoder.encode(chance.choice(HOSTILE)).ids
            wanted = wanted[: matcher.validate_tokens(wanted)]
            assert matcher.consume_tokens(wanted)
            ids += wanted
            if matcher.is_stopped():
                break
        mask = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        allowed = np.flatnonzero(np.unpackbits(mask, bitorder="little"))
        if end in allowed and (len(allowed) == 1 or chance.random() < 0.5):
            break
        token = int(chance.choice([one for one in allowed if one != end]))
        assert matcher.consume_token(token)
        ids.append(token)
    assert matcher.is_accepting(), encoder.decode(ids, skip_special_tokens=False)
    return encoder.decode(ids, skip_special_tokens=False)


def valid(name: str, text: str, tools: list[Any]) -> list[str]:
    """Read a text as calls of the tools, check each; returns their names."""
    parts = read(name, text, tools)
    assert parts.tool_calls, text
    assert parts.text.strip() == "", text
    for call in parts.tool_calls:
        (found,) = [one for one in tools if one["function"]["name"] == call.name]
        jsonschema.validate(json.loads(call.arguments), found["function"]["parameters"])
    return [call.name for call in parts.tool_calls]


forms = pytest.mark.parametrize("name", SAMPLES)
both = pytest.mark.parametrize("tokens", [True, False], ids=["tokens", "spelled"])


@forms
@both
def test_what_the_models_own_template_writes_is_taken(name: str, *, tokens: bool) -> None:
    matcher = start(name, job([WEATHER]), tokens=tokens)
    encoder, _ = tokenizer(name, tokens=tokens)
    sample = SAMPLES[name]
    if name == "kimi_k3":  # it has two forms; the one with a JSON object takes any schema
        arguments = (
            '<|open|>json type="object"<|sep|>{"city": "Paris", "days": 3}<|close|>json<|sep|>'
        )
        head, _, _ = sample.partition("<|open|>argument")
        sample = f"{head}{arguments}<|close|>call<|sep|><|close|>tools<|sep|>"
    assert valid(name, sample, [WEATHER]) == ["get_weather"]
    assert matcher.consume_tokens(encoder.encode(sample).ids)
    assert matcher.is_accepting()


@forms
@both
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "lenient"])
def test_whatever_is_forced_is_read_back_as_calls_by_their_schemas(
    name: str, *, tokens: bool, strict: bool
) -> None:
    tools = tools_of(name, strict=strict)
    first = start(name, job(tools), tokens=tokens, trial=True)
    encoder, _ = tokenizer(name, tokens=tokens)
    for seed in range(4):
        text = walk(first.deep_copy(), encoder, Random(seed))
        valid(name, text, tools)


@forms
@both
def test_a_named_function_is_called_once(name: str, *, tokens: bool) -> None:
    tools = tools_of(name)
    for chosen in ("any_of_them", "nothing"):
        choice = {"type": "function", "function": {"name": chosen}}
        matcher = start(name, job(tools, choice), tokens=tokens)
        text = walk(matcher, tokenizer(name, tokens=tokens)[0], Random(3))
        assert valid(name, text, tools) == [chosen]


@forms
@both
def test_several_calls_are_read_one_by_one(name: str, *, tokens: bool) -> None:
    tools = [tool("nothing", {}), tool("less", {})]
    matcher = start(name, job(tools), tokens=tokens)
    encoder, _ = tokenizer(name, tokens=tokens)
    counts = {
        len(valid(name, walk(matcher.deep_copy(), encoder, Random(seed)), tools))
        for seed in range(8)
    }
    assert max(counts) > 1


@forms
@both
def test_strict_tools_leave_all_other_text_free(name: str, *, tokens: bool) -> None:
    strict = [tool("f", {"days": {"type": "integer"}}, ("days",), strict=True)]
    matcher = start(name, job(strict, "auto"), tokens=tokens)
    encoder, _ = tokenizer(name, tokens=tokens)
    for text in ("", "any text", "3 < 4 > [1]"):
        free = matcher.deep_copy()
        assert free.consume_tokens(encoder.encode(text).ids), text
        assert free.is_accepting(), text
    call = walk(start(name, job(strict), tokens=tokens), encoder, Random(1))
    assert read(name, f"so {call}", strict).text.startswith("so ")
    if name in SECTIONS and len(read(name, call, strict).tool_calls) > 1:
        return
    assert matcher.consume_tokens(encoder.encode(f"so {call}").ids), call
    assert matcher.is_accepting()


def strict_job(name: str, properties: dict[str, Any], function: str = "f") -> None:
    start(name, job([tool(function, properties, strict=True)]), tokens=True)


@pytest.mark.parametrize(
    ("name", "properties", "place"),
    [
        ("qwen3_coder", {"a": {"type": "string", "pattern": "x"}}, "properties.a.pattern"),
        ("qwen3_coder", {"a": {"type": "string", "enum": ["x", "null"]}}, "properties.a"),
        ("qwen3_coder", {"a": {"type": ["string", "integer"]}}, "properties.a"),
        ("minimax_m2", {"a": {}}, "properties.a"),
        ("glm47", {"a b": {"type": "string"}}, "properties.a b"),
        ("glm47", {"a": {"type": "string", "enum": [" x"]}}, "properties.a"),
        ("pythonic", {"class": {"type": "string"}}, "properties.class"),
        ("gemma4", {"a": {"type": "object"}}, "properties.a"),
        ("gemma4", {"a": {"type": "string", "format": "date"}}, "properties.a.format"),
        ("function_gemma", {"a": {"type": "array"}}, "properties.a"),
        ("glm47", {"a": {"type": "string", "maxLength": "}) | (x"}}, "properties.a.maxLength"),
        ("gemma4", {"a": {"type": "array", "minItems": -1}}, "properties.a.minItems"),
    ],
)
def test_what_a_format_has_no_way_to_write_is_refused_by_its_path(
    name: str, properties: dict[str, Any], place: str
) -> None:
    path = re.escape(f"tools[0].function.parameters.{place}")
    with pytest.raises(InvalidJob, match=rf"^{path}: "):
        strict_job(name, properties)


@pytest.mark.parametrize("name", ["pythonic", "function_gemma", "gemma4", "mistral"])
def test_a_functions_name_that_the_format_can_not_write_is_refused(name: str) -> None:
    function = "get.weather" if name != "pythonic" else "get-weather"
    if name == "mistral":  # only its newer form, which has a token for it
        function, name = "get.weather", "mistral"
        form = model(name)
        with pytest.raises(InvalidJob, match=r"tools\[0\]\.function\.name: "):
            output_grammar(job([tool(function, {})]), form, lambda _: 7, reasoning=False)
        return
    with pytest.raises(InvalidJob, match=r"tools\[0\]\.function\.name: "):
        strict_job(name, {}, function)


@pytest.mark.parametrize("name", ["minimax_m2", "minicpm5"])
def test_a_value_that_may_be_null_is_a_text_or_null(name: str) -> None:
    nullable = {"anyOf": [{"type": "string"}, {"type": "null"}]}
    tools = [tool("f", {"a": nullable}, ("a",), strict=True)]
    matcher = start(name, job(tools), tokens=False)
    encoder, _ = tokenizer(name, tokens=False)
    sample = walk(matcher.deep_copy(), encoder, Random(0))
    assert valid(name, sample, tools)
    head, _, tail = (
        SAMPLES[name].replace("get_weather", "f").replace('"city"', '"a"').partition("Paris")
    )
    closing = tail.partition(
        '<param name="days"' if name == "minicpm5" else '<parameter name="days"'
    )[0]
    rest = "</function>" if name == "minicpm5" else "</invoke>\n</minimax:tool_call>"
    for value, taken in (("null", True), ("no", True), ("NIL", False), ("None", False)):
        text = f"{head}{value}{closing}{rest}"
        copy = matcher.deep_copy()
        ids = encoder.encode(text).ids
        assert (copy.validate_tokens(ids) == len(ids)) is taken, text


def test_gemmas_schemas_may_refer_to_themselves() -> None:
    parameters = {
        "type": "object",
        "properties": {"tree": {"$ref": "#/$defs/node"}},
        "required": ["tree"],
        "$defs": {"node": {"type": "object", "properties": {
            "value": {"enum": ["x", 3, None]},
            "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}}}},
    }  # fmt: skip
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    matcher = start("gemma4", job(tools), tokens=True)
    encoder, _ = tokenizer("gemma4", tokens=True)
    for seed in range(5):
        assert valid("gemma4", walk(matcher.deep_copy(), encoder, Random(seed)), tools)
