"""How RQ 3.0 and redis-py lose or double things by default: each shown to fail here.

The test that holds ours beside each of them is named in the table of docs/explanation/delivery.md.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import tracemalloc
import zlib
from typing import TYPE_CHECKING, Any

import pytest
import redis
from rq import Queue, SimpleWorker
from rq.executions import Execution
from rq.job import Job, JobStatus
from rq.registry import FailedJobRegistry, StartedJobRegistry
from rq.serializers import JSONSerializer
from rq.utils import current_timestamp

from tests.support import rq_jobs
from tests.support.helpers import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from mlx_serving.common.redis.local import LocalRedis
    from tests.support.lossy_proxy import LossyProxy

pytestmark = pytest.mark.may_leak("RQ's own jobs stay where its defaults leave them")

JOB_ID = "stock"
AHEAD = 600  # seconds that another Mac's clock is ahead


@pytest.fixture(autouse=True)
def _rqs_logger_as_it_was() -> Iterator[None]:
    """A stock worker sets its logger's level and handlers for the whole process."""
    logger = logging.getLogger("rq.worker")
    level, handlers = logger.level, logger.handlers[:]
    yield
    logger.setLevel(level)
    logger.handlers[:] = handlers


@pytest.fixture
def queue(redis_client: redis.Redis) -> Queue:
    return make_queue("stock", redis_client)


def make_queue(name: str, client: redis.Redis) -> Queue:
    return Queue(name, connection=client, serializer=JSONSerializer)


def stock_client(proxy: LossyProxy) -> redis.Redis:
    """With redis-py's own defaults: ten retries. (`from_url` has none.)"""
    return redis.Redis(unix_socket_path=str(proxy.socket))


def stock_worker(*queues: Queue) -> SimpleWorker:
    return SimpleWorker(queues, connection=queues[0].connection, serializer=JSONSerializer)


def start(server: LocalRedis, how: str, *queues: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.support.rq_jobs", server.url, how, *queues]
    )


def members(client: redis.Redis, key: bytes) -> list[str]:
    """Job ids in a list, a set or a sorted set; none in any other key."""
    read: dict[object, Callable[[], Iterable[Any]]] = {
        b"list": lambda: client.lrange(key, 0, -1),
        b"set": lambda: client.smembers(key),
        b"zset": lambda: client.zrange(key, 0, -1),
    }
    found = read.get(client.type(key), list)()
    return [member.decode().partition(":")[0] for member in found]


def status(job: Job) -> JobStatus | None:
    return job.get_status(refresh=True)


def work_off(queue: Queue) -> None:
    stock_worker(queue).work(burst=True, logging_level="CRITICAL")


@pytest.fixture
def running(
    local_redis: LocalRedis, queue: Queue, tmp_path: Path
) -> Iterator[tuple[subprocess.Popen[bytes], Job]]:
    """A stock worker in the middle of a job that ends when a file `go` is there."""
    job = queue.enqueue(rq_jobs.answer_when_told, "by", str(tmp_path), job_id=JOB_ID)
    process = start(local_redis, "works", queue.name)
    try:
        wait_until(lambda: list(tmp_path.glob("running.*")), what="the job runs")
        yield process, job
    finally:
        process.kill()
        process.wait()


def test_a_worker_of_two_queues_that_is_killed_after_the_pop_loses_the_job(
    local_redis: LocalRedis, queue: Queue, redis_client: redis.Redis
) -> None:
    other = make_queue("other", redis_client)
    job = queue.enqueue(rq_jobs.answer, "x", job_id=JOB_ID)
    assert start(local_redis, "dies", queue.name, other.name).wait(30) == -signal.SIGKILL
    for _ in range(3):
        stock_worker(queue, other).run_maintenance_tasks()
    work_off(queue)
    assert status(job) is JobStatus.QUEUED
    # No list and no registry will ever give it to a worker.
    assert not any(JOB_ID in members(redis_client, key) for key in redis_client.scan_iter())


