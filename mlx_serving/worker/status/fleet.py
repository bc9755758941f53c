"""This worker among the others: its registration with RQ, its record, and the others' records."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final, TypeVar

from mlx_serving.common.protocol import quarantine
from mlx_serving.common.redis.worker_records import read_records
from mlx_serving.worker.rq_worker import BatchWorker

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mlx_serving.common.protocol.client import Protocol
    from mlx_serving.common.worker_record import WorkerRecord
    from mlx_serving.worker.status.presence import Presence

T = TypeVar("T")

BEAT_SECONDS: Final = 2.0
CHANGE_SECONDS: Final = 1.0  # between two beats of a worker that changes between busy and idle
EXPIRY_SECONDS: Final = 30  # of the record, after the last beat


class Fleet:
    """One worker's part in the fleet. `resident` names the models that it claims jobs for.

    Raises:
        redis.RedisError: from every method but the constructor.

    """

    def __init__(
        self,
        protocol: Protocol,
        queues: Sequence[str],
        presence: Presence,
        resident: Callable[[], tuple[str, ...]],
    ) -> None:
        self.name = presence.name
        self._protocol, self._presence, self._resident = protocol, presence, resident
        self._rq = BatchWorker(queues, self.name, protocol.redis)
        self._beaten_at = float("-inf")
        self._shown: tuple[object, ...] | None = None

    def beat(self, *, held: int, suspended: bool) -> None:
        """Write the record every few seconds, and sooner when the worker's state changes.

        `held`: how many jobs the worker holds; `suspended`: whether it may not claim now.
        """
        now = time.monotonic()
        shown = (held > 0, suspended, self._resident())
        if now - self._beaten_at < (BEAT_SECONDS if shown == self._shown else CHANGE_SECONDS):
            return
        self._beaten_at, self._shown = now, shown
        self._mended(lambda: self._write(held=held, suspended=suspended))

    def _write(self, *, held: int, suspended: bool) -> None:
        self._rq.beat(held=held, suspended=suspended)
        key = self._protocol.keys.worker(self.name)
        fields = self._presence.record(suspended=suspended).to_hash()
        with self._protocol.redis.pipeline(transaction=True) as pipe:
            pipe.hset(key, items=[text for pair in fields.items() for text in pair])
            pipe.expire(key, EXPIRY_SECONDS)
            pipe.execute()

    def someone_holds(self, model: str, kv_tokens: int, rows: int = 1) -> bool:
        """Whether another live worker could hold so many KV tokens and rows of the model."""
        return any(peer.could_hold(model, kv_tokens, rows) for peer in self._peers())

    def models_elsewhere(self) -> set[str]:
        """Models that other live workers have in memory and claim for."""
        return {model for peer in self._peers() if peer.is_serving for model in peer.resident}

    def _mended(self, act: Callable[[], T]) -> T:
        types = {self._protocol.keys.worker(self.name): "hash"} | self._rq.key_types()
        return quarantine.mended(self._protocol.run, types, act)

    def _peers(self) -> list[WorkerRecord]:
        names = sorted(self._mended(self._rq.peer_names))
        return read_records(self._protocol.redis, self._protocol.keys, names)

    def leave(self) -> None:
        """Deregister."""
        self._protocol.redis.delete(self._protocol.keys.worker(self.name))
        self._mended(self._rq.leave)
