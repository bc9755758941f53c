"""Checks of untrusted data, and their field errors, for jobs and settings alike."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import chain
from math import inf, isfinite
from typing import TYPE_CHECKING, Any, Final

from pydantic import BaseModel
from pydantic_core import PydanticCustomError

from mlx_serving.common import limits
from mlx_serving.common.errors import FieldError
from mlx_serving.common.job.messages import TAG_PARTS, TAG_TEXT

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pydantic import ValidationError

RULES: Final = "job_rules"
"""Type of the pydantic error that carries our own list of field errors."""


TOO_LARGE: Final = "makes the job larger than {limit} bytes"

_NO_FIELDS: Final = frozenset({TAG_TEXT, TAG_PARTS, "[key]"})
"""What pydantic puts into locations besides the names of fields."""

_ATOMS: Final = frozenset({int, bool, type(None)})
_MOST_ERRORS: Final = 20
_KEY_CHARS: Final = 64
_PLAIN: Final = {
    "extra_forbidden": "is not a known field",
    "missing": "is required",
}


def check_data(data: object) -> None:
    """Refuse nesting, size, numbers and text that no field may have, before fields are read."""
    if _size((data,), 1) <= limits.PAYLOAD_BYTES:
        return
    errors = list(scan(data))
    if errors:
        raise rules_error(errors)


def is_modest(text: bytes) -> bool:
    """Whether JSON text is so small that `check_data` can find nothing wrong with its content.

    Each value takes at least one byte of the text, each byte of a string one more, and each level
    of nesting a bracket. Numbers that are not finite and lone surrogates are errors to msgspec.
    """
    brackets = text.count(b"{") + text.count(b"[")
    return len(text) <= limits.PAYLOAD_BYTES and brackets <= limits.JSON_DEPTH


def _size(values: Iterable[object], depth: int) -> float:
    """Size of plain data as `scan` counts it; infinite if only `scan` can judge the data.

    It builds no paths, so it takes a quarter of the time of `scan` for valid data, which is
    nearly all. It goes no deeper than `scan` does.
    """
    size = 0.0
    for value in values:
        size += 1
        kind = type(value)
        if kind is str:
            size += _length(value)  # type: ignore[arg-type]
        elif kind is dict or kind is list:
            if depth > limits.JSON_DEPTH:
                return inf
            size += _size(_inside(value), depth + 1)
        elif kind is float:
            size += 0 if isfinite(value) else inf  # type: ignore[arg-type]
        elif kind not in _ATOMS:
            return inf
        if size == inf:
            return inf
    return size


def _inside(value: object) -> Iterable[object]:
    """Keys and values of an object, or the items of a list."""
    return chain(value, value.values()) if isinstance(value, dict) else value  # type: ignore[return-value]


def _length(text: str) -> float:
    length = len(text) if text.isascii() else _utf8_length(text)
    return inf if length < 0 else length


def rules_error(errors: list[FieldError]) -> PydanticCustomError:
    """Wrap field errors so that they pass through pydantic whole."""
    context = {"problems": "; ".join(map(str, errors)), "errors": [list(e) for e in errors]}
    return PydanticCustomError(RULES, "{problems}", context)


def scan(data: object, *, max_bytes: int = limits.PAYLOAD_BYTES) -> Iterator[FieldError]:
    """Walk plain data without recursion; stop at the first value that is too deep or too large."""
    stack: list[tuple[str, object, int]] = [("", data, 1)]
    size = 0
    while stack:
        path, value, depth = stack.pop()
        size += 1
        if isinstance(value, str):
            size += (length := _utf8_length(value))
            if length < 0:
                yield FieldError(path, "holds a lone surrogate, which is not valid Unicode")
        elif isinstance(value, float) and not isfinite(value):
            yield FieldError(path, "must be a finite number")
        elif isinstance(value, (Mapping, list, tuple, BaseModel)):
            if depth > limits.JSON_DEPTH:
                yield FieldError(path, f"is nested deeper than {limits.JSON_DEPTH}")
                return
            stack.extend((*item, depth + 1) for item in _items(path, value))
        if size > max_bytes:
            yield FieldError(path, TOO_LARGE.format(limit=max_bytes))
            return


def _items(path: str, value: object) -> Iterator[tuple[str, object]]:
    """Children with their paths; a key counts as text too, under the path of its object."""
    if isinstance(value, BaseModel):
        value = value.__dict__
    if isinstance(value, Mapping):
        for key, child in value.items():
            yield path, key
            yield _join(path, key), child
    elif isinstance(value, (list, tuple)):
        for index, child in enumerate(value):
            yield f"{path}[{index}]", child


def _join(path: str, key: object) -> str:
    """Path of a key; a key may be any text, so a long one is cut."""
    name = str(key)[:_KEY_CHARS]
    return f"{path}.{name}" if path else name


def _utf8_length(text: str) -> int:
    """Bytes of a string; -1 if it has no UTF-8 form."""
    if text.isascii():
        return len(text)
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        return -1


def pydantic_errors(error: ValidationError) -> list[FieldError]:
    """Field errors from pydantic's, at most 20 of them."""
    details = error.errors(include_url=False, include_input=False)
    # pydantic also calls a list "too short" if its items are wrong: that says nothing new.
    wrong = {detail["loc"][:n] for detail in details for n in range(len(detail["loc"]))}
    errors: list[FieldError] = []
    for detail in details:
        if detail["type"] == RULES:
            errors += (FieldError(*pair) for pair in detail["ctx"]["errors"])
        elif detail["type"] != "too_short" or detail["loc"] not in wrong:
            reason = _PLAIN.get(detail["type"], detail["msg"].removeprefix("Value error, "))
            errors.append(FieldError(field_path(detail["loc"]), reason))
    more = len(errors) - _MOST_ERRORS
    return errors if more <= 0 else [*errors[:_MOST_ERRORS], FieldError("", f"and {more} more")]


def field_path(loc: Iterable[Any]) -> str:
    """`("messages", 2, "content")` as `messages[2].content`."""
    path = ""
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part not in _NO_FIELDS:
            path = _join(path, part)
    return path


def tenant_problems(tenant: str | None) -> Iterator[FieldError]:
    """Check a tenant's name; None means no tenant."""
    if tenant is not None and not re.fullmatch(limits.LABEL, tenant):
        yield FieldError("tenant", "must be 1 to 128 printable characters without blanks")
