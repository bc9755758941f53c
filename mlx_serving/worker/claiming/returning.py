"""Jobs that go back to their queues, uncharged, for a worker that can run them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import redis
import structlog

from mlx_serving.common.protocol import calls

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from mlx_serving.common.protocol.calls import Returned
    from mlx_serving.common.protocol.client import Protocol
    from mlx_serving.worker.delivery.held import HeldJob
    from mlx_serving.worker.delivery.log import RedisFailures
    from mlx_serving.worker.delivery.publisher import Publisher

log = structlog.get_logger(__name__)

LOOK_SECONDS: Final = 1.0  # how often it looks whether the engine has what it was given


class Returning:
    """Releases held jobs, until Redis has taken it. For the thread that claims.

    `has(request_id)` says whether the engine has an attempt that it was given.
    """

    def __init__(
        self,
        protocol: Protocol,
        worker: str,
        publisher: Publisher,
        failures: RedisFailures,
        has: Callable[[str], bool],
    ) -> None:
        self._protocol, self._worker, self._publisher = protocol, worker, publisher
        self._failures, self._has = failures, has
        self._jobs: dict[HeldJob, Returned] = {}
        self._lost: set[HeldJob] = set()  # seen lately without rows in the engine
        self._looked_at = 0.0

    def __contains__(self, job: HeldJob) -> bool:
        """Whether the job is to go back."""
        return job in self._jobs

    def add(self, job: HeldJob) -> None:
        """Have a job go back with the next release."""
        self._jobs[job] = job.returned()

    def release(self, jobs: Mapping[HeldJob, Returned] = {}) -> None:
        """Give these back, the last one to the very front, and those that were added before."""
        self._jobs |= jobs
        if not self._jobs:
            return
        try:
            self._protocol.run(calls.release(self._worker, [*self._jobs.values()]))
        except redis.RedisError as error:
            self._failures.note(error)
            return
        self._publisher.let_go(self._jobs)
        self._jobs = {}

    def look(self) -> None:
        """Have jobs go back that the engine was given and has no more: nothing would end them.

        Only what it did not have the last time either: a row that ended may be on its way to us.
        """
        now = time.monotonic()
        if now < self._looked_at + LOOK_SECONDS:
            return
        self._looked_at = now
        placed = [job for job in self._publisher.held() if job.placed and not job.over]
        lost = {job for job in placed if job not in self and not self._has(job.request_id)}
        for job in lost & self._lost:
            log.error("engine_lost_job", **job.names())
            self.add(job)
        self._lost = lost
