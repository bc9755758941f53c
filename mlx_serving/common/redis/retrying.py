"""Retries calls to Redis that may run twice; turns its errors into ours."""

from __future__ import annotations

import asyncio
import random
import time
from typing import TYPE_CHECKING, Final, TypeVar

from redis import exceptions

from mlx_serving.common.errors import QueueUnavailable
from mlx_serving.common.redis.faults import fault_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from mlx_serving.common.errors import QueueFailure

T = TypeVar("T")

ATTEMPTS: Final = 5
BASE_SECONDS: Final = 0.05
CAP_SECONDS: Final = 1.0

FAULTS: Final = (exceptions.RedisError, OSError)
"""Every error that a call to Redis can raise."""


def answered(
    call: Callable[[], T],
    *,
    attempts: int = ATTEMPTS,
    sleep: Callable[[float], object] = time.sleep,
) -> T:
    """Run a call that may run twice until it answers; waits 0.05 s, doubling, with jitter.

    Raises:
        QueueUnavailable: after the last attempt; whether the call ran is not known.
        QueueRefused: at once, for what no retry mends.

    """
    fault: QueueFailure | None = None
    for pause in _pauses(attempts):
        try:
            return call()
        except FAULTS as error:
            fault = telling(fault, fault_of(error))
            if pause is None or not fault.retryable:
                raise fault from error
        sleep(pause)
    raise AssertionError  # pragma: no cover -- the last pause is None


async def answered_async(
    call: Callable[[], Awaitable[T]],
    *,
    attempts: int = ATTEMPTS,
    sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
) -> T:
    """Asyncio twin of `answered`."""
    fault: QueueFailure | None = None
    for pause in _pauses(attempts):
        try:
            return await call()
        except FAULTS as error:
            fault = telling(fault, fault_of(error))
            if pause is None or not fault.retryable:
                raise fault from error
        await sleep(pause)
    raise AssertionError  # pragma: no cover -- the last pause is None


def telling(earlier: QueueFailure | None, latest: QueueFailure) -> QueueFailure:
    """The one of two failures in a row that says more.

    A server that takes no more clients, as one, says so or just closes the connection: that is a
    race.
    """
    return latest if earlier is None or type(latest) is not QueueUnavailable else earlier


def _pauses(attempts: int) -> Iterator[float | None]:
    """Seconds to wait after each failed attempt, None after the last."""
    for attempt in range(attempts - 1):
        yield min(CAP_SECONDS, BASE_SECONDS * 2**attempt) * random.uniform(0.5, 1.0)  # noqa: S311 -- jitter
    yield None
