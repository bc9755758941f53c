"""A tool's parameters for formats that write them one by one: names, order, values."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from mlx_serving.common.errors import InvalidJob
from mlx_serving.common.job.messages import Tool

BLANKS: Final = r"[\x20\x0A\x0D\x09]{1,64}"
"""Blanks between the parts of a JSON text: bounded, so that a model can't indent forever."""

ANNOTATIONS: Final = frozenset(
    {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"}
    | {"$comment", "$schema", "$id"}
)
_DEFINITIONS: Final = ("$defs", "definitions")
_OBJECT_KEYWORDS: Final = ANNOTATIONS | {
    "type", "properties", "required", "additionalProperties", *_DEFINITIONS
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a tool; `path` is the path of its schema in the job."""

    name: str
    schema: Mapping[str, Any]
    required: bool
    path: str


@dataclass(frozen=True, slots=True)
class ToolSchema:
    """A tool, its index among the job's tools, and the name of the model's format of calls."""

    tool: Tool
    index: int
    format_name: str

    @property
    def path(self) -> str:
        """The path of its schema in the job."""
        return f"tools[{self.index}].function.parameters"

    @property
    def name_path(self) -> str:
        """The path of its function's name in the job."""
        return f"tools[{self.index}].function.name"

    @property
    def name(self) -> str:
        """The function's name."""
        return self.tool.function.name

    @property
    def strict(self) -> bool:
        """Whether every keyword of its schema must be enforced, or only those that can be."""
        return bool(self.tool.function.strict)

    @property
    def definitions(self) -> dict[str, Any]:
        """The definitions that its schema may refer to."""
        schema = self.tool.function.parameters or {}
        return {key: schema[key] for key in _DEFINITIONS if key in schema}

    def arguments(self) -> str:
        """Return the rule of all arguments as one JSON object."""
        schema = {"type": "object", **(self.tool.function.parameters or {})}
        return json_text(schema, lenient=not self.strict)

    def value(self, parameter: Parameter) -> str:
        """Return the rule of one argument as a JSON text."""
        return json_text({**parameter.schema, **self.definitions}, lenient=not self.strict)

    def parameters(self, names: str) -> list[Parameter]:
        """Return the parameters in the order of the schema.

        Raises:
            InvalidJob: the schema has other keywords, or a name doesn't match the regex `names`,
                so that the format can't write it.
        """
        schema: Any = self.tool.function.parameters or {}
        self.allow_keywords(schema, _OBJECT_KEYWORDS, self.path)
        properties, required = schema.get("properties") or {}, schema.get("required") or []
        if not isinstance(properties, dict) or not isinstance(required, list):
            raise InvalidJob([(self.path, "is no JSON schema of an object")])
        required = set(map(str, required))
        found = [
            Parameter(name, _object(properties.get(name)), name in required,
                      f"{self.path}.properties.{name[:64]}")
            for name in [*properties, *sorted(required - properties.keys())]
        ]  # fmt: skip
        for parameter in found:
            if not re.fullmatch(names, parameter.name):
                raise self.refusal(parameter.path, "the parameter's name can't be written")
        return found

    def allow_keywords(self, schema: Mapping[str, Any], known: Iterable[str], path: str) -> None:
        """Refuse other keywords than these of a strict tool; those of other tools are ignored."""
        odd = sorted(set(schema) - set(known))
        if odd and self.strict:
            raise self.refusal(f"{path}.{odd[0][:64]}", "can't be kept to")

    def text_length(self, schema: Mapping[str, Any], path: str) -> str:
        """Return a regex of the lengths, in characters, that a schema allows; "": any."""
        least, most = self.count(schema, "minLength", path), self.count(schema, "maxLength", path)
        if least is None and most is None:
            return ""
        return f"(?s:.{{{least or 0},{'' if most is None else most}}})"

    def count(self, schema: Mapping[str, Any], keyword: str, path: str) -> int | None:
        """Return a keyword's number of characters or items; None: it has no such keyword."""
        found = schema.get(keyword)
        if found is None or (type(found) is int and found >= 0):
            return found
        raise InvalidJob([(f"{path}.{keyword}", "is no whole number of at least 0")])

    def refusal(self, path: str, reason: str) -> InvalidJob:
        """Return the error; it names the place in the job and the model's format."""
        return InvalidJob(
            [(path, f"{reason} in this model's format of calls ({self.format_name})")]
        )


def json_text(schema: Mapping[str, Any], *, lenient: bool = False) -> str:
    """Return the rule of a JSON text by a schema; `lenient`: ignore what no grammar can express."""
    options = {"whitespace_pattern": BLANKS, "lenient": lenient}
    return f"%json {json.dumps({**schema, 'x-guidance': options})}"


def is_text(schema: Mapping[str, Any]) -> bool:
    """Whether the schema's type is string and nothing else."""
    return schema.get("type") == "string"


def _object(schema: object) -> Mapping[str, Any]:
    """Return a schema as an object: it may be `true`, or anything."""
    return schema if isinstance(schema, dict) else {}
