"""P8: 1 → 64 simulated workers on one Redis, with every process group's CPU beside the figures.

    python -m benchmarks.contract.scale --workers 1,8,16,32,64 --rows 64 --rate 5 --queued 100000

What runs is the real worker (claims, one batch, publisher, leases, sweeps), the real protocol, a
real redis-server over TCP on the loopback interface, and `AsyncClient`s that follow every running
stream live. Only the model is simulated: a step sleeps for a token's time and computes nothing.
So that 64 workers fit on few cores, several share a process as threads, without their parents.

The queue holds all jobs before the first worker starts. Workers are added stage by stage; each
stage is measured once every row of the new ones runs. Throughput is what consumers received,
between two arrivals; linear is the one worker's figure times their number. A stage proves
something only while no group of processes used more than 70% of its cores.

After that, at the most workers: AOF `always`; Redis's own ceiling, from redis-benchmark on the same
scripts (`benchmarks.studies.redis_ceiling`); the same jobs in bulk (no `stream`: a commit each 16
tokens or 500 ms, nothing published); and `--fast` tokens/s a row, to see what happens past
saturation.
"""

import argparse
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis

from benchmarks.lib.harness import (
    MODEL,
    Child,
    Figure,
    bench_settings,
    child_call,
    free_port,
    percentile,
    table,
    wait_until,
)
from benchmarks.lib.process_cpu import loads, read_all
from benchmarks.lib.scale_fleet import Counts, Start, consume, host_workers
from benchmarks.lib.scale_report import Plan, Point, figures, line, write
from benchmarks.studies.redis_ceiling import ceilings
from mlx_serving.common.protocol.keys import Keys
from mlx_serving.common.queues import Lane, queue_name
from mlx_serving.common.redis.local import LocalRedis
from mlx_serving.producer.client import Client

HEADROOM = 1.1  # streams followed over rows that run, so that a job's first token finds a listener
SETTLE_SECONDS, SETTLE_STEPS = 2.5, 8  # the longer: prompts are prefilled, a chunk a step
RUNNING_SECONDS = 60.0
SUBMIT = 10_000
KEYS = Keys()


@dataclass(frozen=True)
class Usage:
    """Redis's counters, and each process's CPU seconds."""

    at: float
    commands: int
    scripts: int
    bytes_in: int
    bytes_out: int
    cpu: Mapping[int, float]


