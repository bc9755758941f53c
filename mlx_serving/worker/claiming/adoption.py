"""Jobs of RQ's own enqueue: nobody read their payloads before a worker does.

What a payload asks of the queue (its tenant, its deadline, and so on) is then written to the job's
control hash, and the job goes back to its queue to be claimed by it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import redis
import structlog

from mlx_serving.common.errors import TenantLimited, TenantRowsExceeded
from mlx_serving.common.protocol.adoption import Terms, adopt
from mlx_serving.common.protocol.refusal import Refusal

if TYPE_CHECKING:
    from mlx_serving.common.job.schema import GenerationJob
    from mlx_serving.common.protocol.client import Protocol
    from mlx_serving.worker.claiming.returning import Returning
    from mlx_serving.worker.delivery.held import HeldJob
    from mlx_serving.worker.delivery.log import RedisFailures
    from mlx_serving.worker.delivery.publisher import Publisher

log = structlog.get_logger(__name__)


class NotYetAdopted(Exception):  # noqa: N818 -- it is what is so
    """The job's payload asks for terms that its control hash does not have yet."""

    def __init__(self, terms: Terms) -> None:
        super().__init__("the job's terms are not in its control hash")
        self.terms = terms


def check_adopted(job: GenerationJob) -> None:
    """Check that the payload of a job of RQ's own enqueue asks nothing special of the queue.

    Raises:
        NotYetAdopted: it does.

    """
    terms = Terms(
        job.max_attempts, _milliseconds(job.deadline), _milliseconds(job.timeout),
        _milliseconds(job.abandon_after), job.result_ttl, job.stream, job.tenant or "", job.n,
    )  # fmt: skip
    if terms != Terms():
        raise NotYetAdopted(terms)


class Adoption:
    """Hands jobs back with their terms. For the thread that claims."""

    def __init__(
        self,
        protocol: Protocol,
        worker: str,
        publisher: Publisher,
        returning: Returning,
        failures: RedisFailures,
    ) -> None:
        self._protocol, self._worker = protocol, worker
        self._publisher, self._returning, self._failures = publisher, returning, failures
        self._jobs: list[tuple[HeldJob, Terms]] = []

    def add(self, job: HeldJob, terms: Terms) -> None:
        """Have a job go back with the next `run`."""
        self._jobs.append((job, terms))

    def run(self) -> None:
        """Hand the jobs back; one that its tenant may not have ends as failed."""
        jobs, self._jobs = self._jobs, []
        if not jobs:
            return
        call = adopt(self._worker, [(job.claimed.attempt, terms) for job, terms in jobs])
        try:
            outcomes = self._protocol.run(call)
        except redis.RedisError as error:
            self._failures.note(error)
            for job, _ in jobs:
                self._returning.add(job)
            return
        for (job, terms), outcome in zip(jobs, outcomes, strict=True):
            if isinstance(outcome, Refusal):
                self._publisher.fail(job, *_refused(terms, outcome))
            else:
                log.info("job_adopted", **job.names(), outcome=outcome)
                self._publisher.let_go([job])


def _refused(terms: Terms, why: Refusal) -> tuple[str, str]:
    """Code and message, as a submit would tell them."""
    text = why.of_tenant(terms.tenant)
    if why.reason == "running":
        return TenantRowsExceeded.code, f"n: {text}"
    return TenantLimited.code, text


def _milliseconds(seconds: float | None) -> int:
    return math.ceil(seconds * 1000) if seconds is not None else 0
