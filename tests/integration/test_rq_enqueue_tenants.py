"""Jobs of RQ's own enqueue obey what their payloads say: tenants' limits, deadlines, rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from rq import Queue
from rq.serializers import JSONSerializer

from mlx_serving import Client
from mlx_serving.common.protocol.adoption import Terms, adopt
from mlx_serving.common.protocol.refusal import Refusal
from tests.support.helpers import wait_until
from tests.support.protocol_driver import QUEUE, Driver, rq_fields
from tests.support.worker_process import InProcessWorker

if TYPE_CHECKING:
    from collections.abc import Iterator

    import redis

    from mlx_serving import GenerationResult
    from mlx_serving.common.redis.local import LocalRedis
    from mlx_serving.common.settings import Settings

pytestmark = [
    pytest.mark.may_leak(reason="jobs and limits stay at the end of a test"),
    pytest.mark.usefixtures("settled_redis"),
]

FUNCTION = "mlx_serving.worker.task.generate"


@pytest.fixture
def queue(redis_client: redis.Redis) -> Queue:
    return Queue(QUEUE, connection=redis_client, serializer=JSONSerializer)


@pytest.fixture
def client(settings: Settings) -> Iterator[Client]:
    with Client(settings=settings) as client:
        yield client


def enqueue(queue: Queue, count: int = 1, **fields: Any) -> list[str]:
    wire = {"v": 1, "min_protocol": 1, "model": "tally", "prompt": "x", "max_tokens": 5} | fields
    return [queue.enqueue(FUNCTION, wire).id for _ in range(count)]


def result(client: Client, redis_client: redis.Redis, job_id: str) -> GenerationResult:
    """Of a job that has no control hash before its first claim."""
    wait_until(lambda: redis_client.exists(client.keys.job(job_id)))
    return client.result(job_id, timeout=20)


def adopted(driver: Driver, *job_ids: str) -> None:
    for job_id in job_ids:
        driver.redis.hset(f"rq:job:{job_id}", mapping=rq_fields())  # type: ignore[arg-type]
        driver.redis.rpush(f"rq:queue:{QUEUE}", job_id)


def test_a_claim_says_of_which_jobs_nobody_read_the_payload(driver: Driver) -> None:
    adopted(driver, "stock")
    driver.enqueue("ours")
    assert {job.job_id: job.adopted for job in driver.claim().jobs} == {
        "stock": True, "ours": False,
    }  # fmt: skip


def test_jobs_that_go_back_stand_in_their_tenants_line_in_their_order(driver: Driver) -> None:
    driver.redis.hset(driver.keys.limits(), "running:acme", 0)
    driver.enqueue("before", tenant="acme")
    adopted(driver, "a", "b", "c")
    held = [(job.attempt, Terms(tenant="acme", rows=2)) for job in driver.claim().jobs]
    for _ in range(2):  # a resend changes nothing
        assert driver.protocol.run(adopt("w1", held)) == ["OK"] * 3
        line = driver.redis.lrange(driver.keys.line(QUEUE, "acme"), 0, -1)
        assert line == [b"before", b"a", b"b", b"c"]
        assert sorted(driver.listed()) == ["a", "b", "before", "c"]
    assert driver.claimed_ids() == []
    driver.redis.hset(driver.keys.limits(), "running:acme", 5)
    (before, first, second) = driver.claim().jobs
    assert [before.job_id, first.job_id, second.job_id] == ["before", "a", "b"]
    assert not first.adopted
    assert driver.redis.scard(driver.keys.tenant_running("acme")) == 5


def test_an_attempt_of_another_worker_changes_nothing(driver: Driver) -> None:
    adopted(driver, "a")
    (job,) = driver.claim().jobs
    before = driver.snapshot()
    call = adopt("w2", [(job.attempt, Terms(tenant="acme"))])
    assert driver.protocol.run(call) == ["FENCED"]
    assert driver.snapshot() == before


def test_the_limits_of_a_submit_hold_and_a_refused_job_is_still_the_workers(driver: Driver) -> None:
    driver.redis.hset(driver.keys.limits(), mapping={"queued:acme": 1, "running:acme": 4})
    adopted(driver, "a", "b", "c")
    terms = [Terms(tenant="acme", rows=5), Terms(tenant="acme"), Terms(tenant="acme")]
    held = [(job.attempt, t) for job, t in zip(driver.claim().jobs, terms, strict=True)]
    assert driver.protocol.run(adopt("w1", held)) == [
        Refusal("running", 4, 5), "OK", Refusal("queued", 1, 1),
    ]  # fmt: skip
    assert sorted(driver.leased()) == ["a", "c"]


def test_a_tenant_that_may_run_nothing_runs_nothing(
    queue: Queue, client: Client, local_redis: LocalRedis, redis_client: redis.Redis
) -> None:
    redis_client.hset("mlxs:limits", "running:acme", 0)
    job_ids = enqueue(queue, 5, tenant="acme")
    (free,) = enqueue(queue)
    with InProcessWorker(local_redis.url, rate=1000):
        result(client, redis_client, free)
        wait_until(lambda: redis_client.scard("mlxs:tenant:acme:queued") == 5)
        assert redis_client.zcard(f"mlxs:leases:{QUEUE}") == 0
        assert [client.status(job_id).seq for job_id in job_ids] == [0] * 5
        redis_client.hset("mlxs:limits", "running:acme", 1)
        assert [result(client, redis_client, i).state.value for i in job_ids] == ["finished"] * 5


def test_what_a_submit_would_refuse_ends_as_failed_by_name(
    queue: Queue, client: Client, local_redis: LocalRedis, redis_client: redis.Redis
) -> None:
    redis_client.hset("mlxs:limits", mapping={"running:acme": 4, "queued:shut": 0})
    (large,), (shut,) = enqueue(queue, n=5, tenant="acme"), enqueue(queue, tenant="shut")
    with InProcessWorker(local_redis.url, rate=1000):
        errors = [result(client, redis_client, i).error for i in (large, shut)]
    assert [(e.code, e.message) for e in errors if e] == [
        ("tenant_rows_exceeded", "n: the job has 5 rows, and tenant 'acme' may run 4"),
        ("tenant_limited", "tenant 'shut' has 0 jobs queued and may have 0"),
    ]


def test_its_deadline_and_result_ttl_hold_too(
    queue: Queue, client: Client, local_redis: LocalRedis, redis_client: redis.Redis
) -> None:
    (job_id,) = enqueue(queue, deadline=0.5, result_ttl=77, max_tokens=5000)
    with InProcessWorker(local_redis.url, rate=50):
        ended = result(client, redis_client, job_id)
    assert (ended.state.value, ended.error and ended.error.code) == (
        "expired", "deadline_exceeded",
    )  # fmt: skip
    assert 0 < redis_client.ttl(f"mlxs:job:{job_id}") <= 77
