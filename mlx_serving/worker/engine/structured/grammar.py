"""Writes the grammar that a job asks for, in llguidance's format.

Rules are in llguidance's Lark dialect (docs/syntax.md of guidance-ai/llguidance). A marker that is
a token of its own is written by its id, any other by its characters. If the model reasons, the
grammar lets its reasoning come before the answer.
"""

import json
import re
from dataclasses import dataclass
from typing import Any, Final

from mlx_serving.common.errors import InvalidJob
from mlx_serving.common.job.messages import Tool
from mlx_serving.common.job.output_format import chosen_tools, enforces_tools, must_call
from mlx_serving.common.job.schema import GenerationJob
from mlx_serving.worker.engine.structured.tool_formats import ModelFormat
from mlx_serving.worker.engine.structured.tool_grammars.formats import CallFormat, call_format
from mlx_serving.worker.engine.structured.tool_grammars.schema import ToolSchema, json_text
from mlx_serving.worker.engine.structured.tool_grammars.spelling import (
    ANY_TEXT,
    Spelling,
    TokenOf,
    escaped,
)

_NO_FORCE: Final = "can't be enforced"
_GAP: Final = r"GAP: /[ \t\r\n]{0,8}/"


@dataclass(frozen=True, slots=True)
class GrammarSpec:
    """A grammar in llguidance's format, and the field of the job that asks for it."""

    text: str
    path: str


@dataclass(slots=True)
class _Rules:
    """Rules of a grammar; one of them is `answer`."""

    lines: list[str]
    path: str
    grammar: str = ""  # the job's own, as `@job`
    blank_before: bool = False  # whether blanks may come before the answer
    free: bool = False  # whether it is any text, reasoning included


def output_grammar(
    job: GenerationJob, model: ModelFormat, token_of: TokenOf, *, reasoning: bool
) -> GrammarSpec | None:
    """Return the grammar that the job asks for; None: any text is allowed.

    `reasoning`: the prompt ends inside the model's reasoning.

    Raises:
        InvalidJob: the job enforces tools, and this model's format of calls can't be enforced.
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
    """Writes rules with the markers of one model."""

    def __init__(self, model: ModelFormat, token_of: TokenOf) -> None:
        self._model, self._spelling = model, Spelling(token_of)

    def answer(self, job: GenerationJob) -> _Rules | None:
        """Return the rules of the answer, without reasoning; None: any text is allowed."""
        form = _formatted(job.response_format) if job.response_format else None
        if not enforces_tools(job.tools, job.tool_choice):
            return form
        calls = self._call_format(job)
        tools = chosen_tools(job.tools, job.tool_choice)
        path = _path_of(job, tools)
        if isinstance(job.tool_choice, dict):
            rules = self._calls(job, calls, tools, several=False)
            return _Rules(["answer: call", *rules], path, blank_before=True)
        rules = self._calls(job, calls, tools, several=True)
        several = "call (GAP call)*" if calls.between is None else "call"
        if must_call(job.tool_choice):
            return _Rules([f"answer: {several}", _GAP, *rules], path, blank_before=True)
        if form is None:
            return _Rules([*self._free_text(), *rules], path, free=True)
        form.lines = [line.replace("answer:", "formatted:", 1) for line in form.lines]
        form.lines += [f"answer: formatted | {several}", _GAP, *rules]
        return form

    def after_reasoning(self, rules: _Rules, *, opened: bool) -> list[str]:
        """Return the rules of a text with reasoning, then the answer."""
        start, end = self._model.think_start or "", self._model.think_end or ""
        thought, lines = self._spelling.text_up_to("thought", [ANY_TEXT], end)
        gap = "BLANKS" if rules.blank_before else ""
        first = f"{thought} {gap}" if opened else f"({self._literal(start)} {thought} {gap})?"
        return [f"start: {first} answer", r"BLANKS: /[ \t\r\n]{0,8}/", *lines]

    def _call_format(self, job: GenerationJob) -> CallFormat:
        """Return the format of this model's calls. Raises InvalidJob if it is not known."""
        found = call_format(self._model.parser_name, self._spelling)
        if found is not None:
            return found
        field = "tool_choice" if must_call(job.tool_choice) else "tools"
        raise InvalidJob([(field, f"this model's format of tool calls ({self._name}) {_NO_FORCE}")])

    def _calls(
        self, job: GenerationJob, form: CallFormat, tools: tuple[Tool, ...], *, several: bool
    ) -> list[str]:
        """Return the rules of one call, or of several that share their markers."""
        start, end = self._model.tool_start or "", self._model.tool_end or ""
        names = " | ".join(f"tool_{index}" for index in range(len(tools)))
        more = f"({form.between} any_tool)*" if several and form.between is not None else ""
        rules = [
            f"call: {self._literal(start)} rest_of_call",
            f"rest_of_call: {form.opening} any_tool {more} {form.closing} {self._literal(end)}",
            f"any_tool: {names}",
        ]
        for index, tool in enumerate(tools):
            schema = ToolSchema(tool, (job.tools or ()).index(tool), self._name)
            if not re.fullmatch(form.names, schema.name):
                raise schema.refusal(schema.name_path, "the function's name can't be written")
            rules += form.write(schema, f"tool_{index}", self._spelling, end)
        return rules

    def _free_text(self) -> list[str]:
        """Return the rules of any text with calls; only a call may hold a call's marker."""
        model = self._model
        start = model.tool_start or ""
        text = f"TEXT: /{ANY_TEXT}/ & ~/{ANY_TEXT}{escaped(start)}{ANY_TEXT}/"
        ends = not model.tool_end  # the text ends after its call or calls
        if not self._spelling.begins_with_token(start):
            # The call's first marker belongs to the text before it, which is matched up to there.
            lead, rules = self._spelling.text_up_to("lead", [ANY_TEXT], start)
            called = f"{lead} rest_of_call"
            return [
                f"answer: {called} | TEXT" if ends else f"answer: ({called})* TEXT",
                text,
                *rules,
            ]
        if ends:
            return ["answer: TEXT call?", text]
        thinking = [m for m in (model.think_start, model.think_end) if m and self._is_token(m)]
        others = " | ".join(["call", *map(self._literal, thinking)])
        return [f"answer: TEXT (({others}) TEXT)*", text]

    @property
    def _name(self) -> str:
        return self._model.parser_name or "none that mlx-lm knows"

    def _is_token(self, marker: str) -> bool:
        return self._spelling.begins_with_token(marker)

    def _literal(self, text: str) -> str:
        return self._spelling.literal(text)


def _formatted(form: dict[str, Any]) -> _Rules:
    """Return the rules of a response_format, which was checked before."""
    kind = form["type"]
    if kind == "grammar":
        return _Rules(["answer: @job"], "response_format.grammar", grammar=form["grammar"])
    if kind == "regex":
        from llguidance import regex_to_lark  # imported when the first job asks for a grammar

        return _Rules([f"answer: /{regex_to_lark(form['regex'], '')}/"], "response_format.regex")
    if kind == "json_object":
        return _Rules(
            [f"answer: {json_text({'type': 'object'})}"], "response_format", blank_before=True
        )
    path = "response_format.json_schema.schema"
    return _Rules([f"answer: {json_text(form['json_schema']['schema'])}"], path, blank_before=True)


def _path_of(job: GenerationJob, tools: tuple[Tool, ...]) -> str:
    if len(tools) > 1 or not job.tools:
        return "tools"
    return f"tools[{job.tools.index(tools[0])}].function.parameters"
