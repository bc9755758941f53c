"""Formats that write each parameter of a call between tags, as XML does.

A string is written as it is, without quotes; any other value as JSON. The grammar leaves out texts
that the format's parser in mlx-lm would misread: a text that holds a closing tag, one that is read
as null, blanks that are stripped.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from os.path import commonpath
from typing import Any, Final

from mlx_serving.worker.engine.structured.tool_grammars.schema import (
    ANNOTATIONS,
    Parameter,
    ToolSchema,
    is_text,
    json_text,
)
from mlx_serving.worker.engine.structured.tool_grammars.spelling import ANY_TEXT, Spelling, escaped

_TEXT_KEYWORDS: Final = ANNOTATIONS | {"type", "enum", "const", "minLength", "maxLength"}
_JSON_TYPES: Final = frozenset({"integer", "number", "boolean", "object", "array"})
_NAMES: Final = r"""[^\s<>"'&={}]{1,128}"""
_EDGE_CHAR: Final = r"[!-~\u{a1}-\u{167f}\u{3001}-\u{10ffff}]"  # never stripped; few ranges
_STRIPPED: Final = f"({_EDGE_CHAR}((?s:.*){_EDGE_CHAR})?)?"
_SHARED_CHARS: Final = 5  # as in "</atem:"; "</" alone begins other tags too
_NULL: Final = "(?i:null)"
_BREAK: Final = "␤"  # in a tag: an optional line break; versions of a model differ in it


@dataclass(frozen=True, slots=True)
class TagFormat:
    """How calls are written; `{}` stands for the name of the function or of the parameter."""

    head: str
    before: str
    closing: str
    gap: str = ""
    """After each parameter."""
    tail: str = ""
    edge: str = ""
    """On both sides of a value."""
    without: tuple[str, ...] = ()
    """Texts that no string may hold, beside the closing tag."""
    typed: bool = False
    """The parser converts a value to the schema's type, of which there must be exactly one."""
    strips: bool = False
    """The parser strips blanks from both ends of a string."""
    null: str = ""
    """Regex of strings that the parser reads as null or as another value."""
    nullable_null: str = ""
    """The same if the schema allows null; empty: no schema may allow it."""
    plain: str = ANY_TEXT
    """Regex of strings that may be written as they are."""
    wrapped: tuple[str, str] | None = None
    """Texts before and after a string, which may be written between these instead."""
    quoted: bool = False
    """A string may be written as a JSON string instead."""
    empty: str = ""
    """A call without arguments, if the parser can't read it by the tags alone."""

    def rules(self, tool: ToolSchema, name: str, spelling: Spelling, end: str) -> list[str]:
        """Write the rule `name` of a call of a tool, and the rules that it uses.

        `end` is the marker that ends the call.

        Raises:
            InvalidJob: a part of the tool's schema can't be written.
        """
        form = replace(self, without=(*self.without, *([end] if end else [])))
        return _TagWriter(form, tool, name, spelling).rules()


class _TagWriter:
    """Writes one tool's rules."""

    def __init__(self, form: TagFormat, tool: ToolSchema, name: str, spelling: Spelling) -> None:
        self._form, self._tool, self._name, self._spelling = form, tool, name, spelling
        self._lines: list[str] = []

    def rules(self) -> list[str]:
        form, parameters = self._form, self._tool.parameters(_NAMES)
        names = [self._parameter(n, parameter) for n, parameter in enumerate(parameters)]
        head, tail = self._literal(form.head.format(self._tool.name)), self._literal(form.tail)
        if form.empty and not any(parameter.required for parameter in parameters):
            # No parameter at all, or one as the first and any after it.
            calls = [self._literal(form.empty.format(self._tool.name))]
            for n, first in enumerate(names):
                calls.append(" ".join([head, first, *(f"({p})?" for p in names[n + 1 :]), tail]))
            body = " | ".join(calls)
        else:
            optional = [
                rule if parameter.required else f"({rule})?"
                for parameter, rule in zip(parameters, names, strict=True)
            ]
            body = " ".join([head, *optional, tail])
        return [f"{self._name}: {body}", *self._lines]

    def _parameter(self, number: int, parameter: Parameter) -> str:
        """Return the name of the rule of a parameter with its tags."""
        form, name = self._form, f"{self._name}_p{number}"
        opening = self._literal(form.before.format(parameter.name) + form.edge)
        values = " | ".join(self._values(f"{name}_text", parameter))
        self._lines.append(f"{name}: {opening} ({values}) {self._literal(form.gap)}")
        return name

    def _values(self, name: str, parameter: Parameter) -> list[str]:
        """Return the right sides of rules for a parameter's value and its closing tag."""
        form, schema = self._form, parameter.schema
        inner = _without_null(schema) if form.nullable_null else None
        null = form.null
        found = []
        if inner is not None:
            schema, null = inner, form.nullable_null
            found.append(self._literal(f"null{form.edge}{form.closing}"))
        if form.typed and _texts_only(schema):
            schema = {"type": "string", **schema}
        if is_text(schema):
            self._tool.allow_keywords(schema, _TEXT_KEYWORDS, parameter.path)
            return found + self._text(name, replace(parameter, schema=schema), null)
        if form.typed and str(schema.get("type")) not in _JSON_TYPES:
            raise self._tool.refusal(parameter.path, "only a parameter of one type can be forced")
        value = self._tool.value(replace(parameter, schema=schema))
        return [*found, f"{value} {self._literal(form.edge + form.closing)}"]

    def _text(self, name: str, parameter: Parameter, null: str) -> list[str]:
        form, schema = self._form, parameter.schema
        if "enum" in schema or "const" in schema:
            choices = schema.get("enum", [schema.get("const")])
            return [self._choice(parameter, choice, null) for choice in choices]
        length = self._tool.text_length(schema, parameter.path)
        kept = _STRIPPED if form.strips and schema.get("minLength") else ""
        found = [self._up_to(name, [form.plain, length, kept], form.edge, form.closing, null)]
        if form.wrapped is not None:
            opening, closing = form.wrapped
            inner = self._up_to(f"{name}_w", [length or ANY_TEXT], "", closing, null)
            found.append(f"{self._literal(opening)} {inner} {self._literal(form.closing)}")
        if form.quoted:
            text = json_text(schema, lenient=not self._tool.strict)
            found.append(f"{text} {self._literal(form.closing)}")
        return found

    def _up_to(self, name: str, bodies: Sequence[str], edge: str, closing: str, null: str) -> str:
        """Return the rule of a free text up to its end: the closing tag, or the wrapper's end."""
        form, tail = self._form, escaped(edge)
        blanks = r"\s*" if form.strips and closing == form.closing else ""
        never = [f"{blanks}{null}{blanks}{tail}"] if null else []
        held = "|".join(map(escaped, _needles(form, closing)))
        if held:
            never.append(f"{ANY_TEXT}({held}){ANY_TEXT}{tail}")
        found, rules = self._spelling.text_up_to(
            name, [f"{body}{tail}" for body in bodies if body], closing, never=never
        )
        self._lines += rules
        return found

    def _choice(self, parameter: Parameter, choice: object, null: str) -> str:
        """Return one string of an enum, written so that the parser reads this string."""
        form = self._form
        if not isinstance(choice, str):
            raise self._tool.refusal(parameter.path, "a string's enum holds what is no string")
        safe = not any(text in choice for text in (*form.without, form.closing))
        is_null = bool(null) and re.fullmatch(null, choice) is not None
        kept = choice == choice.strip() or not form.strips
        if safe and kept and not is_null and re.fullmatch(form.plain, choice):
            return self._literal(f"{choice}{form.edge}{form.closing}")
        if form.quoted:
            return self._literal(f"{json.dumps(choice, ensure_ascii=False)}{form.closing}")
        if form.wrapped is not None and safe and not is_null and form.wrapped[1] not in choice:
            opening, closing = form.wrapped
            return self._literal(f"{opening}{choice}{closing}{form.closing}")
        raise self._tool.refusal(parameter.path, f"{choice[:64]!r} can't be written")

    def _literal(self, text: str) -> str:
        """Return a text as a right side; its optional line breaks stay optional."""
        return ' "\\n"? '.join(map(self._spelling.literal, text.split(_BREAK)))


def _needles(form: TagFormat, closing: str) -> list[str]:
    """Return texts that a string up to a closing tag must not hold.

    There are few and short ones, so that masks cost little: if all tags of a format begin alike,
    no string may hold that beginning.
    """
    tags = [*form.without, form.closing]
    shared = commonpath(tags)
    if len(shared) >= _SHARED_CHARS:
        return [shared]
    return [tag for tag in tags if tag != closing]


def _without_null(schema: Any) -> dict[str, Any] | None:  # noqa: ANN401 -- as above
    """Return a nullable schema without null; None if it is not nullable, or is another union."""
    kinds, options = schema.get("type"), schema.get("anyOf")
    if isinstance(kinds, list) and len(kinds) == 2 and "null" in kinds:  # noqa: PLR2004 -- and one more
        (kind,) = [kind for kind in kinds if kind != "null"]
        inner = {**schema, "type": kind}
        if isinstance(inner.get("enum"), list):
            inner["enum"] = [choice for choice in inner["enum"] if choice is not None]
        return inner
    if isinstance(options, list) and len(options) == 2 and {"type": "null"} in options:  # noqa: PLR2004 -- same
        (inner,) = [option for option in options if option != {"type": "null"}] or [{}]
        rest = {key: value for key, value in schema.items() if key != "anyOf"}
        return {**rest, **inner} if isinstance(inner, dict) else None
    return None


def _texts_only(schema: Any) -> bool:  # noqa: ANN401 -- as above
    """Whether a schema has no type and an enum of strings."""
    choices = schema.get("enum")
    return (
        "type" not in schema
        and isinstance(choices, list)
        and bool(choices)
        and all(isinstance(choice, str) for choice in choices)
    )


_XML_NAME: Final = 'name="{}">'
QWEN3_CODER: Final = TagFormat(
    "<function={}>\n", "<parameter={}>", "</parameter>", gap="\n", tail="</function>\n",
    edge="\n", typed=True, null=_NULL,
)  # fmt: skip
GLM: Final = TagFormat(
    f"{{}}{_BREAK}", f"<arg_key>{{}}</arg_key>{_BREAK}<arg_value>", "</arg_value>", gap=_BREAK,
    strips=True,
)  # fmt: skip
LONGCAT: Final = TagFormat(
    f"{{}}{_BREAK}",
    f"<longcat_arg_key>{{}}</longcat_arg_key>{_BREAK}<longcat_arg_value>",
    "</longcat_arg_value>", gap=_BREAK, strips=True,
    empty='{{"name": "{}", "arguments": {{}}}}',
)  # fmt: skip
MINIMAX: Final = TagFormat(
    f"<invoke {_XML_NAME}\n", f"<parameter {_XML_NAME}", "</parameter>", gap="\n",
    tail="</invoke>\n", without=("</invoke>",), typed=True, strips=True, null=_NULL,
    nullable_null="(?i:null|none|nil)",
)  # fmt: skip
MINICPM: Final = TagFormat(
    '"{}">', f"<param {_XML_NAME}", "</param>", typed=True, strips=True, null=_NULL,
    nullable_null="(?i:null|none|nil)", plain="[^<]*", wrapped=("<![CDATA[", "]]>"),
)  # fmt: skip
MUSE_SPARK: Final = TagFormat(
    f"<atem:invoke {_XML_NAME}\n", f"<atem:parameter {_XML_NAME}", "</atem:parameter>",
    gap="\n", tail="</atem:invoke>\n", without=("</atem:invoke>",), strips=True, quoted=True,
    # A string that may be JSON is read as JSON.
    plain=r'([^\s"\x7b\[0-9\-](?s:.*))?', null="(true|false|null|NaN|Infinity)",
)  # fmt: skip
