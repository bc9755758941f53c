"""What the log says of the jobs that a worker holds. No text of theirs, ever."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import structlog

from mlx_serving.common.telemetry import says

if TYPE_CHECKING:
    from mlx_serving.common.protocol.calls import RowReply
    from mlx_serving.common.states import JobState
    from mlx_serving.worker.delivery.held import HeldJob


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
