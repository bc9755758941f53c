"""How this worker looks to RQ's own tools: the one module that touches RQ's internals.

It has the worker's registration, heartbeat and commands, and the form in which RQ keeps results.
RQ's job hashes, registries and executions are written by the protocol's scripts.
"""

from __future__ import annotations

import base64
import json
import time
import zlib
from typing import TYPE_CHECKING, Any

import structlog
from rq import worker_registration
from rq.serializers import JSONSerializer
from rq.worker.base import BaseWorker, WorkerStatus

if TYPE_CHECKING:
    from collections.abc import Sequence

    import redis

log = structlog.get_logger(__name__)

WORKER_TTL_SECONDS = 60
LOOK_SECONDS = 30.0  # between two looks at the lists of workers


def rq_success(result: bytes) -> bytes:
    """A return value in JSON as `rq.results.Result` stores it."""
    return base64.b64encode(result)


def rq_failure(message: str) -> bytes:
    """An exception's text as `rq.results.Result` stores it."""
    return base64.b64encode(zlib.compress(message.encode()))


class BatchWorker(BaseWorker):
    """An RQ worker that holds many jobs at once in one process and never forks.

    It is what `rq info`, `Worker.all()` and RQ's commands see of the worker; the dispatcher has the
    loop. RQ's own loop, its dequeueing, its heartbeat for each job and `_finalize_*` are not used,
    because none of them knows attempts.
    """

    def __init__(self, queues: Sequence[str], name: str, connection: redis.Redis) -> None:
        super().__init__(
            list(queues),
            name=name,
            connection=connection,
            serializer=JSONSerializer,
            worker_ttl=WORKER_TTL_SECONDS,
        )
        self._looked_at = float("-inf")

    def _set_connection(self, connection: redis.Redis) -> redis.Redis:
        """Keep our timeouts: RQ would raise the read timeout to minutes."""
        return connection

    def _set_ip_address(self, connection: redis.Redis) -> None:
        """Leave it to `enter`, because a worker may start while Redis is away."""
        del connection
        self.ip_address = "unknown"

    def enter(self) -> None:
        """Register as a live worker, and remove the names of workers that were killed.

        A hash under this name is an earlier run's: RQ would refuse to register beside it.
        """
        super()._set_ip_address(self.connection)
        self.connection.delete(self.key)
        for queue in self.queues:
            worker_registration.clean_worker_registry(queue)
        self.register_birth()  # type: ignore[no-untyped-call]
        self.set_state(WorkerStatus.STARTED)

    def beat(self, *, held: int, suspended: bool) -> None:
        """Renew the heartbeat and the state; register first if the worker is not on every list.

        A worker that comes back under its name finds the hash of its earlier run for a minute, so
        the hash alone does not say that it is registered. The lists are looked at now and then: an
        idle worker asks little of Redis.
        """
        now = time.monotonic()
        look = now - self._looked_at >= LOOK_SECONDS
        if not (self._is_listed() if look else self.connection.exists(self.key)):
            self.enter()
        if look:  # and nothing failed: else the next call looks again
            self._looked_at = now
        busy = WorkerStatus.BUSY if held else WorkerStatus.IDLE
        self.heartbeat(WORKER_TTL_SECONDS)
        self.set_state(WorkerStatus.SUSPENDED if suspended and not held else busy)

    def _is_listed(self) -> bool:
        """Say whether the worker has its hash and is on every list that RQ's tools read."""
        with self.connection.pipeline(transaction=False) as pipe:
            pipe.exists(self.key)
            for each in self._lists():
                pipe.sismember(each, self.key)
            return all(pipe.execute())

    def _lists(self) -> list[str]:
        by_queue = (worker_registration.WORKERS_BY_QUEUE_KEY % name for name in self.queue_names())
        return [worker_registration.REDIS_WORKER_KEYS, *by_queue]

    def key_types(self) -> dict[str, str]:
        """The types of the keys that this class reads and writes, by key."""
        sets = dict.fromkeys([*self._lists(), self.executions_key], "set")
        return {self.key: "hash"} | sets

    def peer_names(self) -> set[str]:
        """Names of the other workers registered on our queues; some may be dead."""
        keys = {key for q in self.queues for key in worker_registration.get_keys(queue=q)}
        return {key.removeprefix(self.redis_worker_namespace_prefix) for key in keys} - {self.name}

    def leave(self) -> None:
        """Deregister."""
        self.register_death()  # type: ignore[no-untyped-call]


def read_command(data: bytes) -> tuple[str, str]:
    """An RQ command as (what, job id).

    `what` is "cancel" for stop-job and stop-execution, "shutdown", or "" for any other.
    """
    try:
        payload: Any = json.loads(data)
    except (ValueError, RecursionError):
        return "", ""
    if not isinstance(payload, dict):
        return "", ""
    command, job_id = payload.get("command"), payload.get("job_id")
    if command in {"stop-job", "stop-execution"} and isinstance(job_id, str):
        return "cancel", job_id
    return ("shutdown", "") if command == "shutdown" else ("", "")
