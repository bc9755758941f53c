"""From what a job asks of its output to one grammar, in llguidance's own form.

Rules are in its Lark dialect (docs/syntax.md of guidance-ai/llguidance). A marker that is a token
of its own is named by its id; any other is spelled. Where a model reasons, its reasoning comes
before what the grammar is for.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from mlx_serving.common.errors import InvalidJob
from mlx_serving.common.jobs import GenerationJob
from mlx_serving.common.messages import Tool
from mlx_serving.common.output_formats import chosen_tools, enforces_tools, must_call
from mlx_serving.worker.engine.tool_formats import ModelFormat

JSON_CALLS: Final = "json_tools"
"""mlx-lm's name of the one format of calls that can be enforced: a JSON object between markers."""

_BLANKS: Final = r"[\x20\x0A\x0D\x09]{1,64}"
"""So much at most between the parts of a JSON text: a model that only indents would never end."""
_ANY_TEXT: Final = "/(?s:.*)/"
_GAP: Final = r"GAP: /[ \t\r\n]{0,8}/"

TokenOf = Callable[[str], int | None]
"""From a marker to its token's id, where it is a token that no text spells."""


@dataclass(frozen=True, slots=True)
class GrammarSpec:
    """A grammar as llguidance takes it, and the job's field that it comes from."""

    text: str
    path: str


@dataclass(slots=True)
class _Rules:
    """Rules of the grammar, the `answer` among them."""

    lines: list[str]
    path: str
    grammar: str = ""  # the job's own, as `@job`
    blank_before: bool = False  # whether the answer may follow some blanks
    free: bool = False  # whether it is free text, reasoning included


def output_grammar(
    job: GenerationJob, model: ModelFormat, token_of: TokenOf, *, reasoning: bool
) -> GrammarSpec | None:
    """Return the grammar that the job asks for; None where any text will do.

    `reasoning`: the prompt ends within the model's reasoning.

    Raises:
        InvalidJob: tools are to be enforced, and can't be in this model's format of calls.
    """
    writer = _Writer(model, token_of)
    rules = writer.answer(job)
    if rules is None:
        return None
    thinks = job.messages is not None and model.think_end is not None and not rules.free
    lines = writer.after_reasoning(rules, opened=reasoning) if thinks else ["start: answer"]
    grammars = [{"lark_grammar": "\n".join([*lines, *rules.lines])}]
    if rules.grammar:
        grammars.append({"name": "job", "lark_grammar": rules.grammar})
    return GrammarSpec(json.dumps({"grammars": grammars}), rules.path)


