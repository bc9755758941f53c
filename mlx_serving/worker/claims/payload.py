"""Reads a job out of what Redis holds, trusting nothing of it."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any, Final

import msgspec

from mlx_serving.common.errors import CorruptJob, ForeignFunction, PayloadTooLarge
from mlx_serving.common.job.schema import JOB_FUNCTION, GenerationJob
from mlx_serving.common.validation import is_modest

if TYPE_CHECKING:
    from collections.abc import Callable

_PARTS: Final = 4  # RQ's form: [function, instance, arguments, keyword arguments]


def inflate(data: bytes, limit: int) -> bytes:
    """Decompress at most `limit` bytes, so that a bomb costs no more than that.

    Raises:
        PayloadTooLarge: there is more.
        CorruptJob: it is not zlib.

    """
    stream = zlib.decompressobj()
    try:
        raw = stream.decompress(data, limit + 1)
    except zlib.error:
        message = "data: the job's payload is not zlib-compressed"
        raise CorruptJob(message) from None
    if len(raw) > limit:
        reason = f"the job's payload is over {limit} bytes when decompressed"
        raise PayloadTooLarge([("data", reason)])
    return raw


def read_job(
    data: bytes, *, limit: int, check: Callable[[bytes], None] = lambda _: None
) -> GenerationJob:
    """Decompress, check, parse and validate the payload of an RQ job.

    `check` sees the payload before it is parsed, and raises where it is not to be.

    Raises:
        PayloadTooLarge, CorruptJob, ForeignFunction, InvalidJob: as their names say.

    """
    payload = inflate(data, limit)
    check(payload)
    try:
        call: Any = msgspec.json.decode(payload)
    except (ValueError, RecursionError):
        message = "data: the job's payload is not JSON"
        raise CorruptJob(message) from None
    if not isinstance(call, list) or len(call) != _PARTS:
        message = "data: the job's payload is not RQ's [function, instance, args, kwargs]"
        raise CorruptJob(message)
    function, instance, arguments, keywords = call
    if function != JOB_FUNCTION or instance is not None or keywords:
        message = f"data: the job does not name {JOB_FUNCTION}"
        raise ForeignFunction(message)
    if not isinstance(arguments, list) or len(arguments) != 1:
        message = "data: the job's function takes one argument"
        raise CorruptJob(message)
    return GenerationJob.from_wire(arguments[0], modest=is_modest(payload))
