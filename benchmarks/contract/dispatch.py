"""P6: no-op jobs through one worker, over RQ's SimpleWorker and over a bare BLMPOP loop.

    python -m benchmarks.contract.dispatch --jobs 12000 --rounds 5

Three contestants take turns on one private redis-server, each in one process of its own, each
on jobs that were enqueued before its clock starts, all with the same RQ job hash (payload:
a chat job with a prompt of 200 characters):

* ours: the real worker on the simulated engine at zero cost. Each job is claimed durably (epoch,
  lease, RQ's registries), writes three events (attempt, tokens, end), a result record and RQ's
  own result. Held off by ``rq suspend`` while the jobs are enqueued.
* simple: ``rq.SimpleWorker``, stock, burst mode, JSON serializer, a function that does nothing,
  logs off.
* bare: BLMPOP of 32, pipelined HGETALL, JSON decode, then pipelined SET of a result and DEL.
  Nothing durable: a crash loses what it popped.

The clock runs from the first claim (the queue got shorter) to the last result. Of a round of 3,000
jobs (half a second) what comes before the pipeline of claims and commits is full, and after, is a
tenth.
"""

import argparse
import json
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import redis
from rq import Queue, SimpleWorker
from rq.registry import FinishedJobRegistry
from rq.serializers import JSONSerializer
from rq.suspension import resume, suspend

from benchmarks.lib.harness import (
    MODEL,
    Figure,
    Goal,
    bench_settings,
    child_call,
    progress,
    running_worker,
    table,
    wait_until,
)
from benchmarks.lib.process_cpu import children, cpu_seconds
from mlx_serving.common.job.schema import GenerationJob
from mlx_serving.common.redis.connection import Endpoint, connect
from mlx_serving.common.redis.local import LocalRedis
from mlx_serving.producer.client import Client
from mlx_serving.producer.envelope import seal
from mlx_serving.worker.models.loading import EngineSpec

QUEUE = f"{MODEL}:default"
PROMPT = "The quick brown fox jumps over the lazy dog. " * 5
POLL_SECONDS = 0.005
LIMIT_SECONDS = 120.0
PAYLOAD_BYTES = 4 * 1024 * 1024
BLMPOP_COUNT = 32
BARE_FACTOR = 3  # the bare loop is so fast that it needs more jobs for a fair clock
JOBS = 12_000  # of a round


def job(number: int) -> GenerationJob:
    """Return a no-op job: one end-of-sequence token."""
    return GenerationJob.parse(
        {
            "model": MODEL,
            "messages": [{"role": "user", "content": PROMPT[:200]}],
            "max_tokens": 1,
            "temperature": 0.7,
            "top_p": 0.95,
            "seed": number,
        }
    )


def noop(_wire: dict[str, Any]) -> None:
    """Stand in for the work, for SimpleWorker."""


@dataclass(frozen=True)
class Bench:
    """The one server that all contestants share."""

    url: str
    redis: redis.Redis

    def clock(self, queue: str, finished: Callable[[], bool]) -> float:
        """Seconds from the first claim to the last result, polled each 5 ms."""
        jobs = self.redis.llen(queue)
        wait_until(
            lambda: self.redis.llen(queue) < jobs,
            every=POLL_SECONDS, timeout=LIMIT_SECONDS, what="the first claim",
        )  # fmt: skip
        started = time.perf_counter()
        wait_until(finished, every=POLL_SECONDS, timeout=LIMIT_SECONDS, what="the last result")
        return time.perf_counter() - started


def run_ours(
    bench: Bench, client: Client, jobs: int, used: Callable[[], Sequence[float]] = tuple
) -> tuple[float, list[float]]:
    """Jobs/s of our worker, which is up and idle, and what is `used` meanwhile, a job."""
    suspend(bench.redis)
    # The worker's next claim sees it; an idle one looks each second.
    handles = client.submit_many(job(number) for number in range(jobs))
    before = used()
    resume(bench.redis)
    keys = client.keys
    index = keys.open(QUEUE)
    seconds = bench.clock(keys.rq_queue(QUEUE), lambda: not bench.redis.zcard(index))
    costs = [(now - then) / jobs for now, then in zip(used(), before, strict=True)]
    with bench.redis.pipeline(transaction=False) as pipe:
        for handle in handles:
            pipe.hget(keys.job(handle.id), "st")
            pipe.xlen(keys.events(handle.id))
        replies = pipe.execute()
    assert set(replies[::2]) == {b"finished"}
    assert min(replies[1::2]) >= 1
    return jobs / seconds, costs


def _simple_worker(_connection: Connection, url: str) -> None:
    client = connect(Endpoint(url=url))
    queue = Queue("simple", connection=client, serializer=JSONSerializer)
    worker = SimpleWorker([queue], connection=client, serializer=JSONSerializer)
    worker.work(burst=True, logging_level="ERROR")


