"""A job as the enqueue script wants it: its control fields, and RQ's own job hash.

RQ's hash is built by RQ itself, so that RQ's tools read it as one of theirs.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, cast

import msgspec
from rq.job import Job, JobStatus
from rq.serializers import JSONSerializer

from mlx_serving.common.calls import EnqueueEntry
from mlx_serving.common.errors import FieldError, PayloadTooLarge

if TYPE_CHECKING:
    from redis import Redis

    from mlx_serving.common.jobs import GenerationJob

JOB_FUNCTION: Final = "mlx_serving.worker.task.generate"
"""The one function that a job may name; never imported here."""

# RQ asks each job for a connection, and a job that is only turned into a hash needs none.
_NO_CONNECTION = cast("Redis", object())


def seal(job: GenerationJob, *, max_payload_bytes: int) -> EnqueueEntry:
    """Turn a job into what is enqueued: resolve its seed, fix its id, build RQ's hash.

    Raises:
        PayloadTooLarge: its JSON form is over ``max_payload_bytes``.

    """
    wire = job.resolved().to_wire()
    size = len(msgspec.json.encode(wire))
    if size > max_payload_bytes:
        raise PayloadTooLarge(
            [FieldError("", f"the job is {size} bytes of JSON, more than {max_payload_bytes}")]
        )
    job_id = job.job_id()
    return EnqueueEntry(
        job_id=job_id,
        queue=job.queue,
        rq_fields=_rq_fields(job, job_id, wire),
        max_attempts=job.max_attempts,
        min_protocol=job.min_protocol,
        deadline_ms=_milliseconds(job.deadline),
        timeout_ms=_milliseconds(job.timeout),
        abandon_ms=_milliseconds(job.abandon_after),
        result_ttl=job.result_ttl,
        stream=job.stream,
    )


def _rq_fields(
    job: GenerationJob, job_id: str, wire: dict[str, object]
) -> dict[str, str | bytes | int]:
    """RQ's hash of the job, without its empty fields: they cost memory and read the same."""
    rq_job = Job.create(
        JOB_FUNCTION,
        args=(wire,),
        id=job_id,
        origin=job.queue,
        # RQ's default description shows the arguments, that is the prompt.
        description=f"{job.kind} {job.queue}",
        result_ttl=job.result_ttl,
        failure_ttl=job.result_ttl,
        status=JobStatus.QUEUED,
        serializer=JSONSerializer,
        connection=_NO_CONNECTION,
    )
    rq_job.enqueued_at = rq_job.created_at
    fields = rq_job.to_dict(include_meta=False)
    fields["status"] = JobStatus.QUEUED.value
    return {name: value for name, value in fields.items() if value != ""}


def _milliseconds(seconds: float | None) -> int:
    return math.ceil(seconds * 1000) if seconds is not None else 0
