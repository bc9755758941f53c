"""What `status` and `top` read: one job's control hash, or all queues and workers of a Redis."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from rq import Queue, worker_registration
from rq.suspension import is_suspended
from rq.worker.base import BaseWorker

from mlx_serving.common.redis.connection import connect
from mlx_serving.common.redis.retrying import FAULTS, unavailable
from mlx_serving.common.results import decode_result

if TYPE_CHECKING:
    import redis

    from mlx_serving.common.protocol.client import JobRecord
    from mlx_serving.common.protocol.keys import Keys
    from mlx_serving.common.redis.connection import Endpoint


@dataclass(frozen=True, slots=True)
class QueueView:
    """Jobs of one queue: waiting in RQ's list, held by a worker, and all that have not ended.

    `oldest_seconds` is the age of the oldest that has not ended; None where there is none.
    """

    name: str
    queued: int
    running: int
    open: int
    oldest_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class WorkerView:
    """What a live worker says of itself, a few seconds ago at most (`worker.presence`).

    `model` are all aliases that it serves, with commas between. `held` are the jobs that it has
    claimed, `rows` those in its batch, `parked` rows that gave way to others. `lease_age_ms` is
    None where nothing is held.
    """

    name: str
    model: str
    revision: str
    device: str
    acceleration: str
    held: int
    kv_tokens_capacity: int
    pid: int
    state: str = ""
    reasons: tuple[str, ...] = ()  # why it is paused
    rows: int = 0
    batch_rows: int = 0
    waiting: int = 0
    parked: int = 0
    kv_tokens_used: int = 0
    tokens_per_second: float = 0.0
    lease_age_ms: int | None = None
    lease_failing: bool = False
    memory_bytes: int = 0
    protocol: int = 0
    version: str = ""
    resident: tuple[str, ...] = ()  # of its models, those in memory that it claims for
    loading: str = ""
    unloadable: tuple[str, ...] = ()  # "alias: reason" of those that it could not load

    @property
    def able(self) -> list[str]:
        """Its models without those that it could not load."""
        failed = {line.partition(":")[0] for line in self.unloadable}
        return [model for model in self.model.split(",") if model not in failed]


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
            return look(client, endpoint.keys)
    except FAULTS as error:
        raise unavailable(error) from error


def look(client: redis.Redis, keys: Keys) -> Overview:
    """Read them on a connection that is there.

    Raises:
        redis.RedisError: Redis fails.

    """
    return Overview(
        _queues(client, keys), _workers(client, keys), suspended=bool(is_suspended(client))
    )


def _queues(client: redis.Redis, keys: Keys) -> list[QueueView]:
    names = sorted(queue.name for queue in Queue.all(connection=client))
    with client.pipeline(transaction=False) as pipe:
        pipe.info("server")  # its time: a monitor may not ask TIME
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
    """Seconds since the enqueue of a queue's oldest open job; None where there is none."""
    return max(0.0, now - oldest[0][1] / 1000) if oldest else None


def _workers(client: redis.Redis, keys: Keys) -> list[WorkerView]:
    """RQ's registered workers that are ours; a stock `rq worker` holds none of our jobs."""
    start = BaseWorker.redis_worker_namespace_prefix
    names = sorted(k.removeprefix(start) for k in worker_registration.get_keys(connection=client))
    with client.pipeline(transaction=False) as pipe:
        for name in names:
            pipe.hgetall(keys.worker(name))
        views = [_worker(name, raw) for name, raw in zip(names, pipe.execute(), strict=True)]
    return [view for view in views if view is not None]


def read_worker(client: redis.Redis, keys: Keys, name: str) -> WorkerView | None:
    """Read what a worker says of itself; None where it is not there, or not up yet.

    Raises:
        redis.RedisError: Redis fails.

    """
    return _worker(name, client.hgetall(keys.worker(name)))


def _worker(name: str, raw: Any) -> WorkerView | None:  # noqa: ANN401 -- redis-py's union
    facts = {key.decode(): value.decode(errors="replace") for key, value in raw.items()}
    if not facts:
        return None
    age = facts.get("lease_age_ms", "")
    return WorkerView(
        name=name,
        model=facts.get("model", ""),
        revision=facts.get("revision", ""),
        device=facts.get("device", ""),
        acceleration=facts.get("acceleration", ""),
        held=_count(facts, "held"),
        kv_tokens_capacity=_count(facts, "kv_tokens_capacity"),
        pid=_count(facts, "pid"),
        state=facts.get("state", ""),
        reasons=tuple(filter(None, facts.get("reasons", "").split(","))),
        rows=_count(facts, "rows"),
        batch_rows=_count(facts, "batch_rows"),
        waiting=_count(facts, "waiting"),
        parked=_count(facts, "parked"),
        kv_tokens_used=_count(facts, "kv_tokens_used"),
        tokens_per_second=float(facts.get("tokens_per_second") or 0),
        lease_age_ms=int(age) if age else None,
        lease_failing=_count(facts, "lease_failing") > 0,
        memory_bytes=_count(facts, "memory_bytes"),
        protocol=_count(facts, "protocol"),
        version=facts.get("version", ""),
        resident=tuple(filter(None, facts.get("resident", facts.get("model", "")).split(","))),
        loading=facts.get("loading", ""),
        unloadable=tuple(facts.get("unloadable", "").splitlines()),
    )


def _count(facts: dict[str, str], name: str) -> int:
    """A whole number; 0 where an older worker does not say it."""
    return int(facts.get(name) or 0)


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
