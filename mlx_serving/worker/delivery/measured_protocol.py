"""The delivery protocol with figures of its calls: latency, outcomes, whether Redis answers."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

import redis
import structlog

from mlx_serving.common.errors import QueueFailure
from mlx_serving.common.protocol.client import Protocol
from mlx_serving.common.redis.server import read_server
from mlx_serving.worker.status.counters import COMMIT

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mlx_serving.common.protocol.calls import Call
    from mlx_serving.common.protocol.keys import Keys
    from mlx_serving.common.protocol.quarantine import QuarantinedKey
    from mlx_serving.worker.status.counters import Counters

log = structlog.get_logger(__name__)
T = TypeVar("T")

LOOK_SECONDS: Final = 5.0
POLICY_SECONDS: Final = 60.0


class MeasuredProtocol(Protocol):
    """`Protocol`, for one worker's figures."""

    def __init__(self, connection: redis.Redis, keys: Keys, counters: Counters) -> None:
        super().__init__(connection, keys)
        self._counters = counters

    def run(self, call: Call[T]) -> T:
        """Run one call, and count what came of it."""
        return self._measured(call, partial(super().run, call))

    def send(self, call: Call[T]) -> Callable[[float | None], T]:
        """Send one call; what came of it is counted when its reply is read."""
        receive = super().send(call)
        return lambda timeout: self._measured(call, partial(receive, timeout))

    def _note_quarantined(self, moved: QuarantinedKey) -> None:
        super()._note_quarantined(moved)
        self._counters.count("keys_quarantined")

    def _measured(self, call: Call[T], reply_of: Callable[[], T]) -> T:
        started = time.monotonic()
        try:
            reply = reply_of()
        except redis.RedisError:
            self._counters.redis_failed = True
            self._counters.count("redis_errors")
            raise
        if call.script == "commit":
            self._counters.observe(COMMIT, time.monotonic() - started)
        self._counters.answered()
        self._note(call.script, reply)
        return reply

    def _note(self, script: str, reply: Any) -> None:  # noqa: ANN401 -- each script has its own
        counters = self._counters
        if script in {"commit", "renew"}:
            counters.leased()
            counters.refused(reply)
        elif script == "claim":
            counters.claimed(reply.jobs)
            if reply.jobs:
                counters.leased()
        elif script == "release":
            counters.count("hand_offs", by=reply.count("OK"))
        elif script == "reap":
            for _, outcome in reply.outcomes:
                counters.count("takeovers", outcome)


class QueueWatch:
    """Reads every few seconds how much waits in this worker's queues; for the main loop."""

    def __init__(self, protocol: Protocol, queues: Sequence[str], counters: Counters) -> None:
        self._protocol, self._queues, self._counters = protocol, queues, counters
        self._looked_at = self._policy_at = float("-inf")

    def look(self) -> None:
        """Note that the main loop came round; read depths and ages if that is due.

        Raises:
            redis.RedisError: Redis does not answer.

        """
        now = self._counters.turned_at = time.monotonic()
        if now - self._looked_at < LOOK_SECONDS:
            return
        self._looked_at = now
        keys, depths = self._protocol.keys, {}
        with self._protocol.redis.pipeline(transaction=False) as pipe:
            pipe.time()
            for queue in self._queues:
                pipe.llen(keys.rq_queue(queue))
                pipe.zrange(keys.open(queue), 0, 0, withscores=True)
            # A key of another type says nothing of the others.
            clock, *replies = pipe.execute(raise_on_error=False)
        if isinstance(clock, Exception):
            raise clock
        seconds, micros = clock
        for queue, depth, oldest in zip(self._queues, replies[::2], replies[1::2], strict=True):
            if isinstance(depth, int) and isinstance(oldest, list):
                since = oldest[0][1] / 1000 if oldest else seconds + micros / 1e6
                depths[queue] = (depth, max(0.0, seconds + micros / 1e6 - since))
        self._counters.queues = depths
        if now - self._policy_at >= POLICY_SECONDS:
            self._policy_at = now
            self._look_at_policy()

    def _look_at_policy(self) -> None:
        """Note whether Redis deletes keys by now: it was asked before the start, too."""
        try:
            server = read_server(self._protocol.redis, attempts=1)
        except QueueFailure:
            return  # the next call that matters says so
        if server.evicts and not self._counters.redis_evicts:
            log.error("redis_evicts", policy=server.policy, maxmemory=server.maxmemory)
        self._counters.redis_evicts = server.evicts
