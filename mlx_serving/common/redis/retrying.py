"""Retries calls to Redis that may run twice; turns its errors into QueueUnavailable."""

from __future__ import annotations

import asyncio
import random
import time
from typing import TYPE_CHECKING, Final, TypeVar

from redis import exceptions

from mlx_serving.common.errors import QueueUnavailable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

T = TypeVar("T")

ATTEMPTS: Final = 5
BASE_SECONDS: Final = 0.05
CAP_SECONDS: Final = 1.0

FAULTS: Final = (exceptions.RedisError, OSError)
"""Every error that a call to Redis can raise."""

REFUSED: Final = (exceptions.AuthenticationError, exceptions.AuthorizationError)
"""Connection errors that waiting does not mend."""

AWAY: Final = (
    exceptions.ConnectionError,
    exceptions.TimeoutError,
    # A primary that was demoted, lost its replicas (`min-replicas-to-write`) or is full.
    exceptions.ReadOnlyError,
    exceptions.MasterDownError,
    exceptions.OutOfMemoryError,
    OSError,
)
"""Errors after which the same call may succeed; whether it ran is not known."""


def retry_idempotent(
    call: Callable[[], T],
    *,
    attempts: int = ATTEMPTS,
    sleep: Callable[[float], object] = time.sleep,
) -> T:
    """Run a call that may run twice until it answers; waits 0.05 s, doubling, with jitter.

    Raises QueueUnavailable after the last attempt, or at once if Redis refuses our credentials.
    """
    for pause in _pauses(attempts):
        try:
            return call()
        except REFUSED as error:
            raise unavailable(error) from error
        except AWAY as error:
            if pause is None:
                raise unavailable(error) from error
        sleep(pause)
    raise AssertionError  # pragma: no cover -- the last pause is None


async def retry_idempotent_async(
    call: Callable[[], Awaitable[T]],
    *,
    attempts: int = ATTEMPTS,
    sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
) -> T:
    """Asyncio twin of `retry_idempotent`."""
    for pause in _pauses(attempts):
        try:
            return await call()
        except REFUSED as error:
            raise unavailable(error) from error
        except AWAY as error:
            if pause is None:
                raise unavailable(error) from error
        await sleep(pause)
    raise AssertionError  # pragma: no cover -- the last pause is None


def answered(call: Callable[[], T]) -> T:
    """Run a call that may run twice; raise QueueUnavailable for any error of Redis."""
    try:
        return retry_idempotent(call)
    except FAULTS as error:
        raise unavailable(error) from error


def unavailable(error: Exception) -> QueueUnavailable:
    """Our error for one of redis-py's; it keeps the text, which holds no payload."""
    return QueueUnavailable(f"Redis is not available: {error}")


def _pauses(attempts: int) -> Iterator[float | None]:
    """Seconds to wait after each failed attempt, None after the last."""
    for attempt in range(attempts - 1):
        yield min(CAP_SECONDS, BASE_SECONDS * 2**attempt) * random.uniform(0.5, 1.0)  # noqa: S311 -- jitter
    yield None
