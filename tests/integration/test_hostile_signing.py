"""Signed jobs end to end: what a worker with keys runs, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from rq import Queue
from rq.serializers import JSONSerializer

from mlx_serving import AsyncClient, Client
from mlx_serving.common.job.schema import JOB_FUNCTION, GenerationJob
from mlx_serving.common.protocol.fields import SIGNATURE_FIELD
from mlx_serving.common.signing import Signer
from mlx_serving.producer.envelope import seal
from tests.support.helpers import wait_until
from tests.support.worker_process import (
    InProcessWorker,
    WorkerProcess,
    check_answers,
    counted,
    quick_settings,
    submit,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlx_serving.common.events import ErrorInfo
    from mlx_serving.common.redis.local import LocalRedis
    from tests.support.protocol_driver import Driver

KEY, OTHER, NEXT = "k" * 32, "o" * 32, "n" * 32
JOB = GenerationJob.build(model="tally", prompt="x", max_tokens=5, result_ttl=60, seed=1)


@pytest.fixture
def client(settled_redis: LocalRedis) -> Iterator[Client]:
    with Client(settings=quick_settings(settled_redis.url, jobs__signing_keys=[KEY])) as client:
        yield client


@pytest.fixture
def worker(settled_redis: LocalRedis) -> Iterator[InProcessWorker]:
    with InProcessWorker(settled_redis.url, rate=500, jobs__signing_keys=[KEY]) as worker:
        yield worker


def enqueue(driver: Driver, job_id: str, *, queue: str = "tally:default", **changes: Any) -> None:
    """Enqueue a job that was signed as it should be, with changes to RQ's hash of it."""
    entry = seal(JOB, max_payload_bytes=1 << 20, signer=Signer([KEY]))
    signature = Signer([KEY]).sign(job_id, "tally:default", _payload(entry.rq_fields))
    fields = {**entry.rq_fields, SIGNATURE_FIELD: signature, **changes}
    known = {name: value for name, value in fields.items() if value is not None}
    driver.enqueue(job_id, queue, rq_fields=known)


def _payload(fields: Any) -> bytes:
    from mlx_serving.worker.claiming.intake import inflate

    return inflate(fields["data"], 1 << 20)


def refusal(client: Client, job_id: str) -> ErrorInfo:
    error = client.result(job_id, timeout=10).error
    assert error is not None
    return error


@pytest.mark.usefixtures("worker")
def test_signed_jobs_run(driver: Driver, client: Client) -> None:
    handles = submit(client, 8, 20)
    assert driver.redis.hget(f"rq:job:{handles[0].id}", SIGNATURE_FIELD)
    check_answers(client, handles, 20)
    enqueue(driver, "by-hand")
    assert client.result("by-hand", timeout=10).text == counted(5)


@pytest.mark.usefixtures("worker")
async def test_the_async_client_signs_too(settled_redis: LocalRedis) -> None:
    settings = quick_settings(settled_redis.url, jobs__signing_keys=[KEY])
    async with AsyncClient(settings=settings) as client:
        handle = await client.submit(JOB)
        assert (await handle.result(timeout=10)).text == counted(5)


OTHER_PROMPT = seal(
    GenerationJob.build(model="tally", prompt="other words", max_tokens=5, seed=1),
    max_payload_bytes=1 << 20,
).rq_fields["data"]

UNACCEPTED: dict[str, dict[str, Any]] = {
    "not signed": {SIGNATURE_FIELD: None},
    "an empty signature": {SIGNATURE_FIELD: ""},
    "signed by another key": {SIGNATURE_FIELD: Signer([OTHER]).sign("bad", "tally:default", b"")},
    "no signature at all": {SIGNATURE_FIELD: "yes"},
    "bytes that are no text": {SIGNATURE_FIELD: b"\xff\xfe"},
    "a megabyte": {SIGNATURE_FIELD: "v1." + "a" * (1 << 20)},
    "a version that is not known": {SIGNATURE_FIELD: "v2.00000000.AAAA"},
    "another payload": {"data": OTHER_PROMPT},
    "another queue": {"queue": "tally:bulk"},
}


