"""JSON schemas: a hundred different ones, with enums, formats, recursion and unions."""

from __future__ import annotations

import json
from random import Random
from typing import Any

Schema = dict[str, Any]

FORMATS = ("date", "time", "date-time", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
PATTERNS = ("^[a-z]{2,6}$", "^[A-Z]{3}-[0-9]{2,4}$", "^(yes|no|maybe)$", "^x+y?$", "[0-9]")
WORDS = ("name", "age", "city", "tags", "id", "kind", "items", "value", "left", "right", "é", "a b")


def obj(properties: Schema, required: list[str] | None = None, **more: Any) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties) if required is None else required,
        "additionalProperties": False,
        **more,
    }


def schema(value: Any) -> Schema:
    """The `response_format` that asks for this schema."""
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}


PERSON = obj(
    {
        "name": {"type": "string", "minLength": 4, "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "mood": {"enum": ["🙂", "é", "so-so"]},
    }
)
_TREE = obj(
    {
        "value": {"type": "integer", "minimum": 0, "maximum": 9},
        "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 1},
    }
)
_LIST = {"anyOf": [{"type": "null"}, obj({"head": {"type": "boolean"}, "tail": {"$ref": "#"}})]}
_EXPRESSION = {
    "$ref": "#/$defs/expression",
    "$defs": {
        "expression": {"anyOf": [{"$ref": "#/$defs/number"}, {"$ref": "#/$defs/sum"}]},
        "number": {"type": "integer", "minimum": -9, "maximum": 9},
        "sum": obj({"op": {"enum": ["+", "-"]}, "left": {"$ref": "#/$defs/number"},
                    "right": {"$ref": "#/$defs/expression"}}),
    },
}  # fmt: skip
_SHAPES = {
    "oneOf": [
        obj({"kind": {"const": "circle"}, "radius": {"type": "number", "minimum": 0}}),
        obj({"kind": {"const": "square"}, "side": {"type": "integer", "maximum": 99}}),
        obj({"kind": {"const": "text"}, "text": {"type": "string", "maxLength": 5}}),
    ]
}

BY_HAND: list[Schema] = [
    {"$ref": "#/$defs/node", "$defs": {"node": _TREE}},
    _LIST,
    _EXPRESSION,
    _SHAPES,
    {"const": {"a": [1, None, "x"]}},
    {"enum": [1, "one", None, True, [1], {"one": 1}]},
    {"type": ["string", "integer", "null"], "maxLength": 4},
    {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "boolean"}], "items": False},
    {"type": "object", "patternProperties": {"^n_[a-z]{1,3}$": {"type": "integer"}},
     "additionalProperties": False, "maxProperties": 2},
    {"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 2},
    {"allOf": [{"type": "integer", "minimum": 10}, {"maximum": 20}]},
    {"allOf": [obj({"a": {"type": "null"}}, additionalProperties=True),
               {"type": "object", "properties": {"b": {"type": "null"}}, "required": ["b"]}],
     "maxProperties": 2},
    {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 1000},
    {"type": "number", "exclusiveMinimum": -1.5, "exclusiveMaximum": 1.5},
    {"type": "string", "minLength": 3, "maxLength": 3},
    {"type": "array", "items": {"type": "string", "maxLength": 2}, "minItems": 2, "maxItems": 4},
    {"definitions": {"s": {"enum": ["s"]}}, "$ref": "#/definitions/s"},
    {"type": "boolean", "title": "A title", "description": "Not a rule", "default": True},
]  # fmt: skip


def schemas(count: int = 100, seed: int = 5) -> list[Schema]:
    """Return so many, no two alike; any finished text of theirs is short."""
    chance = Random(seed)
    found = {json.dumps(schema): schema for schema in BY_HAND}
    while len(found) < count:
        schema = _object(chance, depth=chance.randint(1, 3))
        found[json.dumps(schema)] = schema
    return list(found.values())


def _object(chance: Random, depth: int) -> Schema:
    names = chance.sample(WORDS, chance.randint(1, 3))
    properties = {name: _any(chance, depth - 1) for name in names}
    required = [name for name in names if chance.random() < 0.7]
    return obj(properties, required)


def _any(chance: Random, depth: int) -> Schema:
    if depth > 0 and chance.random() < 0.6:
        return chance.choice((_object, _array, _union))(chance, depth)
    return chance.choice((_string, _number, _fixed))(chance)


def _array(chance: Random, depth: int) -> Schema:
    least = chance.randint(0, 2)
    return {
        "type": "array",
        "items": _any(chance, depth - 1),
        "minItems": least,
        "maxItems": least + chance.randint(0, 1),
    }


def _union(chance: Random, depth: int) -> Schema:
    return {"anyOf": [_any(chance, depth - 1), _fixed(chance), {"type": "null"}]}


def _string(chance: Random) -> Schema:
    kind = chance.randrange(3)
    if kind == 0:
        return {"type": "string", "format": chance.choice(FORMATS)}
    if kind == 1:
        return {"type": "string", "pattern": chance.choice(PATTERNS), "maxLength": 12}
    least = chance.randint(0, 3)
    return {"type": "string", "minLength": least, "maxLength": least + chance.randint(0, 6)}


def _number(chance: Random) -> Schema:
    low = chance.randint(-500, 500)
    high = low + chance.randint(0, 1000)
    if chance.random() < 0.5:
        return {"type": "integer", "minimum": low, "maximum": high}
    return {"type": "number", "minimum": low, "exclusiveMaximum": high + 1}


def _fixed(chance: Random) -> Schema:
    values: list[Any] = ["red", "green", 3, -1, None, True, {"k": 0}, ["v"]]
    if chance.random() < 0.3:
        return {"const": chance.choice(values)}
    return {"enum": chance.sample(values, chance.randint(1, 4))}
