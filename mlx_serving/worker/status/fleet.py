"""This worker among the others: registration with RQ, what it can hold, and what others can."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import structlog

from mlx_serving.worker.rq_worker import BatchWorker
from mlx_serving.worker.status.presence import Peer, bounded

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from mlx_serving.common.protocol.client import Protocol

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
        self._shown: tuple[object, ...] | None = None
        self.facts: dict[str, str] = {}  # what this worker says of itself, see `presence`
        self.numbers: Callable[[], Mapping[str, str]] = dict
        self.resident: Callable[[], tuple[str, ...]] = tuple  # models that jobs are claimed for

    def enter(self) -> None:
        """Register."""
        self._rq.enter()

    def beat(self, *, held: int, suspended: bool) -> None:
        """Say that we live, every few seconds and when that or the models in memory change."""
        now = time.monotonic()
        shown = (held > 0, suspended, self.resident())
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

    def someone_holds(self, model: str, kv_tokens: int, rows: int = 1) -> bool:
        """Whether another live worker could hold so many KV tokens and rows of the model.

        One that serves it and has not loaded it yet may: it finds out once it does.
        """
        for peer in self._peers():
            capacity = peer.capacity(model)
            roomy = capacity is None or capacity >= kv_tokens
            if roomy and (rows == 1 or peer.batch_rows >= rows):
                return True
        return False

    def residents_elsewhere(self) -> set[str]:
        """Models that other live workers have in memory and claim for."""
        return {model for peer in self._peers() if peer.serving for model in peer.resident}

    def _peers(self) -> list[Peer]:
        redis, keys = self._protocol.redis, self._protocol.keys
        with redis.pipeline(transaction=False) as pipe:
            for name in self._rq.peer_names():
                pipe.hgetall(keys.worker(name))
            return [Peer(facts) for facts in pipe.execute() if facts]

    def leave(self) -> None:
        """Deregister."""
        self._protocol.redis.delete(self._protocol.keys.worker(self.name))
        self._rq.leave()
