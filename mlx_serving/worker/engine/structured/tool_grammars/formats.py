"""The formats of calls that can be enforced, by the names of mlx-lm's parsers."""

import json
import keyword
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

from mlx_serving.worker.engine.structured.tool_grammars import gemma, parameters
from mlx_serving.worker.engine.structured.tool_grammars.schema import ToolSchema
from mlx_serving.worker.engine.structured.tool_grammars.spelling import Spelling, listed

WriteTool = Callable[[ToolSchema, str, Spelling, str], list[str]]
"""Writes the rule of a tool's call; takes tool, rule name, spelling, and the calls' end marker."""

_WORD: Final = r"\w+"
_DASHED: Final = r"[\w-]+"
_DOTTED: Final = r"[A-Za-z_](?:\w|\.(?=[A-Za-z_]))*"
_ANY_NAME: Final = r"[\w.-]+"


@dataclass(frozen=True, slots=True)
class CallFormat:
    """How calls are written between the model's markers; texts are right sides of rules.

    `between`: the separator of calls that share their markers; None: each call has its own
    markers. `names`: regex of the function names that the parser can read.
    """

    write: WriteTool
    opening: str = ""
    between: str | None = None
    closing: str = ""
    names: str = _ANY_NAME


def call_format(name: str | None, spelling: Spelling) -> CallFormat | None:
    """Return the format of one of mlx-lm's parsers; None if its calls can't be enforced."""
    if name == "mistral" and spelling.begins_with_token("[ARGS]"):
        return replace(_MISTRAL_ARGS, between=spelling.literal("[TOOL_CALLS]"))
    return _FORMATS.get(name or "")


def _json_call(tool: ToolSchema, name: str, spelling: Spelling, end: str) -> list[str]:
    del spelling, end
    head = json.dumps(f'{{"name": {json.dumps(tool.name)}, "arguments": ')
    return [f'{name}: {head} {tool.arguments()} "}}"']


def _between(before: str, after: str) -> WriteTool:
    """Write calls whose arguments are a JSON object between two texts.

    In `before`, `{}` stands for the function's name and `#` for a number.
    """

    def write(tool: ToolSchema, name: str, spelling: Spelling, end: str) -> list[str]:
        del end
        parts = [spelling.literal(part) for part in before.format(tool.name).split("#")]
        head = " /[0-9]{1,4}/ ".join(parts)  # a number that the model chooses
        return [f"{name}: {head} {tool.arguments()} {spelling.literal(after)}"]

    return write


def _pythonic(tool: ToolSchema, name: str, spelling: Spelling, end: str) -> list[str]:
    """Write `name(key=value, …)`: JSON texts as llguidance writes them are Python literals too."""
    del spelling, end
    if any(keyword.iskeyword(part) for part in tool.name.split(".")):
        raise tool.refusal(tool.name_path, "the function's name can't be written")
    found = tool.parameters(r"[A-Za-z_]\w*")
    for parameter in found:
        if keyword.iskeyword(parameter.name):
            raise tool.refusal(parameter.path, "the parameter's name can't be written")
    keywords = [f"{json.dumps(f'{p.name}=')} {tool.value(p)}" for p in found]
    rules = [f"{name}_p{n}: {rule}" for n, rule in enumerate(keywords)]
    optional = [(f"{name}_p{n}", p.required) for n, p in enumerate(found)]
    inside, more = listed(name, optional, '", "')
    return [f'{name}: "{tool.name}(" {inside} ")"', *rules, *more]


_FORMATS: Final[Mapping[str, CallFormat]] = MappingProxyType(
    {
        "json_tools": CallFormat(_json_call, opening='"\\n"', closing='"\\n"'),
        "mistral": CallFormat(_json_call, '" "? "["', '", "', '"]"'),
        "kimi_k2": CallFormat(
            _between(
                "<|tool_call_begin|>functions.{}:#<|tool_call_argument_begin|>",
                "<|tool_call_end|>",
            ),
            between="",
        ),
        "kimi_k3": CallFormat(
            _between(
                '<|open|>call tool="{}" index="#"<|sep|><|open|>json type="object"<|sep|>',
                "<|close|>json<|sep|><|close|>call<|sep|>",
            ),
            between="",
        ),
        "qwen3_coder": CallFormat(parameters.QWEN3_CODER.rules, opening='"\\n"'),
        "glm47": CallFormat(parameters.GLM.rules),
        "laguna": CallFormat(parameters.GLM.rules),
        "longcat": CallFormat(parameters.LONGCAT.rules),
        "minimax_m2": CallFormat(parameters.MINIMAX.rules, opening='"\\n"', between=""),
        "muse_spark": CallFormat(parameters.MUSE_SPARK.rules, opening='"\\n"', between=""),
        "minicpm5": CallFormat(parameters.MINICPM.rules),
        "pythonic": CallFormat(_pythonic, '"["', '", "', '"]"', names=_DOTTED),
        "gemma4": CallFormat(gemma.GEMMA4.rules, names=_DASHED),
        "function_gemma": CallFormat(gemma.FUNCTION_GEMMA.rules, names=_WORD),
    }
)
_MISTRAL_ARGS: Final = CallFormat(_between("{}[ARGS]", ""), names=_DASHED)
