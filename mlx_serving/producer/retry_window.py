"""How long a reader keeps trying while Redis doesn't answer. No I/O, no clock of its own."""

from __future__ import annotations

from typing import Final

from redis.backoff import EqualJitterBackoff

from mlx_serving.common.redis.faults import fault_of

FIRST_S: Final = 2.0  # for a first answer: the caller can come back
LATER_S: Final = 60.0  # a stream that has begun outlives a Redis restart or a failover

_BACKOFF: Final = EqualJitterBackoff(cap=1.0, base=0.05)


class RetryWindow:
    """The time in which a reader may fail and try again; it starts at the first failure in a row.

    Args:
        first_s: its length until the first answer.
        later_s: its length after that.

    """

    def __init__(self, first_s: float = FIRST_S, later_s: float = LATER_S) -> None:
        self._limit_s = first_s
        self._later_s = later_s
        self._failures = 0
        self._since_s = 0.0

    def succeeded(self) -> None:
        """Note that Redis answered."""
        self._failures = 0
        self._limit_s = self._later_s

    def failed(self, error: Exception, now_s: float) -> float:
        """Note a failure; return how many seconds to wait before the next try.

        Raises:
            QueueUnavailable: the window has passed.
            QueueRefused: the error is one that no wait mends.

        """
        fault = fault_of(error)
        if not self._failures:
            self._since_s = now_s
        over = self._failures > 0 and now_s - self._since_s >= self._limit_s
        if over or not fault.retryable:
            raise fault from error
        self._failures += 1
        return float(_BACKOFF.compute(self._failures))
