"""Reads the records of workers. Apart from the record, so that a producer imports no more."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import structlog
from redis.exceptions import ResponseError

from mlx_serving.common.worker_record import WorkerRecord

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    import redis

    from mlx_serving.common.protocol.keys import Keys

log = structlog.get_logger(__name__)


def read_records(client: redis.Redis, keys: Keys, names: Collection[str]) -> list[WorkerRecord]:
    """Read the records of these workers, in one round trip.

    A worker without a record is left out. So is a record that can't be read (a bad number, a key of
    another type), with a warning in the log: it says nothing of the other workers.

    Raises:
        redis.RedisError: Redis fails, or refuses the read.

    """
    with client.pipeline(transaction=False) as pipe:
        for name in names:
            pipe.hgetall(keys.worker(name))
        replies = pipe.execute(raise_on_error=False)
    records = []
    for name, reply in zip(names, replies, strict=True):
        try:
            record = _read_reply(name, reply)
        except ValueError as error:
            log.warning("worker_record_unreadable", of=name, error=str(error))
            continue
        if record is not None:
            records.append(record)
    return records


def _read_reply(name: str, reply: object) -> WorkerRecord | None:
    if isinstance(reply, ResponseError) and str(reply).startswith("WRONGTYPE"):
        raise ValueError(str(reply))
    if isinstance(reply, Exception):
        raise reply
    return WorkerRecord.from_hash(name, cast("Mapping[bytes, bytes]", reply))
