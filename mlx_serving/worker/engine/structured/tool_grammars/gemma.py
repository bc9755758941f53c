"""Gemma's formats: `call:name{key:value,…}`, with a delimiter of their own around strings.

Values are not JSON, so the rules of every schema are written here. A value that mlx-lm's parser
can't read back is refused.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from mlx_serving.worker.engine.structured.tool_grammars.schema import (
    ANNOTATIONS,
    ToolSchema,
    json_text,
)
from mlx_serving.worker.engine.structured.tool_grammars.spelling import (
    ANY_TEXT,
    Spelling,
    escaped,
    listed,
)

_SCALARS: Final = ("integer", "number", "boolean", "null")
_KEYWORDS: Final[dict[str, frozenset[str]]] = {
    "string": frozenset({"minLength", "maxLength"}),
    "integer": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}),
    "number": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}),
    "boolean": frozenset(),
    "null": frozenset(),
    "array": frozenset({"items", "minItems", "maxItems"}),
    "object": frozenset({"properties", "required", "additionalProperties"}),
}


@dataclass(frozen=True, slots=True)
class GemmaFormat:
    """How calls are written: `quote` is the delimiter of strings.

    `nested`: whether a value may be an array or an object. `without`: texts that no string may
    hold.
    """

    quote: str
    nested: bool
    without: tuple[str, ...] = ()

    def rules(self, tool: ToolSchema, name: str, spelling: Spelling, end: str) -> list[str]:
        """Write the rule `name` of a call of a tool, and the rules that it uses.

        `end` is the marker that ends the call.

        Raises:
            InvalidJob: a part of the tool's schema can't be written.
        """
        writer = _GemmaWriter(self, tool, name, spelling, end)
        parameters = tool.parameters(r"\w+")
        items = [
            (writer.member(parameter.name, parameter.schema, parameter.path), parameter.required)
            for parameter in parameters
        ]
        inside, more = listed(name, items, '","')
        head = spelling.literal(f"call:{tool.name}{{")
        return [f'{name}: {head} {inside} "}}"', *more, *writer.lines]


class _GemmaWriter:
    """Writes the values of one tool's parameters."""

    def __init__(
        self, form: GemmaFormat, tool: ToolSchema, name: str, spelling: Spelling, end: str
    ) -> None:
        self._form, self._tool, self._name, self._spelling = form, tool, name, spelling
        self._without = (*form.without, *([end] if end else []))
        self._references: dict[str, str] = {}
        self.lines: list[str] = []
        self._count = 0

    def member(self, key: str, schema: Mapping[str, Any], path: str) -> str:
        """Return the rule of `key:value`."""
        name = self._new_name()
        self.lines.append(f"{name}: {json.dumps(f'{key}:')} ({self._value(schema, path)})")
        return name

    def _value(self, schema: Any, path: str) -> str:  # noqa: ANN401 -- a schema may be anything
        if not isinstance(schema, dict):
            schema = {}
        if "$ref" in schema:
            return self._reference(schema["$ref"], path)
        for union in ("anyOf", "oneOf"):
            if isinstance(schema.get(union), list):
                self._tool.allow_keywords(schema, {union, *ANNOTATIONS}, path)
                return " | ".join(self._value(each, path) for each in schema[union])
        if "enum" in schema or "const" in schema:
            choices = schema.get("enum", [schema.get("const")])
            return " | ".join(self._spelling.literal(self._choice(c, path)) for c in choices)
        kinds = schema.get("type", ["string", *_SCALARS])
        kinds = kinds if isinstance(kinds, list) else [kinds]
        known = {"type", *ANNOTATIONS}.union(*(_KEYWORDS.get(kind, ()) for kind in kinds))
        self._tool.allow_keywords(schema, known, path)
        return " | ".join(self._of_type(kind, schema, path) for kind in kinds)

    def _of_type(self, kind: str, schema: dict[str, Any], path: str) -> str:
        if kind == "string":
            return self._text(schema, path)
        if kind in _SCALARS:
            kept = {key: schema[key] for key in _KEYWORDS[kind] if key in schema}
            return json_text({"type": kind, **kept}, lenient=not self._tool.strict)
        if not self._form.nested:
            raise self._tool.refusal(path, f"a value of type {kind} can't be written")
        return self._array(schema, path) if kind == "array" else self._object(schema, path)

    def _text(self, schema: dict[str, Any], path: str) -> str:
        body = self._tool.text_length(schema, path) or ANY_TEXT
        never = [f"{ANY_TEXT}{escaped(text)}{ANY_TEXT}" for text in self._without]
        # mlx-lm's parser uses this character itself.
        never.append(f"{ANY_TEXT}\\x00{ANY_TEXT}")
        text, rules = self._spelling.text_up_to(
            self._new_name(), [body], self._form.quote, never=never
        )
        self.lines += rules
        return f"{self._spelling.literal(self._form.quote)} {text}"

    def _array(self, schema: dict[str, Any], path: str) -> str:
        item, pair = self._new_name(), self._new_name()
        self.lines.append(f"{item}: {self._value(schema.get('items'), f'{path}.items')}")
        self.lines.append(f'{pair}: "," {item}')
        least = self._tool.count(schema, "minItems", path) or 0
        most = self._tool.count(schema, "maxItems", path)
        if most == 0:
            return '"[]"'
        more = f"{pair}{{{max(least - 1, 0)},{'' if most is None else most - 1}}}"
        some = f'"[" {item} {more} "]"'
        return some if least else f'"[]" | {some}'

    def _object(self, schema: dict[str, Any], path: str) -> str:
        properties = schema.get("properties")
        if not isinstance(properties, dict) or not all(_is_word(key) for key in properties):
            raise self._tool.refusal(path, "an object without named properties can't be written")
        required = schema.get("required") or ()
        items = [
            (self.member(key, part, f"{path}.properties.{key[:64]}"), key in required)
            for key, part in properties.items()
        ]
        inside, more = listed(self._new_name(), items, '","')
        self.lines += more
        return f'"{{" {inside} "}}"'

    def _reference(self, reference: object, path: str) -> str:
        """Return the rule of a referenced schema, written once: a schema may refer to itself."""
        if not isinstance(reference, str) or not reference.startswith("#/"):
            raise self._tool.refusal(path, "such a reference can't be followed")
        if reference not in self._references:
            self._references[reference] = name = self._new_name()
            target: Any = self._tool.tool.function.parameters
            for step in reference[2:].split("/"):
                target = target.get(step) if isinstance(target, dict) else None
            self.lines.append(f"{name}: {self._value(target, path)}")
        return self._references[reference]

    def _choice(self, choice: object, path: str) -> str:
        """Return one value of an enum as text."""
        if isinstance(choice, str):
            if any(text in choice for text in (*self._without, self._form.quote, "\0")):
                raise self._tool.refusal(path, f"{choice[:64]!r} can't be written")
            return f"{self._form.quote}{choice}{self._form.quote}"
        if isinstance(choice, (list, dict)):
            if not self._form.nested:
                raise self._tool.refusal(path, "such a choice can't be written")
            if isinstance(choice, list):
                return f"[{','.join(self._choice(each, path) for each in choice)}]"
            if all(_is_word(key) for key in choice):
                inside = (f"{key}:{self._choice(value, path)}" for key, value in choice.items())
                return f"{{{','.join(inside)}}}"
            raise self._tool.refusal(path, "such a choice can't be written")
        return json.dumps(choice)

    def _new_name(self) -> str:
        self._count += 1
        return f"{self._name}_v{self._count}"


def _is_word(key: str) -> bool:
    return key.replace("_", "a").isalnum()


GEMMA4: Final = GemmaFormat('<|"|>', nested=True)
FUNCTION_GEMMA: Final = GemmaFormat("<escape>", nested=False, without=("}",))