@dataclass
class Stage:
    """All processes, up."""

    plan: Plan
    client: redis.Redis
    hosts: Sequence[Child]
    consumers: Sequence[Child]
    groups: Mapping[str, Sequence[int]]
    started: int = 0
    row_rate: float = 0.0  # tokens/s

    def add_workers(self, upto: int, row_rate: float) -> None:
        """Start workers, spread over the hosts, until there are so many."""
        names: list[list[str]] = [[] for _ in self.hosts]
        for number in range(self.started, upto):
            names[number % len(self.hosts)].append(f"w{number}")
        for host, some in zip(self.hosts, names, strict=True):
            host.send(Start(some, row_rate))
        self.started, self.row_rate = upto, row_rate

    def follow(self, more: int) -> None:
        """Have so many more streams followed."""
        for consumer in self.consumers:
            consumer.send(-(-more // len(self.consumers)))

    def running(self, lane: Lane) -> int:
        """Jobs that workers hold."""
        return int(self.client.zcard(KEYS.leases(queue_name(MODEL, lane))))

    def wait_until_full(self, lane: Lane) -> None:
        """Wait until every row of every worker runs."""
        rows = self.plan.rows * self.started
        wait_until(
            lambda: self.running(lane) >= 0.98 * rows,
            every=0.05, timeout=RUNNING_SECONDS, what=f"{rows} rows run",
        )  # fmt: skip
        time.sleep(max(SETTLE_SECONDS, SETTLE_STEPS / self.row_rate))

    def stop_workers(self) -> None:
        """Have all workers hand over and end."""
        for host in self.hosts:
            host.send("stop")
        for host in self.hosts:
            host.receive(str)
        self.started = 0

    def usage(self) -> Usage:
        """Read all counters."""
        stats: dict[str, Any] = self.client.info("commandstats")
        net = self.client.info("stats")
        calls = {name.removeprefix("cmdstat_"): row["calls"] for name, row in stats.items()}
        return Usage(
            time.monotonic(), sum(calls.values()), calls.get("evalsha", 0),
            net["total_net_input_bytes"], net["total_net_output_bytes"], read_all(self.groups),
        )  # fmt: skip

    def look(self, children: Sequence[Child]) -> list[Counts]:
        """Ask all of them at once."""
        for child in children:
            child.send("read")
        return [child.receive(Counts) for child in children]

    def measure(self, name: str, lane: Lane) -> Point:
        """One window. Streams are counted where they arrive, bulk where it is decoded."""
        counted = self.hosts if lane == "bulk" else self.consumers
        before, usage = self.look(counted), self.usage()
        time.sleep(self.plan.seconds)
        later, after = self.usage(), self.look(counted)
        streams, queue = self.running(lane), KEYS.rq_queue(queue_name(MODEL, lane))
        gaps = [gap for count in after for gap in count.gaps] or [0.0, 0.0]
        tokens = rate(before, after, "tokens")
        seconds = later.at - usage.at

        def a_token(what: str) -> float:
            change: int = getattr(later, what) - getattr(usage, what)
            return change / seconds / tokens

        return Point(
            name, self.started, self.started * self.plan.rows * self.row_rate, streams,
            int(self.client.llen(queue)), tokens,
            rate(before, after, "events"), rate(before, after, "ended"),
            percentile(gaps, 50) * 1e3, percentile(gaps, 99) * 1e3,
            sum(c.backlog for c in self.look(self.hosts)),
            a_token("commands"), a_token("scripts"), a_token("bytes_in"), a_token("bytes_out"),
            loads(usage.cpu, later.cpu, self.groups, seconds, cores()),
        )  # fmt: skip


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def rate(before: Sequence[Counts], after: Sequence[Counts], what: str) -> float:
    """Sum of the processes' rates, each over its own window; one that saw nothing adds nothing."""
    total = 0.0
    for a, b in zip(before, after, strict=True):
        if b.at > a.at > 0:
            total += (getattr(b, what) - getattr(a, what)) / (b.at - a.at)
    return total


def enqueue(client: Client, plan: Plan, count: int, *, stream: bool) -> list[str]:
    """Fill the queue; the ids in its order."""
    started, ids = time.perf_counter(), []
    for first in range(0, count, SUBMIT):
        jobs = (plan.job(n, stream=stream) for n in range(first, min(first + SUBMIT, count)))
        ids += [handle.id for handle in client.submit_many(jobs)]
    say(f"{count:,} jobs queued at {count / (time.perf_counter() - started):,.0f} jobs/s")
    return ids


def say(text: str) -> None:
    """Print a line of progress with the time."""
    print(f"[{time.perf_counter():.1f}] {text}", flush=True)


@contextmanager
def staged(plan: Plan, server: LocalRedis, port: int) -> Iterator[tuple[Stage, Client]]:
    """Bring all processes up; consumers wait for their ids."""
    with ExitStack() as stack:
        client = stack.enter_context(server.client())
        settings = bench_settings(f"redis://127.0.0.1:{port}/0", batch__max_rows=plan.rows)
        children = [child_call(host_workers, settings) for _ in range(plan.hosts)]
        children += [child_call(consume, settings) for _ in range(plan.consumers)]
        for child in children:
            stack.callback(child.end)
            stack.callback(child.send, None)
        for child in children:
            child.receive(str)
        hosts, consumers = children[: plan.hosts], children[plan.hosts :]
        groups = {
            "redis": [server.pid or 0],
            "workers": [c.process.pid or 0 for c in hosts],
            "consumers": [c.process.pid or 0 for c in consumers],
        }
        producer = stack.enter_context(Client(settings=settings))
        yield Stage(plan, client, hosts, consumers, groups), producer


def run_streams(stage: Stage, ids: Sequence[str]) -> Iterator[Point]:
    """The stages of P8."""
    plan = stage.plan
    for number, consumer in enumerate(stage.consumers):
        consumer.send(list(ids[number :: len(stage.consumers)]))
    followed = 0
    for workers in plan.workers:
        wanted = int(HEADROOM * workers * plan.rows)
        stage.follow(wanted - followed)
        followed = wanted
        stage.add_workers(workers, plan.rate)
        stage.wait_until_full("default")
        yield stage.measure(f"{plan.rate:g}/s a row", "default")


def run_durable(stage: Stage) -> Iterator[Point]:
    """All workers, each write synced to the disk before Redis answers."""
    client = stage.client
    client.config_set("appendfsync", "always")
    client.config_set("appendonly", "yes")
    wait_until(
        lambda: not client.info("persistence")["aof_rewrite_in_progress"],
        every=0.05, timeout=RUNNING_SECONDS, what="the AOF is written",
    )  # fmt: skip
    yield stage.measure(f"{stage.plan.rate:g}/s a row, AOF always", "default")
    client.config_set("appendonly", "no")


def run_fast(stage: Stage) -> Iterator[Point]:
    """The same streams at higher rates; each time all workers hand over and others resume."""
    for row_rate in stage.plan.fast:
        stage.stop_workers()
        stage.add_workers(stage.plan.workers[-1], row_rate)
        stage.wait_until_full("default")
        yield stage.measure(f"{row_rate:g}/s a row", "default")


def run_bulk(stage: Stage, client: Client) -> Iterator[Point]:
    """The same number of workers on jobs that nobody follows."""
    plan, workers = stage.plan, stage.plan.workers[-1]
    stage.stop_workers()
    stage.client.flushall()
    rounds = 2 + plan.bulk * (plan.seconds + 10) / plan.bulk_tokens
    enqueue(client, plan, int(plan.rows * workers * rounds), stream=False)
    stage.add_workers(workers, plan.bulk)
    stage.wait_until_full("bulk")
    yield stage.measure(f"bulk {plan.bulk:g}/s a row", "bulk")


def run_all(plan: Plan) -> Iterator[Point | list[Figure]]:
    """What there is to see, the most important first."""
    port = free_port()
    with LocalRedis(port=port) as server, staged(plan, server, port) as (stage, client):
        say(f"{plan.hosts} hosts of workers, {plan.consumers} consumers, {cores()} cores")
        yield from run_streams(stage, enqueue(client, plan, plan.queued, stream=True))
        if plan.durable:
            yield from run_durable(stage)
        yield from run_fast(stage)
        if plan.bulk:
            yield from run_bulk(stage, client)
        stage.stop_workers()
    if plan.ceiling:
        yield list(ceilings())


def measure(plan: Plan, output: Path | None = None) -> list[Figure]:
    """Run all; what is there is printed and written at once. Returns the figures with a goal."""
    points: list[Point] = []
    limits: list[Figure] = []
    for found in run_all(plan):
        if isinstance(found, Point):
            points.append(found)
            say(line(found))
        else:
            limits = found
            print(table({"redis-benchmark on the same scripts": limits}), flush=True)
        if output:
            write(output, plan, points, limits)
    return figures(points)


def numbers(text: str) -> tuple[float, ...]:
    """Read `a,b`."""
    return tuple(float(word) for word in text.split(",") if word)


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("rows", "tokens", "bulk_tokens", "queued", "hosts", "consumers"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(Plan, name))
    for name in ("rate", "bulk", "seconds"):
        parser.add_argument(f"--{name}", type=float, default=getattr(Plan, name))
    parser.add_argument("--workers", type=numbers, default=Plan.workers)
    parser.add_argument("--fast", type=numbers, default=(), help="tokens/s a row: 5,10")
    parser.add_argument("--durable", action="store_true", help="also with AOF always")
    parser.add_argument("--ceiling", action="store_true", help="also redis-benchmark")
    parser.add_argument("--output", type=Path, help="JSON file")
    options = vars(parser.parse_args())
    output = options.pop("output")
    options["workers"] = tuple(int(n) for n in options["workers"])
    print(table({"P8": measure(Plan(**options), output)}))


if __name__ == "__main__":
    main()