def run_simple(bench: Bench, jobs: int) -> float:
    """Jobs/s of RQ's SimpleWorker."""
    queue = Queue("simple", connection=bench.redis, serializer=JSONSerializer)
    data = [
        Queue.prepare_data(noop, args=(job(number).to_wire(),), description="no-op")
        for number in range(jobs)
    ]
    with bench.redis.pipeline() as pipe:
        queue.enqueue_many(data, pipeline=pipe)
        pipe.execute()
    registry = FinishedJobRegistry(queue=queue).key
    before = bench.redis.zcard(registry)
    child = child_call(_simple_worker, bench.url)
    try:
        seconds = bench.clock(queue.key, lambda: bench.redis.zcard(registry) >= before + jobs)
    finally:
        child.end()
    return jobs / seconds


def _bare_loop(connection: Connection, url: str, jobs: int) -> None:
    client = connect(Endpoint(url=url), block_seconds=10)
    connection.send("ready")
    connection.recv()
    done, started = 0, 0.0
    while done < jobs:
        popped: Any = client.blmpop(10, 1, "bare", direction="LEFT", count=BLMPOP_COUNT)
        started = started or time.perf_counter()
        ids = [raw.decode() for raw in popped[1]]
        with client.pipeline(transaction=False) as pipe:
            for job_id in ids:
                pipe.hgetall(f"bare:job:{job_id}")
            hashes = pipe.execute()
            for job_id, fields in zip(ids, hashes, strict=True):
                wire = json.loads(zlib.decompress(fields[b"data"]))[2][0]
                pipe.set(f"bare:result:{job_id}", json.dumps({"id": job_id, "v": wire["v"]}))
                pipe.delete(f"bare:job:{job_id}")
            pipe.execute()
        done += len(ids)
    connection.send(time.perf_counter() - started)


def run_bare(bench: Bench, jobs: int) -> float:
    """Jobs/s of the bare loop, on the job hashes that our producer writes for RQ."""
    entries = [seal(job(number), max_payload_bytes=PAYLOAD_BYTES) for number in range(jobs)]
    with bench.redis.pipeline(transaction=False) as pipe:
        for entry in entries:
            items = [x for pair in entry.rq_fields.items() for x in pair]
            pipe.hset(f"bare:job:{entry.job_id}", items=items)
            pipe.rpush("bare", entry.job_id)
        pipe.execute()
    child = child_call(_bare_loop, bench.url, jobs)
    try:
        child.receive(str)
        child.send("go")
        seconds = child.receive(float, LIMIT_SECONDS)
    finally:
        child.end()
    return jobs / seconds


def measure(jobs: int = JOBS, simple_jobs: int = 500, rounds: int = 5) -> list[Figure]:
    """All three in turn; medians of the rounds' jobs/s and of the rounds' ratios."""
    speeds: dict[str, list[float]] = {"ours": [], "simple": [], "bare": []}
    costs: list[list[float]] = []
    with LocalRedis() as server, server.client() as client:
        settings = bench_settings(server.url)
        bench = Bench(server.url, client)
        with (
            running_worker(settings, EngineSpec("simulated"), client) as pid,
            Client(settings=settings) as producer,
        ):
            progress("the worker is up")
            run_ours(bench, producer, 200)  # warm: scripts loaded, code paths run once
            for number in range(rounds):
                speeds["simple"].append(run_simple(bench, simple_jobs))
                speed, cost = run_ours(bench, producer, jobs, partial(_cpu, pid, server.pid or 0))
                speeds["ours"].append(speed)
                costs.append(cost)
                speeds["bare"].append(run_bare(bench, BARE_FACTOR * jobs))
                last = (f"{name} {values[-1]:,.0f}" for name, values in speeds.items())
                progress(f"round {number + 1} of {rounds}: {', '.join(last)} jobs/s")
    return figures(speeds) + _cost_figures(costs)


def _cpu(worker: int, server: int) -> list[float]:
    """CPU time in µs of a worker's engine child and of Redis; nothing where there is no /proc."""
    engines = children(worker)
    return [1e6 * sum(map(cpu_seconds, pids)) for pids in (engines, [server])] if engines else []


def _cost_figures(costs: Sequence[Sequence[float]]) -> list[Figure]:
    names = ("CPU of the worker's engine process, a job", "CPU of Redis, a job of the worker")
    return [
        Figure.median(name, rounds, "µs")
        for name, rounds in zip(names, zip(*costs, strict=True), strict=False)
    ]


def figures(speeds: dict[str, list[float]]) -> list[Figure]:
    """Speeds of the rounds as figures; each ratio is taken within its round."""

    def over(other: str) -> Sequence[float]:
        return [a / b for a, b in zip(speeds["ours"], speeds[other], strict=True)]

    return [
        Figure.median("worker, simulated engine at zero cost", speeds["ours"], "jobs/s"),
        Figure.median("rq SimpleWorker, stock, burst", speeds["simple"], "jobs/s"),
        Figure.median("bare BLMPOP of 32", speeds["bare"], "jobs/s"),
        Figure.median("P6 worker over SimpleWorker", over("simple"), "×", Goal("≥", 8.0)),
        Figure.median("P6 worker over bare BLMPOP", over("bare"), "×", Goal("≥", 0.3)),
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=JOBS, help="of a round")
    parser.add_argument("--simple-jobs", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    report = measure(arguments.jobs, arguments.simple_jobs, arguments.rounds)
    print(table({"P6 dispatch of no-op jobs": report}))


if __name__ == "__main__":
    main()
