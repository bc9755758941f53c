"""Says once that Redis is away, and once that it is back."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import redis
import structlog

if TYPE_CHECKING:
    from redis import Redis

log = structlog.get_logger(__name__)

QUIET_SECONDS: Final = 10.0  # without a failure: the outage is over


class Outage:
    """What one thread saw of Redis's failures."""

    def __init__(self, client: Redis) -> None:
        self._client = client
        self._down = False
        self._failed_at = 0.0  # monotonic seconds of the last failure

    def note(self, error: redis.RedisError) -> None:
        """Take a failure down."""
        if not self._down:
            log.warning("redis_unavailable", reason=type(error).__name__)
        self._down, self._failed_at = True, time.monotonic()
        if isinstance(error, redis.ReadOnlyError):
            # Connect anew: the name may lead to another primary by now.
            self._client.connection_pool.disconnect()

    def note_quiet(self) -> None:
        """Take down that nothing failed; not every turn asks something, so one proves little."""
        if self._down and time.monotonic() - self._failed_at >= QUIET_SECONDS:
            log.info("redis_available")
            self._down = False
