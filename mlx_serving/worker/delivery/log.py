"""What the log says of jobs and of Redis: a line for each that ended, one when Redis is away."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Final

import redis
import structlog

from mlx_serving.common.redis.faults import fault_of
from mlx_serving.common.telemetry import says

if TYPE_CHECKING:
    from redis import Redis

    from mlx_serving.common.protocol.calls import RowReply
    from mlx_serving.common.states import JobState
    from mlx_serving.worker.delivery.held import HeldJob

log = structlog.get_logger(__name__)

QUIET_SECONDS: Final = 10.0  # without a failure: the outage is over


class RedisFailures:
    """Logs once when Redis begins to fail one thread's calls, and once when it is back."""

    def __init__(self, client: Redis) -> None:
        self._client = client
        self._down = False
        self._failed_at = 0.0  # monotonic seconds of the last failure

    def note(self, error: redis.RedisError) -> None:
        """Note a failure."""
        if not self._down:
            log.warning("redis_unavailable", reason=type(error).__name__, code=fault_of(error).code)
        self._down, self._failed_at = True, time.monotonic()
        if isinstance(error, redis.ReadOnlyError):
            # Connect anew: the name may lead to another primary by now.
            self._client.connection_pool.disconnect()

    def note_quiet(self) -> None:
        """Note a turn without a failure. Many turns ask Redis nothing, so one proves little."""
        if self._down and time.monotonic() - self._failed_at >= QUIET_SECONDS:
            log.info("redis_available")
            self._down = False


class JobLog:
    """Records on held jobs; made after logging was configured."""

    def __init__(self) -> None:
        # Bound once: structlog looks a module's logger up anew at each record.
        self._log = structlog.get_logger(__name__).bind()

    def started(self, job: HeldJob) -> None:
        """An attempt goes to the engine."""
        if says(self._log, logging.INFO):
            self._log.info(
                "job_started", **job.names(), queue=job.claimed.queue, age_ms=job.age_ms,
                prompt_tokens=job.prompt_tokens, resumed_tokens=job.kept_tokens,
            )  # fmt: skip

    def ended(self, job: HeldJob, state: JobState) -> None:
        """Redis has a job's end."""
        if says(self._log, logging.INFO):
            code = job.ending.error.code if job.ending and job.ending.error else None
            self._log.info(
                "job_ended", **job.names(), state=state.value, code=code,
                finish_reason=job.finish_reason, **job.report(),
            )  # fmt: skip

    def handed_over(self, job: HeldJob) -> None:
        """A job went back to its queue."""
        self._log.info("job_handed_over", **job.names(), **job.report())

    def lost(self, job: HeldJob, reply: RowReply) -> None:
        """Redis takes nothing more of a job from this worker."""
        self._log.warning("job_lost", **job.names(), status=reply.status, reason=reply.reason)
