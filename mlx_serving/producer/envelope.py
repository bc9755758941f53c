"""Builds what the enqueue script writes for a job: its control fields, and RQ's own job hash.

RQ itself builds the hash, so that RQ's tools can read it.
"""

from __future__ import annotations

import hashlib
import math
import secrets
import zlib
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, cast

import msgspec
from rq.job import Job, JobStatus
from rq.serializers import JSONSerializer

from mlx_serving.common import limits
from mlx_serving.common.errors import FieldError, PayloadTooLarge
from mlx_serving.common.job.schema import JOB_FUNCTION
from mlx_serving.common.lifetimes import DEFAULT
from mlx_serving.common.protocol.calls import EnqueueEntry, iso_now
from mlx_serving.common.protocol.fields import SIGNATURE_FIELD
from mlx_serving.common.signing import Signer
from mlx_serving.producer.marks import marks

if TYPE_CHECKING:
    from collections.abc import Mapping

    from redis import Redis

    from mlx_serving.common.job.schema import GenerationJob
    from mlx_serving.common.lifetimes import Lifetimes

UNSIGNED: Final = Signer()

RELATIVE: Final = frozenset({"v", "min_protocol", "deadline", "traceparent"})
"""What a resend of the same job may say otherwise: it counts from now, or names the caller."""

# RQ wants a connection for each job, but a job that is only turned into a hash uses none.
_NO_CONNECTION = cast("Redis", object())


def seal(
    job: GenerationJob,
    *,
    max_payload_bytes: int,
    signer: Signer = UNSIGNED,
    lifetimes: Lifetimes = DEFAULT,
) -> EnqueueEntry:
    """Build the entry that is enqueued: draw a seed, choose an id, build RQ's hash, sign it.

    Raises:
        PayloadTooLarge: its JSON form is over ``max_payload_bytes``.

    """
    wire = job.to_wire()
    digest = _digest(wire) if job.idempotency_key else ""
    if job.seed is None:
        wire["seed"] = secrets.randbelow(limits.SEED)
    payload = _payload(wire)
    if len(payload) > max_payload_bytes:
        reason = f"the job is {len(payload)} bytes of JSON, more than {max_payload_bytes}"
        raise PayloadTooLarge([FieldError("", reason)])
    job_id = job.job_id()
    return EnqueueEntry(
        job_id=job_id,
        queue=job.queue,
        rq_fields=_rq_fields(job, job_id, payload, signer),
        max_attempts=job.max_attempts,
        min_protocol=wire["min_protocol"],
        deadline_ms=_milliseconds(job.deadline),
        timeout_ms=_milliseconds(job.timeout),
        abandon_ms=_milliseconds(job.abandon_after),
        result_ttl=job.result_ttl,
        lifetimes=lifetimes,
        stream=job.stream,
        tenant=job.tenant or "",
        marks=marks(job),
        idempotency_key=job.idempotency_key or "",
        digest=digest,
    )


def _digest(wire: dict[str, object]) -> str:
    """16 hex digits: the same for jobs that ask for the same; a seed counts if the job has one."""
    said = {name: value for name, value in wire.items() if name not in RELATIVE}
    text = msgspec.json.encode(said, order="deterministic")
    return hashlib.blake2b(text, digest_size=8).hexdigest()


def _payload(wire: dict[str, object]) -> bytes:
    """RQ's form of a call, [function, instance, args, kwargs], as its JSONSerializer reads it."""
    return msgspec.json.encode([JOB_FUNCTION, None, [wire], {}])


def _rq_fields(
    job: GenerationJob, job_id: str, payload: bytes, signer: Signer
) -> dict[str, str | bytes | int]:
    """RQ's hash of the job, without empty fields: they cost memory and mean the same."""
    now = iso_now()
    fields = {
        **_rq_template(job.kind, job.queue, job.result_ttl),
        "created_at": now,
        "enqueued_at": now,
        "data": zlib.compress(payload),
    }
    signature = signer.sign(job_id, job.queue, payload)
    return {**fields, SIGNATURE_FIELD: signature} if signature else fields


@lru_cache(maxsize=256)
def _rq_template(kind: str, queue: str, result_ttl: int) -> Mapping[str, str | bytes | int]:
    """What RQ writes for any job of a kind; to ask RQ for each job would double a submit's time."""
    rq_job = Job.create(
        JOB_FUNCTION,
        args=(),
        id="template",
        origin=queue,
        # RQ's default description shows the arguments, that is the prompt.
        description=f"{kind} {queue}",
        result_ttl=result_ttl,
        failure_ttl=result_ttl,
        status=JobStatus.QUEUED,
        serializer=JSONSerializer,
        connection=_NO_CONNECTION,
    )
    fields = rq_job.to_dict(include_meta=False) | {"status": JobStatus.QUEUED.value}
    return MappingProxyType({name: value for name, value in fields.items() if value != ""})


def _milliseconds(seconds: float | None) -> int:
    return math.ceil(seconds * 1000) if seconds is not None else 0