@pytest.mark.usefixtures("worker")
def test_what_no_key_of_ours_signed_is_refused_and_the_batch_goes_on(
    driver: Driver, client: Client
) -> None:
    mates = submit(client, 4, 200)
    for number, changes in enumerate(UNACCEPTED.values()):
        enqueue(driver, f"bad{number}", **changes)
    codes = {name: refusal(client, f"bad{n}").code for n, name in enumerate(UNACCEPTED)}
    assert codes == dict.fromkeys(UNACCEPTED, "bad_signature")
    check_answers(client, mates, 200)


@pytest.mark.usefixtures("worker")
def test_a_job_replayed_under_another_id_is_refused(driver: Driver, client: Client) -> None:
    (handle,) = submit(client, 1, 5)
    check_answers(client, [handle], 5)
    stolen: Any = driver.redis.hgetall(f"rq:job:{handle.id}")
    fields = {name.decode(): value for name, value in stolen.items()} | {"status": "queued"}
    driver.enqueue("replayed", rq_fields=fields)
    error = refusal(client, "replayed")
    assert (error.code, error.message) == (
        "bad_signature", "the job's signature does not fit its id, queue and payload",
    )  # fmt: skip


@pytest.mark.usefixtures("worker")
def test_jobs_by_rqs_own_enqueue_are_refused(driver: Driver, client: Client) -> None:
    """Their payload need not even be JSON: it is not parsed."""
    json_queue = Queue("tally:default", connection=driver.redis, serializer=JSONSerializer)
    pickle_queue = Queue("tally:default", connection=driver.redis)
    jobs = [
        json_queue.enqueue(JOB_FUNCTION, JOB.to_wire(), result_ttl=60),
        pickle_queue.enqueue("os.system", "touch /x", result_ttl=60),
    ]
    for job in jobs:
        wait_until(lambda: driver.redis.exists(driver.keys.job(job.id)))  # noqa: B023 -- run at once
        assert refusal(client, job.id).code == "bad_signature"


def test_a_worker_without_keys_ignores_signatures(
    settled_redis: LocalRedis, driver: Driver, client: Client
) -> None:
    with InProcessWorker(settled_redis.url, rate=500):
        check_answers(client, submit(client, 2, 5), 5)
        enqueue(driver, "wrong", **{SIGNATURE_FIELD: "v1.00000000.AAAA"})
        assert client.result("wrong", timeout=10).text == counted(5)


def test_keys_rotate_under_load(settled_redis: LocalRedis) -> None:
    phases = [([KEY], [KEY, NEXT]), ([NEXT], [NEXT, KEY]), ([NEXT], [NEXT])]
    for signs, verifies in phases:
        settings = quick_settings(settled_redis.url, jobs__signing_keys=signs)
        with (
            InProcessWorker(settled_redis.url, rate=500, jobs__signing_keys=verifies),
            Client(settings=settings) as client,
        ):
            check_answers(client, submit(client, 4, 5), 5)


@pytest.mark.may_leak(reason="a worker that is killed at the end leaves its name in RQ's sets")
def test_keys_reach_the_child_and_no_log(
    settled_redis: LocalRedis, driver: Driver, client: Client
) -> None:
    url = settled_redis.url
    with WorkerProcess(url, "keyed", 200, jobs__signing_keys=[KEY], log__level="debug") as process:
        check_answers(client, submit(client, 2, 5), 5)
        enqueue(driver, "unsigned", **UNACCEPTED["not signed"])
        assert refusal(client, "unsigned").code == "bad_signature"
        log = Path(process._log.name).read_text()
    assert "bad_signature" in log
    assert KEY not in log


def test_a_signed_job_keeps_to_the_budget(driver: Driver, client: Client) -> None:
    """D11: 2.5 KiB and the payload, over all keys of a queued job; its share of indexes is 0.3."""
    (signed,) = submit(client, 1, 5)
    with Client(settings=quick_settings(client.endpoint.url)) as unsigned_client:
        (plain,) = submit(unsigned_client, 1, 5)
    sizes = [
        sum(
            driver.redis.memory_usage(key, samples=0) or 0
            for key in (driver.keys.job(handle.id), driver.keys.rq_job(handle.id))
        )
        for handle in (signed, plain)
    ]
    print(f"hashes of a queued job: {sizes[0]} bytes signed, {sizes[1]} unsigned")  # noqa: T201
    for handle in (signed, plain):
        handle.cancel()
    assert sizes[0] - sizes[1] <= 256
    assert sizes[0] <= 2200
