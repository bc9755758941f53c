"""The jobs that a worker holds, and what of them no flush has taken. Its owner's lock guards it.

The engine's thread leaves its steps here as they are, at little cost. They are given to their jobs
when somebody asks: mostly the next flush does, while the device computes.
"""

from __future__ import annotations

import time
from math import inf
from typing import TYPE_CHECKING, Final

from mlx_serving.worker.delivery.held import EVENT_TOKENS
from mlx_serving.worker.process.inflight_file import RowState

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mlx_serving.common.protocol.calls import CommitRow
    from mlx_serving.worker.delivery.held import HeldJob
    from mlx_serving.worker.engine.interface import Output
    from mlx_serving.worker.process.inflight_file import InflightJobs
    from mlx_serving.worker.status.counters import Counters

BULK_TOKENS: Final = 16  # a job without `stream` commits every so many tokens a choice …
BULK_SECONDS: Final = 0.5  # … or so often


class Holdings:
    """Held jobs by id, steps that no job has been given, and jobs with something to write."""

    def __init__(
        self, inflight: InflightJobs, counters: Counters, *, rq_results: bool = False
    ) -> None:
        self._inflight, self._counters, self._rq_results = inflight, counters, rq_results
        self.jobs: dict[str, HeldJob] = {}
        self._by_request: dict[str, HeldJob] = {}  # the same, by the name of the attempt
        self._dirty: dict[str, HeldJob] = {}
        self._steps: list[tuple[float, Sequence[Output]]] = []
        self._waited = 0  # steps since rows were taken
        self._unbegun: set[str] = set()  # attempts without a token
        self.backlog = 0  # tokens that no flush has taken yet
        self._expires_at = inf  # no job's time is over before that

    @property
    def pending(self) -> bool:
        """Whether a flush may find anything."""
        return bool(self._dirty or self._steps)

    def hold(self, job: HeldJob) -> None:
        """Keep a job."""
        self.jobs[job.job_id] = self._by_request[job.request_id] = job
        self._unbegun.add(job.request_id)
        self._inflight.hold(job.request_id)
        self._expires_at = min(self._expires_at, job.expires_at)

    def forget(self, job_id: str) -> None:
        """Drop a job and what is pending of it; unknown ids are ignored."""
        job = self.jobs.pop(job_id, None)
        self._dirty.pop(job_id, None)
        if job is not None:
            del self._by_request[job.request_id]
            self._inflight.drop(job.request_id)
            self._unbegun.discard(job.request_id)
            self.backlog -= job.unsent

    def mark(self, job: HeldJob) -> None:
        """Say that a job has something to write."""
        self._dirty[job.job_id] = job

    def expired(self, now: float) -> list[HeldJob]:
        """Jobs whose time is over at `now`, in monotonic seconds; looks at them only when due."""
        if now < self._expires_at:
            return []
        jobs = [job for job in self.jobs.values() if job.ending is None]
        self._expires_at = min(
            (job.expires_at for job in jobs if now < job.expires_at), default=inf
        )
        return [job for job in jobs if now >= job.expires_at]

    # Steps of the engine

    def add(self, outputs: Sequence[Output], now: float) -> bool:
        """Keep a step's outputs; True if they are to be given to their jobs at once."""
        self._steps.append((now, outputs))
        self._waited += 1
        self.backlog += sum(len(output.token_ids) for output in outputs)
        return (
            self._waited >= EVENT_TOKENS
            or any(output.finish_reason for output in outputs)
            or (bool(self._unbegun) and any(o.request_id in self._unbegun for o in outputs))
        )

    def give(self) -> tuple[bool, list[str]]:
        """Give all steps to their jobs; drop the outputs of attempts that are gone.

        Returns whether a consumer should not wait, and the attempts of which a row failed.
        """
        urgent, failed = False, []
        steps, self._steps = self._steps, []
        for now, outputs in steps:
            progress = [(job, o) for o in outputs if (job := self._live(o)) is not None]
            for job, output in progress:
                urgent |= self._give(job, output, now)
                if output.error is not None:  # its other choices stop
                    failed.append(job.request_id)
            self._counters.stepped(progress, now)
        return urgent, failed

    def _live(self, output: Output) -> HeldJob | None:
        """The job whose held attempt decoded it, while its end is open."""
        job = self._by_request.get(output.request_id)
        if job is None or job.ending is not None:
            self.backlog -= len(output.token_ids)
            return None
        return job

    def _give(self, job: HeldJob, output: Output, now: float) -> bool:
        urgent = job.add(output)
        self._unbegun.discard(job.request_id)
        self._dirty[job.job_id] = job
        if job.ending is not None:
            self._inflight.mark(job.request_id, RowState.HELD)
        elif job.proves(now):
            self._inflight.mark(job.request_id, RowState.PROVEN)
        return urgent

    # What a flush takes

    def rows(self, worker: str, *, everything: bool) -> list[CommitRow]:
        """Rows of all jobs that are due; with `everything` of bulk jobs too."""
        self._waited, now = 0, time.monotonic()
        rows: list[CommitRow] = []
        for job in [j for j in self._dirty.values() if everything or _is_due(j, now)]:
            del self._dirty[job.job_id]
            job.committed_at = now
            self.backlog -= job.unsent
            rows += job.rows(worker, rq_results=self._rq_results)
        return rows


def _is_due(job: HeldJob, now: float) -> bool:
    if job.claimed.stream or job.ending or job.model:
        return True
    waited = now - job.committed_at
    return job.unsent >= BULK_TOKENS * len(job.choices) or waited >= BULK_SECONDS