class _Writer:
    """Writes rules in the words of one model's markers."""

    def __init__(self, model: ModelFormat, token_of: TokenOf) -> None:
        self._model, self._token_of = model, token_of

    def answer(self, job: GenerationJob) -> _Rules | None:
        """Rules of what the job asks for, reasoning aside."""
        form = _formatted(job.response_format) if job.response_format else None
        if not enforces_tools(job):
            return form
        self._require_json_calls(job)
        tools = chosen_tools(job)
        calls = self._calls(tools)
        path = _path_of(job, tools)
        if isinstance(job.tool_choice, dict):
            return _Rules(["answer: call", *calls], path, blank_before=True)
        several = "call (GAP call)*"
        if must_call(job):
            return _Rules([f"answer: {several}", _GAP, *calls], path, blank_before=True)
        if form is None:
            return _Rules([*self._free_text(), *calls], path, free=True)
        form.lines = [line.replace("answer:", "formatted:", 1) for line in form.lines]
        form.lines += [f"answer: formatted | {several}", _GAP, *calls]
        return form

    def after_reasoning(self, rules: _Rules, *, opened: bool) -> list[str]:
        """Rules for the model's reasoning, and then the answer."""
        start, end = self._model.think_start or "", self._model.think_end or ""
        token = self._token_of(end)
        if token is None:
            thought = [f"thought[lazy]: /(?s:.*){_escaped(end)}/"]
        else:
            thought = [f"thought: /(?s:.*)/ <[{token}]>"]
        gap = "BLANKS" if rules.blank_before else ""
        first = f"thought {gap}" if opened else f"({self._marker(start)} thought {gap})?"
        return [f"start: {first} answer", r"BLANKS: /[ \t\r\n]{0,8}/", *thought]

    def _require_json_calls(self, job: GenerationJob) -> None:
        if self._model.parser_name == JSON_CALLS:
            return
        name = self._model.parser_name or "none that mlx-lm knows"
        field = "tool_choice" if must_call(job) else "tools"
        reason = f"this model's format of tool calls ({name}) can't be enforced"
        raise InvalidJob([(field, reason)])

    def _calls(self, tools: tuple[Tool, ...]) -> list[str]:
        """Rules of a call: as Qwen's and Hermes' templates write them."""
        start, end = self._model.tool_start or "", self._model.tool_end or ""
        names = " | ".join(f"tool_{index}" for index in range(len(tools)))
        rules = [
            f"call: {self._marker(start)} rest_of_call",
            f'rest_of_call: "\\n" ({names}) "\\n" {self._marker(end)}',
        ]
        for index, tool in enumerate(tools):
            head = json.dumps(f'{{"name": {json.dumps(tool.function.name)}, "arguments": ')
            rules.append(f'tool_{index}: {head} {_arguments(tool)} "}}"')
        return rules

    def _free_text(self) -> list[str]:
        """Rules of any text with calls in it, which the call's marker begins and nothing else."""
        model = self._model
        start = model.tool_start or ""
        text = f"TEXT: {_ANY_TEXT} & ~/(?s:.*){_escaped(start)}(?s:.*)/"
        if self._token_of(start) is None:
            # A call's first marker is a part of the text before it, matched up to there.
            lead = f"lead[lazy]: /(?s:.*){_escaped(start)}/"
            return ["answer: (lead rest_of_call)* TEXT", text, lead]
        thinking = [m for m in (model.think_start, model.think_end) if m and self._token_of(m)]
        others = " | ".join(["call", *map(self._marker, thinking)])
        return [f"answer: TEXT (({others}) TEXT)*", text]

    def _marker(self, marker: str) -> str:
        token = self._token_of(marker)
        return json.dumps(marker) if token is None else f"<[{token}]>"


def _formatted(form: dict[str, Any]) -> _Rules:
    """Rules of a response_format, which is checked already."""
    kind = form["type"]
    if kind == "grammar":
        return _Rules(["answer: @job"], "response_format.grammar", grammar=form["grammar"])
    if kind == "regex":
        from llguidance import regex_to_lark  # not before somebody asks for a grammar

        return _Rules([f"answer: /{regex_to_lark(form['regex'], '')}/"], "response_format.regex")
    if kind == "json_object":
        return _Rules(
            [f"answer: {_json({'type': 'object'})}"], "response_format", blank_before=True
        )
    path = "response_format.json_schema.schema"
    return _Rules([f"answer: {_json(form['json_schema']['schema'])}"], path, blank_before=True)


def _arguments(tool: Tool) -> str:
    """A tool's arguments: an object by its schema, to the letter where the tool is strict."""
    schema = {"type": "object", **(tool.function.parameters or {})}
    return _json(schema, lenient=not tool.function.strict)


def _json(schema: dict[str, Any], *, lenient: bool = False) -> str:
    """A JSON text by a schema. `lenient` ignores keywords that no grammar can express."""
    options = {"whitespace_pattern": _BLANKS, "lenient": lenient}
    return f"%json {json.dumps({**schema, 'x-guidance': options})}"


def _path_of(job: GenerationJob, tools: tuple[Tool, ...]) -> str:
    if len(tools) > 1 or not job.tools:
        return "tools"
    return f"tools[{job.tools.index(tools[0])}].function.parameters"


def _escaped(text: str) -> str:
    """Text for the inside of a /regex/."""
    return re.escape(text).replace("/", "\\/")
