"""What `status` and `top` show: one job, or all queues and workers of a Redis."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from rq import Queue, worker_registration
from rq.suspension import is_suspended
from rq.worker.base import BaseWorker

from mlx_serving.common.redis.connection import connect
from mlx_serving.common.redis.faults import fault_of
from mlx_serving.common.redis.retrying import FAULTS
from mlx_serving.common.redis.worker_records import read_records
from mlx_serving.common.results import decode_result
from mlx_serving.common.worker_record import WorkerRecord

if TYPE_CHECKING:
    import redis

    from mlx_serving.common.protocol.client import JobRecord
    from mlx_serving.common.protocol.keys import Keys
    from mlx_serving.common.redis.connection import Endpoint


@dataclass(frozen=True, slots=True)
class QueueView:
    """The jobs of one queue."""

    name: str
    queued: int  # in RQ's list
    running: int  # held by a worker
    open: int  # all that have not ended
    oldest_seconds: float | None = None  # age of the oldest open job; None: there is none


@dataclass(frozen=True, slots=True)
class Overview:
    """All queues that RQ knows, and all workers of ours."""

    queues: list[QueueView] = field(default_factory=list)
    workers: list[WorkerRecord] = field(default_factory=list)
    suspended: bool = False


def read_overview(endpoint: Endpoint) -> Overview:
    """Read the queues and workers of one Redis.

    Raises:
        QueueFailure: Redis can't be reached, or refuses us.

    """
    try:
        with connect(endpoint) as client:
            return look(client, endpoint.keys)
    except FAULTS as error:
        raise fault_of(error) from error


def look(client: redis.Redis, keys: Keys) -> Overview:
    """Read the queues and workers through this connection.

    Raises:
        redis.RedisError: Redis fails.

    """
    return Overview(
        _queues(client, keys), _workers(client, keys), suspended=bool(is_suspended(client))
    )


def _queues(client: redis.Redis, keys: Keys) -> list[QueueView]:
    names = sorted(queue.name for queue in Queue.all(connection=client))
    with client.pipeline(transaction=False) as pipe:
        pipe.info("server")  # for its time: a monitor user may not call TIME
        for name in names:
            pipe.llen(keys.rq_queue(name))
            pipe.zcard(keys.leases(name))
            pipe.zcard(keys.open(name))
            pipe.zrange(keys.open(name), 0, 0, withscores=True)
        server, *replies = pipe.execute()
    now = server["server_time_usec"] / 1e6
    columns = (replies[column::4] for column in range(4))
    return [
        QueueView(name, queued, running, open_, _age(oldest, now))
        for name, queued, running, open_, oldest in zip(names, *columns, strict=True)
    ]


def _age(oldest: list[tuple[bytes, float]], now: float) -> float | None:
    """Seconds since the enqueue of a queue's oldest open job; None if there is none."""
    return max(0.0, now - oldest[0][1] / 1000) if oldest else None


def _workers(client: redis.Redis, keys: Keys) -> list[WorkerRecord]:
    """The workers registered with RQ that are ours; a stock `rq worker` has no record."""
    start = BaseWorker.redis_worker_namespace_prefix
    names = sorted(k.removeprefix(start) for k in worker_registration.get_keys(connection=client))
    return read_records(client, keys, names)


def read_worker(client: redis.Redis, keys: Keys, name: str) -> WorkerRecord | None:
    """Read a worker's record; None if it is not there, or not up yet.

    Raises:
        redis.RedisError: Redis fails.

    """
    return WorkerRecord.from_hash(name, client.hgetall(keys.worker(name)))  # type: ignore[arg-type]  # redis-py's union


def job_view(record: JobRecord) -> dict[str, object]:
    """One job for people, without its text. A value that it does not have is None."""
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
