"""What a tool's parameters are to a format that writes them one by one: names, order, values."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from mlx_serving.common.errors import InvalidJob
from mlx_serving.common.job.messages import Tool

BLANKS: Final = r"[\x20\x0A\x0D\x09]{1,64}"
"""So much at most between the parts of a JSON text: a model that only indents would never end."""

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
    """One parameter of a tool. `path` is that of its schema in the job."""

    name: str
    schema: Mapping[str, Any]
    required: bool
    path: str


@dataclass(frozen=True, slots=True)
class ToolSchema:
    """A tool, its place among the job's, and what the model's format of calls is called."""

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
        """Whether its schema is kept to the letter, or as far as a grammar can."""
        return bool(self.tool.function.strict)

    @property
    def definitions(self) -> dict[str, Any]:
        """What references within its schema may lead to."""
        schema = self.tool.function.parameters or {}
        return {key: schema[key] for key in _DEFINITIONS if key in schema}

    def arguments(self) -> str:
        """All arguments as one JSON object."""
        schema = {"type": "object", **(self.tool.function.parameters or {})}
        return json_text(schema, lenient=not self.strict)

    def value(self, parameter: Parameter) -> str:
        """One argument as a JSON text."""
        return json_text({**parameter.schema, **self.definitions}, lenient=not self.strict)

    def parameters(self, names: str) -> list[Parameter]:
        """Its parameters in the order of its schema.

        Raises:
            InvalidJob: the schema says more than which parameters there are, or one's name doesn't
                match the regex `names`, so that the format has no way to write it.
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
        """Refuse what a strict tool's schema says beyond some keywords; else it is left out."""
        odd = sorted(set(schema) - set(known))
        if odd and self.strict:
            raise self.refusal(f"{path}.{odd[0][:64]}", "can't be kept to")

    def text_length(self, schema: Mapping[str, Any], path: str) -> str:
        """Regex of a text of the lengths that a schema allows, in characters; "": of any."""
        least, most = self.count(schema, "minLength", path), self.count(schema, "maxLength", path)
        if least is None and most is None:
            return ""
        return f"(?s:.{{{least or 0},{'' if most is None else most}}})"

    def count(self, schema: Mapping[str, Any], keyword: str, path: str) -> int | None:
        """A number of characters or items that a schema names; None where it doesn't."""
        found = schema.get(keyword)
        if found is None or (type(found) is int and found >= 0):
            return found
        raise InvalidJob([(f"{path}.{keyword}", "is no whole number of at least 0")])

    def refusal(self, path: str, reason: str) -> InvalidJob:
        """An error that names the place, and whose fault it is."""
        return InvalidJob(
            [(path, f"{reason} in this model's format of calls ({self.format_name})")]
        )


def json_text(schema: Mapping[str, Any], *, lenient: bool = False) -> str:
    """A JSON text by a schema. `lenient` ignores keywords that no grammar can express."""
    options = {"whitespace_pattern": BLANKS, "lenient": lenient}
    return f"%json {json.dumps({**schema, 'x-guidance': options})}"


def is_text(schema: Mapping[str, Any]) -> bool:
    """Whether it is a string by its type, and nothing else."""
    return schema.get("type") == "string"


def _object(schema: object) -> Mapping[str, Any]:
    """A schema that may be true, or anything, as an object."""
    return schema if isinstance(schema, dict) else {}
