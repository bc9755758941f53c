"""The options of a bulk file, checked."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec

from mlx_serving.common import limits
from mlx_serving.common.errors import FieldError, InvalidBatch
from mlx_serving.common.validation import tenant_problems

if TYPE_CHECKING:
    from collections.abc import Iterator

MODEL_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")
UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}

Order = Literal["prefix", "file"]


class BatchOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Options of one bulk file.

    Args:
        model: for lines that name none.
        model_map: from models' names in the file to our aliases.
        max_tokens: for lines that set none; None means the job's own default.
        temperature: for lines that set none; None means the job's own default.
        raw: a plain prompt goes to the model as it is, not as a chat message.
        order: `prefix` groups lines by model and shared prefix, `file` keeps the file's order.
        completion_window: "24h", "90m", "2d": lines that have not finished by then expire.
        strict: a single bad line fails the batch before anything runs.
        depth: lines of a model to keep waiting in its queue.
        in_flight: most lines of a model in Redis at once, waiting, running or uncollected.
        result_ttl: seconds that Redis keeps a result that nobody collects.
        tenant: the tenant of the jobs, whose limits and share apply to them.
        metadata: up to 16 short texts that the batch object carries.

    """

    model: str | None = None
    model_map: dict[str, str] = {}
    max_tokens: int | None = None
    temperature: float | None = None
    raw: bool = False
    order: Order = "prefix"
    completion_window: str = "24h"
    strict: bool = False
    depth: int = 512
    in_flight: int = 8192
    result_ttl: int = 86_400
    tenant: str | None = None
    metadata: dict[str, str] | None = None

    @property
    def window_seconds(self) -> int:
        """The completion window."""
        return seconds_of(self.completion_window) or 0

    @classmethod
    def build(cls, **fields: Any) -> BatchOptions:
        """Build from keywords.

        Raises:
            InvalidBatch: names each option that is wrong.

        """
        try:
            options = msgspec.convert(fields, cls, strict=True)
        except msgspec.ValidationError as error:
            raise InvalidBatch(str(error)) from None
        unknown = sorted(set(fields) - set(cls.__struct_fields__))
        errors = [FieldError(name, "is not a known option") for name in unknown]
        errors += _problems(options)
        if errors:
            raise InvalidBatch(errors)
        return options


def seconds_of(window: str) -> int | None:
    """`90m` as seconds; None if it is not written like that."""
    match = re.fullmatch(r"(\d{1,9})([smhd])", window)
    return int(match[1]) * UNITS[match[2]] if match else None


def _problems(options: BatchOptions) -> Iterator[FieldError]:
    window = seconds_of(options.completion_window)
    if window is None or not 1 <= window <= limits.SECONDS:
        yield FieldError(
            "completion_window", 'give a time as "24h", "90m" or "2d", at most 30 days'
        )
    names = {"model": options.model, **{f"model_map.{k}": v for k, v in options.model_map.items()}}
    for path, name in names.items():
        if name is not None and not MODEL_NAME.fullmatch(name):
            yield FieldError(path, f"{name!r} is not a valid model name")
    bounds = {
        "max_tokens": (1, limits.TOKENS), "temperature": (0, 2), "depth": (1, 100_000),
        "in_flight": (1, 1_000_000), "result_ttl": (1, limits.SECONDS),
    }  # fmt: skip
    for name, (least, most) in bounds.items():
        value = getattr(options, name)
        if value is not None and not least <= value <= most:
            yield FieldError(name, f"must be from {least} to {most}")
    yield from tenant_problems(options.tenant)
    if len(options.metadata or {}) > limits.METADATA_ITEMS:
        yield FieldError("metadata", f"has more than {limits.METADATA_ITEMS} items")
