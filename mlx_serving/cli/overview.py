"""What `status` and `top` show: one job, or all queues and workers of a Redis."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from rq import worker_registration
from rq.suspension import is_suspended
from rq.worker.base import BaseWorker

from mlx_serving.common.protocol import quarantine
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


ISOLATED_SHOWN: Final = 100  # of a queue


@dataclass(frozen=True, slots=True)
class QueueView:
    """The jobs of one queue."""

    name: str
    queued: int  # in RQ's list
    running: int  # held by a worker
    open: int  # all that have not ended
    oldest_seconds: float | None = None  # age of the oldest open job; None: there is none
    isolated: tuple[str, ...] = ()  # ids of open jobs that nobody may claim, some of many


@dataclass(frozen=True, slots=True)
class Overview:
    """All queues that RQ knows, and all workers of ours.

    `odd_keys` are of a wrong type, and count as empty; `quarantined_keys` were, and were moved out
    of the way in the last week, the last one first.
    """

    queues: list[QueueView] = field(default_factory=list)
    workers: list[WorkerRecord] = field(default_factory=list)
    suspended: bool = False
    odd_keys: list[str] = field(default_factory=list)
    quarantined_keys: list[quarantine.QuarantinedKey] = field(default_factory=list)


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
    reader = _Reader(client)
    return Overview(
        _queues(reader, keys),
        _workers(reader, keys),
        suspended=bool(is_suspended(client)),
        odd_keys=sorted(reader.odd),
        quarantined_keys=quarantine.read_quarantined(client, keys),
    )


class _Reader:
    """Reads keys of which any may have a wrong type; `odd` collects those."""

    def __init__(self, client: redis.Redis) -> None:
        self.client = client
        self.odd: set[str] = set()

    def read(self, *commands: tuple[str, str, *tuple[object, ...]]) -> list[Any]:
        """Run commands, each on one key, in one round trip; None for a key of a wrong type."""
        pipe: Any  # redis-py's `execute_command` has no types
        with self.client.pipeline(transaction=False) as pipe:
            for name, key, *arguments in commands:
                pipe.execute_command(name, key, *arguments)
            replies = pipe.execute(raise_on_error=False)
        for (_, key, *_), reply in zip(commands, replies, strict=True):
            if quarantine.is_wrong_type(reply):
                self.odd.add(key)
            elif isinstance(reply, Exception):
                raise reply
        return [None if isinstance(reply, Exception) else reply for reply in replies]

    def members(self, key: str) -> list[str]:
        """Members of a set, sorted."""
        (found,) = self.read(("SMEMBERS", key))
        return sorted(member.decode(errors="replace") for member in found or ())


def _queues(reader: _Reader, keys: Keys) -> list[QueueView]:
    start = keys.rq_queue("")
    names = [key.removeprefix(start) for key in reader.members(keys.rq_queues())]
    # For its time: a monitor user may not call TIME.
    now = reader.client.info("server")["server_time_usec"] / 1e6
    replies = reader.read(
        *(
            command
            for name in names
            for command in (
                ("LLEN", keys.rq_queue(name)),
                ("ZCARD", keys.leases(name)),
                ("ZCARD", keys.open(name)),
                ("ZRANGE", keys.open(name), 0, 0, "WITHSCORES"),
                ("ZRANGE", keys.isolated(name), 0, ISOLATED_SHOWN - 1),
            )
        )
    )
    columns = (replies[column::5] for column in range(5))
    return [
        QueueView(
            name, queued or 0, running or 0, open_ or 0, _age(oldest or [], now), _ids(held or [])
        )
        for name, queued, running, open_, oldest, held in zip(names, *columns, strict=True)
    ]


def _ids(raw: list[bytes]) -> tuple[str, ...]:
    return tuple(job_id.decode(errors="replace") for job_id in raw)


def _age(oldest: list[bytes], now: float) -> float | None:
    """Seconds since the enqueue (its id and time, ms) of a queue's oldest open job, if any."""
    return max(0.0, now - float(oldest[1]) / 1000) if oldest else None


def _workers(reader: _Reader, keys: Keys) -> list[WorkerRecord]:
    """The workers registered with RQ that are ours; a stock `rq worker` has no record."""
    start = BaseWorker.redis_worker_namespace_prefix
    members = reader.members(worker_registration.REDIS_WORKER_KEYS)
    return read_records(reader.client, keys, [key.removeprefix(start) for key in members])


def read_worker(client: redis.Redis, keys: Keys, name: str) -> WorkerRecord | None:
    """Read a worker's record; None if it is not there, or not up yet.

    Raises:
        redis.RedisError: Redis fails.

    """
    return WorkerRecord.from_hash(name, client.hgetall(keys.worker(name)))  # type: ignore[arg-type]  # redis-py's union


def oddities(overview: Overview) -> list[str]:
    """What was found under keys of a wrong type, a line each."""
    odd = [
        f"key {key} has a wrong type: the next submit or worker that meets it quarantines it"
        for key in overview.odd_keys
    ]
    moved = [f"key {m.key} was a {m.kind}: moved to {m.place}" for m in overview.quarantined_keys]
    return odd + moved


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
        "workers_lost": record.losses or None,
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
