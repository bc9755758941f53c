"""Checks of what a job asks of its output's form: `response_format`, `tool_choice`, strict tools.

This module checks what needs no grammar library. The worker has one and refuses the rest, with
the code `invalid_schema` and the same paths.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote

from mlx_serving.common import limits
from mlx_serving.common.errors import FieldError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mlx_serving.common.job.messages import Tool

TEXT: Final = {"type": "text"}

_FIELDS: Final[dict[str, tuple[str, ...]]] = {
    "text": (),
    "json_object": (),
    "json_schema": ("json_schema",),
    "regex": ("regex",),
    "grammar": ("grammar",),
}
_SCHEMA_FIELDS: Final = ("name", "description", "schema", "strict")
_MOST_CHARS: Final = {"regex": limits.REGEX_CHARS, "grammar": limits.GRAMMAR_CHARS}
_DATA_KEYWORDS: Final = frozenset({"const", "default", "enum", "examples"})


def chosen_tools(tools: Sequence[Tool] | None, tool_choice: object) -> tuple[Tool, ...]:
    """Tools that the model may call; none if `tool_choice` is "none"."""
    if not tools or tool_choice == "none":
        return ()
    if not isinstance(tool_choice, dict):
        return tuple(tools)
    return tuple(tool for tool in tools if tool.function.name == _named(tool_choice))


def must_call(tool_choice: object) -> bool:
    """Whether the model has to call a tool: the choice is "required", or names a function."""
    return tool_choice == "required" or isinstance(tool_choice, dict)


def enforces_tools(tools: Sequence[Tool] | None, tool_choice: object) -> bool:
    """Whether a grammar constrains the model to its tools."""
    if must_call(tool_choice):
        return True
    return any(tool.function.strict for tool in chosen_tools(tools, tool_choice))


def format_errors(
    response_format: dict[str, Any] | None, tools: Sequence[Tool] | None, tool_choice: object
) -> Iterator[FieldError]:
    """Check the form of output that a job asks for, field by field."""
    if response_format is not None:
        yield from _response_format(response_format)
    yield from _tool_choice(tool_choice, tools or (), formatted=response_format is not None)
    for index, tool in enumerate(tools or ()):
        if tool.function.strict or must_call(tool_choice):
            path = f"tools[{index}].function.parameters"
            yield from _schema(path, tool.function.parameters or {})


def _response_format(form: dict[str, Any]) -> Iterator[FieldError]:
    kind = form.get("type")
    if not isinstance(kind, str) or kind not in _FIELDS:
        yield FieldError("response_format.type", f"must be one of {', '.join(_FIELDS)}")
        return
    yield from _unknown("response_format", form, ("type", *_FIELDS[kind]))
    if kind == "json_schema":
        yield from _json_schema(form.get("json_schema"))
    elif kind in _MOST_CHARS:
        yield from _grammar_text(kind, form.get(kind))


def _unknown(path: str, form: dict[str, Any], known: tuple[str, ...]) -> Iterator[FieldError]:
    for key in form:
        if key not in known:
            yield FieldError(f"{path}.{key[:64]}", "is not a known field")


def _grammar_text(kind: str, text: object) -> Iterator[FieldError]:
    path, most = f"response_format.{kind}", _MOST_CHARS[kind]
    if not isinstance(text, str) or not text:
        yield FieldError(path, "must be a text that is not empty")
    elif len(text) > most:
        yield FieldError(path, f"is longer than {most} characters")


def _json_schema(wrapper: object) -> Iterator[FieldError]:
    path = "response_format.json_schema"
    if not isinstance(wrapper, dict):
        yield FieldError(path, "must be an object with name and schema")
        return
    yield from _unknown(path, wrapper, _SCHEMA_FIELDS)
    name, description = wrapper.get("name"), wrapper.get("description")
    if not isinstance(name, str) or not 0 < len(name) <= limits.SCHEMA_NAME_CHARS:
        most = limits.SCHEMA_NAME_CHARS
        yield FieldError(f"{path}.name", f"must be a text of 1 to {most} characters")
    if description is not None and not isinstance(description, str):
        yield FieldError(f"{path}.description", "must be a text")
    if not isinstance(wrapper.get("strict"), bool | None):
        yield FieldError(f"{path}.strict", "must be true or false; the schema is kept either way")
    yield from _schema(f"{path}.schema", wrapper.get("schema"))


def _schema(path: str, schema: object) -> Iterator[FieldError]:
    if not isinstance(schema, dict):
        yield FieldError(path, "must be a JSON schema, an object")
    elif len(json.dumps(schema)) > limits.SCHEMA_BYTES:
        yield FieldError(path, f"is larger than {limits.SCHEMA_BYTES} bytes as JSON")
    else:
        yield from _references(path, schema)


def _references(path: str, schema: dict[str, Any]) -> Iterator[FieldError]:
    """References are never fetched, so each has to point into the schema itself."""
    stack: list[tuple[str, Any]] = [(path, schema)]
    while stack:
        place, part = stack.pop()
        if isinstance(part, list):
            stack.extend((f"{place}[{index}]", child) for index, child in enumerate(part))
        elif isinstance(part, dict):
            reference = part.get("$ref")
            if isinstance(reference, str) and not _resolves(schema, reference):
                reason = "points to nothing in this schema, and references are never fetched"
                yield FieldError(f"{place}.$ref", reason)
            stack.extend(
                (f"{place}.{key[:64]}", child)
                for key, child in part.items()
                if key not in _DATA_KEYWORDS
            )


def _resolves(schema: dict[str, Any], reference: str) -> bool:
    if not reference.startswith("#"):
        return False
    if not reference.startswith("#/"):
        return True  # the schema itself, or an anchor, which the worker looks up
    at: Any = schema
    for step in unquote(reference[2:]).split("/"):
        key = step.replace("~1", "/").replace("~0", "~")
        if isinstance(at, dict) and key in at:
            at = at[key]
        elif isinstance(at, list) and key.isdecimal() and int(key) < len(at):
            at = at[int(key)]
        else:
            return False
    return True


def _tool_choice(choice: object, tools: Sequence[Tool], *, formatted: bool) -> Iterator[FieldError]:
    if choice is None or choice in ("auto", "none"):
        return
    if must_call(choice):
        yield from _forced_choice(choice, tools)
        if formatted:
            yield FieldError("response_format", "a forced tool call leaves no text to format")
    else:
        reason = "must be 'auto', 'none', 'required', or an object that names a function"
        yield FieldError("tool_choice", reason)


def _forced_choice(choice: object, tools: Sequence[Tool]) -> Iterator[FieldError]:
    names = [tool.function.name for tool in tools]
    if not names:
        yield FieldError("tool_choice", "needs tools to choose from")
    elif isinstance(choice, dict):
        name = _named(choice)
        if name is None:
            reason = 'must be {"type": "function", "function": {"name": ...}}'
            yield FieldError("tool_choice", reason)
        elif name not in names:
            yield FieldError("tool_choice.function.name", "is not one of the tools")


def _named(choice: dict[str, Any]) -> str | None:
    function = choice.get("function")
    if choice.keys() != {"type", "function"} or choice["type"] != "function":
        return None
    if not isinstance(function, dict) or function.keys() != {"name"}:
        return None
    name = function["name"]
    return name if isinstance(name, str) else None
