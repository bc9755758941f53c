"""What `status` reads: one job's control hash, or all queues and workers of a Redis."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from rq import Queue, worker_registration
from rq.suspension import is_suspended
from rq.worker.base import BaseWorker

from mlx_serving.common.connection import connect
from mlx_serving.common.results import decode_result
from mlx_serving.common.retrying import unavailable
from mlx_serving.producer.outage import FAULTS

if TYPE_CHECKING:
    import redis

    from mlx_serving.common.connection import Endpoint
    from mlx_serving.common.keys import Keys
    from mlx_serving.common.protocol import JobRecord


@dataclass(frozen=True, slots=True)
class QueueView:
    """Jobs of one queue: waiting in RQ's list, held by a worker, and all that have not ended."""

    name: str
    queued: int
    running: int
    open: int


@dataclass(frozen=True, slots=True)
class WorkerView:
    """What a live worker says of itself; `held` are the jobs that it has claimed."""

    name: str
    model: str
    revision: str
    device: str
    acceleration: str
    held: int
    kv_tokens_capacity: int
    pid: int


@dataclass(frozen=True, slots=True)
class Overview:
    """All queues that RQ knows, and all workers of ours."""

    queues: list[QueueView] = field(default_factory=list)
    workers: list[WorkerView] = field(default_factory=list)
    suspended: bool = False


def read_overview(endpoint: Endpoint) -> Overview:
    """Read the queues and workers of one Redis.

    Raises:
        QueueUnavailable: Redis can't be reached, or refuses us.

    """
    try:
        with connect(endpoint) as client:
            return Overview(
                _queues(client, endpoint.keys),
                _workers(client, endpoint.keys),
                suspended=bool(is_suspended(client)),
            )
    except FAULTS as error:
        raise unavailable(error) from error


def _queues(client: redis.Redis, keys: Keys) -> list[QueueView]:
    names = sorted(queue.name for queue in Queue.all(connection=client))
    with client.pipeline(transaction=False) as pipe:
        for name in names:
            pipe.llen(keys.rq_queue(name))
            pipe.zcard(keys.leases(name))
            pipe.zcard(keys.open(name))
        counts = iter(pipe.execute())
    return [QueueView(name, next(counts), next(counts), next(counts)) for name in names]


def _workers(client: redis.Redis, keys: Keys) -> list[WorkerView]:
    """RQ's registered workers that are ours; a stock `rq worker` holds none of our jobs."""
    start = BaseWorker.redis_worker_namespace_prefix
    names = sorted(k.removeprefix(start) for k in worker_registration.get_keys(connection=client))
    views = (read_worker(client, keys, name) for name in names)
    return [view for view in views if view is not None]


def read_worker(client: redis.Redis, keys: Keys, name: str) -> WorkerView | None:
    """Read what a worker says of itself; None where it is not there, or not up yet.

    Raises:
        redis.RedisError: Redis fails.

    """
    raw: dict[Any, Any] = client.hgetall(keys.worker(name))
    facts = {key.decode(): value.decode() for key, value in raw.items()}
    if not facts:
        return None
    return WorkerView(
        name=name,
        model=facts.get("model", ""),
        revision=facts.get("revision", ""),
        device=facts.get("device", ""),
        acceleration=facts.get("acceleration", ""),
        held=int(facts.get("held", 0)),
        kv_tokens_capacity=int(facts.get("kv_tokens_capacity", 0)),
        pid=int(facts.get("pid", 0)),
    )


def job_view(record: JobRecord) -> dict[str, object]:
    """One job in words; None where there is nothing to say. Its text is not shown."""
    result = decode_result(record.result) if record.result else None
    usage = result.usage if result else None
    return {
        "id": record.job_id,
        "state": record.state.value,
        "queue": record.queue,
        "worker": record.owner or None,
        "attempt": record.epoch or None,
        "crashes": record.attempts or None,
        "events": record.seq,
        "enqueued": _time(record.enqueued_ms),
        "started": _time(record.started_ms),
        "first_token": _time(record.first_token_ms),
        "finished": _time(record.finished_ms),
        "deadline": _time(record.deadline_ms),
        "cancel": record.cancel_reason or None,
        "error": record.error_code or None,
        "message": record.message or None,
        "finish_reason": result.finish_reason if result else None,
        "prompt_tokens": usage.prompt_tokens if usage else None,
        "completion_tokens": usage.completion_tokens if usage else None,
    }


def _time(milliseconds: int) -> str | None:
    """Redis's time in UTC, to the millisecond."""
    if not milliseconds:
        return None
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="milliseconds")
