"""What a submit writes of a job for RQ is what RQ itself would write."""

from __future__ import annotations

import json
import zlib
from typing import Any, cast

import pytest
from rq.job import Job, JobStatus
from rq.serializers import JSONSerializer

from mlx_serving.common import limits
from mlx_serving.common.errors import PayloadTooLarge
from mlx_serving.common.job.schema import JOB_FUNCTION, GenerationJob
from mlx_serving.producer.envelope import seal
from mlx_serving.worker.claiming.intake import read_job

MOMENT = ("created_at", "enqueued_at")


def job(**fields: Any) -> GenerationJob:
    given = {"model": "tally", "prompt": "echo 你好 👋", "seed": 7}
    return GenerationJob.build(**(given | fields))


@pytest.mark.parametrize("fields", [{}, {"lane": "bulk", "result_ttl": 60}, {"max_attempts": 5}])
def test_the_hash_is_rq_s_own(fields: dict[str, Any]) -> None:
    made = job(**fields)
    entry = seal(made, max_payload_bytes=1 << 20)
    rq_job = Job.create(
        JOB_FUNCTION, args=(made.to_wire(),), id=entry.job_id, origin=made.queue,
        description=f"generate {made.queue}", result_ttl=made.result_ttl,
        failure_ttl=made.result_ttl, status=JobStatus.QUEUED, serializer=JSONSerializer,
        connection=cast("Any", object()),
    )  # fmt: skip
    rq_job.enqueued_at = rq_job.created_at
    written = {k: v for k, v in rq_job.to_dict(include_meta=False).items() if v != ""}
    own = dict(entry.rq_fields)
    data, theirs = own.pop("data"), written.pop("data")
    assert json.loads(zlib.decompress(cast("bytes", data))) == json.loads(zlib.decompress(theirs))
    for name in MOMENT:
        assert len(str(own.pop(name))) == len(written.pop(name))
    assert own == written | {"status": "queued"}


def digest(**fields: Any) -> str:
    given = {"idempotency_key": "k", "seed": None}
    return seal(job(**(given | fields)), max_payload_bytes=1 << 20).digest


def test_a_digest_tells_payloads_apart_and_not_the_moment_of_their_submit() -> None:
    assert digest() == digest() != ""  # though each was given a seed of its own
    assert digest(metadata={"a": "1", "b": "2"}) == digest(metadata={"b": "2", "a": "1"})
    assert digest(deadline=5) == digest(deadline=4) == digest()
    others: list[dict[str, Any]]
    others = [{"seed": 1}, {"lane": "bulk"}, {"tenant": "acme"}, {"n": 2}, {"prompt": "x"}]
    assert len({digest(), *(digest(**fields) for fields in others)}) == 1 + len(others)
    assert digest(idempotency_key=None) == ""


def sealed_seed(made: GenerationJob) -> int:
    data = cast("bytes", seal(made, max_payload_bytes=1 << 20).rq_fields["data"])
    seed = read_job(data, limit=1 << 20).seed
    assert seed is not None
    return seed


def test_a_seed_is_drawn_unless_one_was_given() -> None:
    made = job(seed=None)
    assert 0 <= sealed_seed(made) < limits.SEED
    assert sealed_seed(made) != sealed_seed(made)
    assert made.seed is None
    assert sealed_seed(job(seed=3)) == 3


def test_what_one_submit_changes_another_does_not_see() -> None:
    first = seal(job(), max_payload_bytes=1 << 20)
    cast("dict[str, Any]", first.rq_fields)["status"] = "spoilt"
    assert seal(job(), max_payload_bytes=1 << 20).rq_fields["status"] == "queued"


def test_what_a_producer_lets_pass_a_worker_with_the_same_limit_reads() -> None:
    largest = 1 << 12
    while True:
        try:
            entry = seal(job(prompt="x" * largest), max_payload_bytes=1 << 12)
            break
        except PayloadTooLarge:
            largest -= 1
    assert read_job(cast("bytes", entry.rq_fields["data"]), limit=1 << 12).prompt == "x" * largest
