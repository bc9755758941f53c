"""Reports on batches in Redis: other machines read them, and ask there to cancel a batch.

The folder is the truth. A runner writes its report about once a second; Redis keeps a report for
30 days after the last write.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

import msgspec

from mlx_serving.common.errors import BatchNotFound
from mlx_serving.common.protocol import quarantine
from mlx_serving.common.protocol.client import Protocol
from mlx_serving.common.protocol.fields import BatchField
from mlx_serving.common.redis.connection import connect, resolve
from mlx_serving.common.redis.retrying import answered
from mlx_serving.producer.batch.folder import STATE
from mlx_serving.producer.batch.objects import Batch

if TYPE_CHECKING:
    from collections.abc import Callable

    from mlx_serving.common.settings import Settings

T = TypeVar("T")

KEEP_SECONDS: Final = 30 * 24 * 3600
ALIVE_SECONDS: Final = 10.0
"""A runner whose last report is older is taken for dead."""


class Report(msgspec.Struct, kw_only=True):
    """A runner's report on its batch.

    `at_ms`: its time, by Redis `TIME`. `problem`: why the runner stopped before the end.
    """

    batch: Batch
    folder: str
    host: str = msgspec.field(default_factory=socket.gethostname)
    pid: int = msgspec.field(default_factory=os.getpid)
    at_ms: int = 0
    in_flight: int = 0
    waiting: int = 0
    problem: str = ""
    age_s: float = 0.0  # set by the reader: seconds since `at_ms`

    @property
    def running(self) -> bool:
        """Whether a runner is at work on it."""
        return not (self.batch.ended or self.problem) and self.age_s < ALIVE_SECONDS

    @property
    def lies_here(self) -> bool:
        """Whether the batch's folder is on this machine."""
        return self.host == socket.gethostname() and (Path(self.folder) / STATE).is_file()


class Registry:
    """The reports in one Redis.

    Raises:
        QueueUnavailable: from every call, if Redis is away.

    """

    def __init__(self, settings: Settings) -> None:
        endpoint = resolve(settings)
        self._keys = endpoint.keys
        self._redis = connect(endpoint)
        self._protocol = Protocol(self._redis, self._keys)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._redis.close()

    def now_s(self) -> int:
        """Redis's time: whole seconds since the epoch."""
        return self._now_ms() // 1000

    def tell(self, report: Report) -> bool:
        """Write a report; return whether somebody asked to cancel the batch."""
        report.at_ms = self._now_ms()
        key, index = self._keys.batch(report.batch.id), self._keys.batches()

        def send(pipe: Any) -> None:  # noqa: ANN401 -- redis has no type
            pipe.hset(key, BatchField.REPORT, msgspec.json.encode(report))
            pipe.expire(key, KEEP_SECONDS)
            pipe.zadd(index, {report.batch.id: report.at_ms}, nx=True)  # by the first report
            pipe.zremrangebyscore(index, "-inf", report.at_ms - KEEP_SECONDS * 1000)
            pipe.expire(index, KEEP_SECONDS)
            pipe.hget(key, BatchField.CANCEL)

        return self._pipelined(key, send)[-1] is not None

    def find(self, batch_id: str) -> Report:
        """Last report on a batch. Raises BatchNotFound."""
        raw, now_ms = self._read(batch_id)
        if raw is None:
            raise BatchNotFound(f"Redis knows no batch {batch_id!r}")
        report = msgspec.json.decode(raw, type=Report)
        report.age_s = max(0.0, (now_ms - report.at_ms) / 1000)
        return report

    def reports(self) -> list[Report]:
        """Last reports on all batches, the newest batch first."""
        (ids,) = self._pipelined("", lambda pipe: pipe.zrange(self._keys.batches(), 0, -1))
        found = []
        for batch_id in reversed(ids):
            try:
                found.append(self.find(batch_id.decode()))
            except BatchNotFound:
                continue
        return found

    def ask_to_cancel(self, batch_id: str) -> Report:
        """Ask the runner, on any machine, to cancel the batch. Raises BatchNotFound."""
        report = self.find(batch_id)
        answered(lambda: self._redis.hset(self._keys.batch(batch_id), BatchField.CANCEL, "1"))
        return report

    def _read(self, batch_id: str) -> tuple[bytes | None, int]:
        key = self._keys.batch(batch_id)
        (raw,) = self._pipelined(key, lambda pipe: pipe.hget(key, BatchField.REPORT))
        return raw, self._now_ms()

    def _now_ms(self) -> int:
        seconds, microseconds = answered(self._redis.time)
        return int(seconds) * 1000 + int(microseconds) // 1000

    def _pipelined(self, batch: str, send: Callable[[Any], object]) -> list[Any]:
        """Run commands on one batch's key (or '') and the index."""
        types = {self._keys.batches(): "zset"} | ({batch: "hash"} if batch else {})

        def run() -> list[Any]:
            with self._redis.pipeline(transaction=False) as pipe:
                send(pipe)
                return pipe.execute()

        return answered(lambda: quarantine.mended(self._protocol.run, types, run))
