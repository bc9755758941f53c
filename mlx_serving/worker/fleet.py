"""This worker among the others: registration with RQ, what it can hold, and what others can."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import structlog

from mlx_serving.worker.presence import bounded
from mlx_serving.worker.rq_worker import BatchWorker

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from mlx_serving.common.protocol import Protocol

log = structlog.get_logger(__name__)

BEAT_SECONDS: Final = 2.0
CHANGE_SECONDS: Final = 1.0  # a worker that flickers between busy and idle says so this often
PRESENCE_SECONDS: Final = 30


class Fleet:
    """Presence of one worker.

    Raises:
        redis.RedisError: from every method but the constructor's reading of settings.

    """

    def __init__(self, protocol: Protocol, queues: Sequence[str], name: str) -> None:
        self._protocol, self._queues, self.name = protocol, queues, name
        self._rq = BatchWorker(queues, name, protocol.redis)
        self._beaten_at = float("-inf")
        self._shown: tuple[bool, bool] | None = None
        self.facts: dict[str, str] = {}  # what this worker says of itself, see `presence`
        self.numbers: Callable[[], Mapping[str, str]] = dict

    def enter(self) -> None:
        """Register."""
        self._rq.enter()

    def beat(self, *, held: int, suspended: bool) -> None:
        """Say that we live, every few seconds and whenever busy or suspended changes."""
        now = time.monotonic()
        shown = (held > 0, suspended)
        if now - self._beaten_at < (BEAT_SECONDS if shown == self._shown else CHANGE_SECONDS):
            return
        self._beaten_at, self._shown = now, shown
        self._rq.beat(held=held, suspended=suspended)
        key = self._protocol.keys.worker(self.name)
        said = {**bounded(self.facts), **self.numbers(), "held": str(held)}
        if suspended and said.get("state") == "serving":
            said["state"] = "suspended"
        with self._protocol.redis.pipeline(transaction=True) as pipe:
            pipe.hset(key, items=[text for pair in said.items() for text in pair])
            pipe.expire(key, PRESENCE_SECONDS)
            pipe.execute()

    def someone_holds(self, kv_tokens: int, rows: int = 1) -> bool:
        """Whether another live worker of our queues could hold so many KV tokens and rows."""
        redis, keys = self._protocol.redis, self._protocol.keys
        for name in self._rq.peer_names():
            facts = redis.hmget(keys.worker(name), "kv_tokens_capacity", "batch_rows")
            capacity, most = (int(fact or 0) for fact in facts)
            if capacity >= kv_tokens and (rows == 1 or most >= rows):
                return True
        return False

    def leave(self) -> None:
        """Deregister."""
        self._protocol.redis.delete(self._protocol.keys.worker(self.name))
        self._rq.leave()
