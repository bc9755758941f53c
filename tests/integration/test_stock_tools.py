"""What RQ's own tools show of our workers and jobs; and that looking changes nothing."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING, Any

import pytest
from rq import Queue, Worker
from rq.job import Job
from rq.registry import FailedJobRegistry, FinishedJobRegistry, StartedJobRegistry
from rq.results import Result
from rq.serializers import JSONSerializer

from tests.support.helpers import wait_until
from tests.support.protocol_driver import QUEUE, Driver, rq_fields
from tests.support.worker_process import (
    InProcessWorker,
    check_answers,
    counted,
    submit,
    wait_until_decoded,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    import redis

    from mlx_serving import Client
    from mlx_serving.common.redis.local import LocalRedis

RQ_INFO_10_MINUTES_AHEAD = textwrap.dedent(
    """
    import datetime, sys, time
    ahead = 600
    real_time, real_datetime = time.time, datetime.datetime
    time.time = lambda: real_time() + ahead
    class Ahead(real_datetime):
        @classmethod
        def now(cls, tz=None):
            return real_datetime.now(tz) + datetime.timedelta(seconds=ahead)
    datetime.datetime = Ahead
    import rq.utils
    assert rq.utils.current_timestamp() > real_time() + 590, "the clock is not ahead"
    from rq.cli.cli import main
    main(["info", "-u", sys.argv[1]])
    """
)


@pytest.fixture
def queue(redis_client: redis.Redis) -> Queue:
    return Queue(QUEUE, connection=redis_client, serializer=JSONSerializer)


@pytest.fixture
def worker(settled_redis: LocalRedis) -> Iterator[InProcessWorker]:
    with InProcessWorker(settled_redis.url, rate=50, worker__rq_results=True) as worker:
        yield worker


def info(
    url: str,
    script: str = "from rq.cli.cli import main; import sys; main(['info', '-u', sys.argv[1]])",
) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script, url], capture_output=True, text=True, check=False, timeout=30
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.usefixtures("worker")
def test_rq_info_shows_what_is(client: Client, settled_redis: LocalRedis) -> None:
    done, running = submit(client, 2, 3), submit(client, 3, 5000)
    check_answers(client, done, 3)
    wait_until_decoded(client, running)
    wait_until(lambda: "busy" in info(settled_redis.url), timeout=5)
    shown = info(settled_redis.url)
    assert "3 executing, 2 finished, 0 failed" in shown
    assert "1 workers" in shown
    assert "jobs: 2 finished, 0 failed" in shown
    for handle in running:
        client.cancel(handle.id)


@pytest.mark.usefixtures("worker")
def test_rq_info_from_a_clock_10_minutes_ahead_ends_no_lease(
    client: Client, settled_redis: LocalRedis, queue: Queue
) -> None:
    handles = submit(client, 8, 150)
    wait_until_decoded(client, handles)
    for _ in range(2):
        info(settled_redis.url, RQ_INFO_10_MINUTES_AHEAD)
    assert {client.status(h.id).state.value for h in handles} == {"running"}
    assert {Job.fetch(h.id, connection=queue.connection, serializer=JSONSerializer).get_status()
            for h in handles} == {"started"}  # fmt: skip
    check_answers(client, handles, 150)
    assert {client.status(h.id).attempts for h in handles} == {0}


def test_workers_are_seen_with_what_they_run(
    client: Client, worker: InProcessWorker, redis_client: redis.Redis
) -> None:
    handles = submit(client, 4, 5000)
    wait_until_decoded(client, handles)
    (seen,) = Worker.all(connection=redis_client, serializer=JSONSerializer)
    assert seen.name == worker.name
    assert seen.queue_names() == ["tally:interactive", "tally:default", "tally:bulk"]
    wait_until(lambda: Worker.all(connection=redis_client)[0].get_state() == "busy", timeout=5)
    ids = {handle.id for handle in handles}
    assert {execution.job_id for execution in seen.get_current_executions()} == ids
    assert seen.current_execution_count == 4
    assert seen.get_current_job_id() in ids
    current = seen.get_current_job()
    assert current is not None
    assert current.worker_name == worker.name
    for handle in handles:
        client.cancel(handle.id)
        client.result(handle.id, timeout=5)
    assert seen.get_current_executions(refresh=True) == []
    assert seen.get_current_job_id() is None
    (seen,) = Worker.all(connection=redis_client)
    assert (seen.successful_job_count, seen.failed_job_count) == (0, 4)


@pytest.mark.usefixtures("worker")
def test_a_finished_job_is_one_to_rq(client: Client, queue: Queue) -> None:
    (handle,) = submit(client, 1, 20)
    result = client.result(handle.id, timeout=10)
    job = Job.fetch(handle.id, connection=queue.connection, serializer=JSONSerializer)
    assert job.get_status() == "finished"
    assert job.is_finished
    value: Any = job.return_value()
    assert value["choices"][0]["text"] == counted(20)
    assert (value["id"], value["state"]) == (handle.id, "finished")
    latest = job.latest_result()
    assert latest is not None
    assert (latest.type, latest.worker_name) == (Result.Type.SUCCESSFUL, result.worker)
    assert len(job.results()) == 1
    assert job.started_at is not None
    assert job.ended_at is not None
    assert handle.id in FinishedJobRegistry(queue=queue)
    assert job.get_executions() == []


@pytest.mark.usefixtures("worker")
def test_a_running_job_is_one_to_rq(client: Client, queue: Queue) -> None:
    (handle,) = submit(client, 1, 5000)
    wait_until_decoded(client, [handle])
    job = Job.fetch(handle.id, connection=queue.connection, serializer=JSONSerializer)
    assert job.is_started
    assert handle.id in StartedJobRegistry(queue=queue)
    (execution,) = job.get_executions()
    assert execution.job_id == handle.id
    assert job.return_value() is None
    client.cancel(handle.id)


@pytest.mark.usefixtures("worker")
def test_a_failed_job_is_one_to_rq(client: Client, queue: Queue) -> None:
    driver = Driver(queue.connection)
    driver.enqueue("bad", rq_fields=rq_fields() | {"data": b"no payload"})
    client.result("bad", timeout=5)
    job = Job.fetch("bad", connection=queue.connection, serializer=JSONSerializer)
    assert job.is_failed
    latest = job.latest_result()
    assert latest is not None
    assert latest.type is Result.Type.FAILED
    assert latest.exc_string is not None
    assert latest.exc_string.startswith("corrupt_job: ")
    assert "bad" in FailedJobRegistry(queue=queue)


@pytest.mark.usefixtures("worker")
def test_rqs_own_enqueue_runs_too(client: Client, queue: Queue) -> None:
    wire = {"v": 1, "min_protocol": 1, "model": "tally", "prompt": "x", "max_tokens": 5}
    job = queue.enqueue("mlx_serving.worker.task.generate", wire)
    wait_until(lambda: Driver(queue.connection).protocol.record(job.id))
    result = client.result(job.id, timeout=10)
    assert (result.state.value, result.text) == ("finished", counted(5))
    assert job.get_status() == "finished"