def test_on_one_queue_it_fails_after_more_than_a_minute(
    local_redis: LocalRedis, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = queue.enqueue(rq_jobs.answer, "x", job_id=JOB_ID)
    assert start(local_redis, "dies", queue.name).wait(30) == -signal.SIGKILL
    worker = stock_worker(queue)
    worker.run_maintenance_tasks()
    worker.run_maintenance_tasks()
    assert status(job) is JobStatus.QUEUED  # seen twice, and too early to act on
    monkeypatch.setattr(
        "rq.intermediate_queue.now",
        lambda: job.enqueued_at.replace(year=9999),  # type: ignore[union-attr]
    )
    worker.run_maintenance_tasks()
    assert status(job) is JobStatus.FAILED


def test_a_zombie_overwrites_the_result_of_the_worker_that_took_over(
    running: tuple[subprocess.Popen[bytes], Job], queue: Queue, tmp_path: Path
) -> None:
    zombie, job = running
    os.kill(zombie.pid, signal.SIGSTOP)
    StartedJobRegistry(queue=queue).cleanup(current_timestamp() + AHEAD)
    FailedJobRegistry(queue=queue).requeue(job.id)
    (tmp_path / "go").touch()
    work_off(queue)
    assert job.return_value(refresh=True) == f"by {os.getpid()}"
    os.kill(zombie.pid, signal.SIGCONT)
    wait_until(lambda: job.return_value(refresh=True) == f"by {zombie.pid}")


def test_a_clock_that_is_ahead_ends_a_job_that_runs(
    running: tuple[subprocess.Popen[bytes], Job], queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RQ's maintenance, which `rq info` runs too, compares scores with its own wall clock."""
    process, job = running
    assert status(job) is JobStatus.STARTED
    monkeypatch.setattr("rq.registry.current_timestamp", lambda: current_timestamp() + AHEAD)
    stock_worker(queue).clean_registries()
    assert process.poll() is None
    assert status(job) is JobStatus.FAILED


def test_a_cancel_does_not_reach_the_worker(
    running: tuple[subprocess.Popen[bytes], Job], tmp_path: Path
) -> None:
    process, job = running
    job.cancel()
    (tmp_path / "go").touch()
    assert process.wait(30) == 0
    assert job.return_value(refresh=True) == f"by {process.pid}"


def test_who_can_write_a_job_hash_runs_any_function(
    queue: Queue, redis_client: redis.Redis, tmp_path: Path
) -> None:
    """JSON keeps pickle's code out, not the function's path."""
    job = queue.enqueue(rq_jobs.answer, "x", job_id=JOB_ID)
    data = json.dumps(["os.mkdir", None, [str(tmp_path / "made")], {}]).encode()
    redis_client.hset(job.key, "data", zlib.compress(data))
    work_off(queue)
    assert (tmp_path / "made").is_dir()


def test_fetching_a_job_inflates_without_a_bound(queue: Queue, redis_client: redis.Redis) -> None:
    job = queue.enqueue(rq_jobs.answer, "x", job_id=JOB_ID)
    bomb = zlib.compress(bytes(100 << 20), 9)
    assert len(bomb) < 200_000
    redis_client.hset(job.key, "data", bomb)
    tracemalloc.start()
    try:
        Job.fetch(JOB_ID, connection=redis_client, serializer=JSONSerializer)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak > 100 << 20


def test_a_malformed_hash_ends_one_worker_after_the_other(
    queue: Queue, redis_client: redis.Redis
) -> None:
    """The first one by taking the job, the others by looking after what the first one left."""
    job = queue.enqueue(rq_jobs.answer, "x", job_id=JOB_ID)
    redis_client.hset(job.key, "created_at", "yesterday")
    good = queue.enqueue(rq_jobs.answer, "x")
    for _ in range(3):
        work_off(queue)  # its loop logs the exception and ends
        redis_client.delete(f"rq:clean_registries:{queue.name}")  # 899 s later
        assert status(good) is JobStatus.QUEUED


def test_a_heartbeat_after_the_end_leaves_an_execution_that_nobody_can_read(
    queue: Queue, redis_client: redis.Redis
) -> None:
    job = queue.enqueue(rq_jobs.answer, "x", job_id=JOB_ID)
    with redis_client.pipeline() as pipe:
        execution = Execution.create(job, ttl=60, pipeline=pipe)
        execution.delete(job, pipeline=pipe)
        execution.heartbeat(StartedJobRegistry(queue=queue), ttl=60, pipeline=pipe)
        pipe.execute()
    assert redis_client.exists(execution.key)
    with pytest.raises(KeyError):
        Execution.fetch(execution.id, job.id, connection=redis_client)


@pytest.mark.parametrize("command", ["RPUSH", "XADD", "INCR"])
def test_a_lost_reply_doubles_a_write(
    proxy: LossyProxy, redis_client: redis.Redis, command: str
) -> None:
    arguments: dict[str, tuple[str | bytes, ...]] = {
        "RPUSH": ("twice", b"x"), "XADD": ("twice", "*", "f", b"x"), "INCR": ("twice",),
    }  # fmt: skip
    count = {"RPUSH": redis_client.llen, "XADD": redis_client.xlen, "INCR": redis_client.get}
    with stock_client(proxy) as client:
        client.ping()
        proxy.lose_reply_to(b"twice")
        client.execute_command(command, *arguments[command])
    assert proxy.lost == 1
    assert int(count[command]("twice") or 0) == 2


def test_a_lost_reply_doubles_an_enqueue(proxy: LossyProxy, redis_client: redis.Redis) -> None:
    with stock_client(proxy) as client:
        queue = make_queue("stock", client)
        queue.enqueue(rq_jobs.answer, "x")
        proxy.lose_reply_to(b"RPUSH")
        queue.enqueue(rq_jobs.answer, "x", job_id=JOB_ID)
    assert proxy.lost == 1
    assert redis_client.lrange("rq:queue:stock", 0, -1).count(JOB_ID.encode()) == 2


def test_unique_takes_no_part_in_a_pipeline(queue: Queue, redis_client: redis.Redis) -> None:
    with redis_client.pipeline() as pipe:
        queue.enqueue(rq_jobs.answer, "x", job_id=JOB_ID, unique=True, pipeline=pipe)
        pipe.reset()
    assert queue.job_ids == [JOB_ID]  # enqueued by a round trip of its own, and beyond recall


def test_a_lost_reply_strands_a_job_that_was_moved(
    proxy: LossyProxy, redis_client: redis.Redis
) -> None:
    redis_client.rpush("from", "first", "second")
    with stock_client(proxy) as client:
        client.ping()
        proxy.lose_reply_to(b"BLMOVE")
        assert client.blmove("from", "to", 1, "LEFT", "RIGHT") == b"second"
    assert redis_client.lrange("to", 0, -1) == [b"first", b"second"]  # nobody was told of the first


def test_a_subscriber_that_was_cut_off_misses_messages_and_is_not_told(
    redis_client: redis.Redis, local_redis: LocalRedis
) -> None:
    with (
        redis.Redis(unix_socket_path=str(local_redis.socket)) as reader,
        reader.pubsub(ignore_subscribe_messages=True) as channel,
    ):
        channel.subscribe("live")
        wait_until(lambda: redis_client.pubsub_numsub("live")[0][1] == 1)
        redis_client.publish("live", "1")
        seen = [_next(channel)]
        redis_client.client_kill_filter(_type="pubsub")
        redis_client.publish("live", "2")
        back = threading.Thread(target=lambda: seen.append(_next(channel)))
        back.start()
        wait_until(lambda: redis_client.pubsub_numsub("live")[0][1] == 1)
        redis_client.publish("live", "3")
        back.join(10)
    assert seen == [b"1", b"3"]


def _next(channel: Any) -> bytes:
    found = wait_until(lambda: channel.get_message(timeout=0.1) or False)
    data: bytes = found["data"]
    return data
