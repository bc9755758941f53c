"""Lanes: interactive jobs beside a full bulk load, and what they cost it.

    python -m benchmarks.contract.lanes --model tally --rows 16 --seconds 20

One worker. Interactive jobs arrive at random times (Poisson, at a rate that makes their tokens 5%
of what bulk decodes alone), each streamed by another process: first with nothing else to do, then
beside more bulk jobs than the batch holds. Bulk alone is measured before and after that. TTFT is
from `submit` to the first token at the consumer. A step is the time between two outputs of an
interactive row beside the bulk load.
"""

import argparse
import asyncio
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count, pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import cast

import redis
from rq.registry import FinishedJobRegistry

from benchmarks.contract.streaming import MODELS, engine_spec
from benchmarks.contract.streaming import Load as Streams
from benchmarks.lib.harness import (
    MODEL,
    Child,
    Figure,
    Goal,
    bench_settings,
    child_call,
    count_prompt,
    percentile,
    progress,
    report,
    running_worker,
    wait_until,
)
from mlx_serving.common.job.schema import GenerationJob
from mlx_serving.common.queues import queue_name
from mlx_serving.common.redis.local import LocalRedis
from mlx_serving.common.settings import Settings
from mlx_serving.producer.client import Client

QUEUED = 3  # bulk jobs that wait, in batches
WARM_SECONDS = 4.0
SHARE = 0.05  # of interactive tokens in what bulk decodes alone


@dataclass(frozen=True)
class Load:
    """What is run: lengths in tokens, `seconds` of each part."""

    model: str = "simulated"
    rows: int = 64
    bulk_tokens: int = 96
    tokens: int = 16  # of an interactive answer
    seconds: float = 20.0
    rate: float = 100.0  # simulated steps/s
    headroom: float = 0.125  # `lane_headroom`
    folder: str | None = None

    def job(self, number: int, lane: str, tokens: int) -> GenerationJob:
        """A job that says exactly so many tokens, where the model does not end by itself."""
        if self.model == "tally":
            prompt = count_prompt(number % 50, tokens)
        else:
            prompt = {"prompt": f"{number:06d} {'abcdefgh ' * 6}"}
        fixed = {"model": MODEL, "temperature": 0.0, "seed": number, "lane": lane}
        return GenerationJob.parse(
            fixed | prompt | {"max_tokens": tokens, "stream": lane == "interactive"}
        )


@dataclass
class Seen:
    """What a consumer saw, in seconds."""

    to_first: list[float] = field(default_factory=list)
    to_claim: list[float] = field(default_factory=list)
    claim_to_first: list[float] = field(default_factory=list)  # in Redis
    gaps: list[float] = field(default_factory=list)
    tokens: int = 0


# The consumer's process


def _probe(connection: Connection, settings: Settings, load: Load) -> None:
    connection.send("ready")
    numbers = count(1_000_000)
    while (asked := connection.recv()) is not None:
        connection.send(asyncio.run(_arrive(settings, load, asked[0], asked[1], numbers)))


async def _arrive(
    settings: Settings, load: Load, rate: float, seconds: float, numbers: Iterator[int]
) -> Seen:
    from mlx_serving.producer.async_client import AsyncClient

    seen, chance = Seen(), random.Random(7)
    async with AsyncClient(settings=settings) as client, asyncio.TaskGroup() as tasks:

        async def ask(job: GenerationJob) -> None:
            began = time.monotonic()
            handle = await client.submit(job)
            arrivals = []
            async for event in client.stream(handle.id):
                tokens = sum(len(choice.token_ids) for choice in event.choices)
                seen.tokens += tokens
                if tokens:
                    arrivals.append(time.monotonic())
            seen.to_first.append(arrivals[0] - began)
            seen.gaps += [b - a for a, b in pairwise(arrivals)]
            times = (await client.result(handle.id)).timings
            enqueued, started, first = (
                cast("int", at) / 1000
                for at in (times.enqueued_ms, times.started_ms, times.first_token_ms)
            )
            seen.to_claim.append(started - enqueued)
            seen.claim_to_first.append(first - started)

        until = time.monotonic() + seconds
        while time.monotonic() < until:
            tasks.create_task(ask(load.job(next(numbers), "interactive", load.tokens)))
            await asyncio.sleep(chance.expovariate(rate))
    return seen


@dataclass
class Stage:
    """A worker, and what feeds and asks it."""

    load: Load
    client: redis.Redis
    producer: Client
    probe: Child
    _numbers: Iterator[int] = field(default_factory=count)
    _lengths: dict[str, int] = field(default_factory=dict)  # of bulk jobs, by id
    _chance: random.Random = field(default_factory=lambda: random.Random(3))

    def feed(self) -> None:
        """Keep more bulk jobs in the queue than the batch holds."""
        key = f"rq:queue:{queue_name(MODEL, 'bulk')}"
        missing = QUEUED * self.load.rows - int(self.client.llen(key))
        jobs = []
        for number in (next(self._numbers) for _ in range(missing)):
            tokens = self._chance.randrange(self.load.bulk_tokens // 2, self.load.bulk_tokens)
            jobs.append(self.load.job(number, "bulk", tokens))
        for handle, job in zip(self.producer.submit_many(jobs), jobs, strict=True):
            self._lengths[handle.id] = job.max_tokens

    @property
    def bulk_tokens(self) -> int:
        """Tokens of the bulk jobs that have finished."""
        registry = FinishedJobRegistry(queue_name(MODEL, "bulk"), connection=self.client)
        ended = registry.get_job_ids(cleanup=False)
        return sum(self._lengths[job_id] for job_id in ended if job_id in self._lengths)

    def bulk_rate(self, until: float) -> float:
        """Feed until then; returns bulk tokens/s."""
        began, before = time.monotonic(), self.bulk_tokens
        while time.monotonic() < until:
            self.feed()
            time.sleep(0.1)
        return (self.bulk_tokens - before) / (time.monotonic() - began)

    def ask(self, rate: float, seconds: float) -> None:
        """Let interactive jobs arrive."""
        self.probe.send((rate, seconds))

    def seen(self) -> Seen:
        """What came of them."""
        return self.probe.receive(Seen, self.load.seconds + 60)


@contextmanager
def staged(load: Load) -> Iterator[Stage]:
    """Bring all processes up."""
    with ExitStack() as stack:
        server = stack.enter_context(LocalRedis())
        client = stack.enter_context(server.client())
        settings = bench_settings(server.url, batch__max_rows=load.rows, worker__drain_seconds=1,
                                  batch__lane_headroom=load.headroom)  # fmt: skip
        streams = Streams(load.model, rate=load.rate, folder=load.folder)
        spec = stack.enter_context(engine_spec(streams))
        probe = child_call(_probe, settings, load)
        stack.callback(probe.end)
        stack.callback(probe.send, None)
        stack.enter_context(running_worker(settings, spec, client))
        probe.receive(str)
        progress("the worker is up")
        producer = stack.enter_context(Client(settings=settings))
        yield Stage(load, client, producer, probe)


def measure(load: Load) -> list[Figure]:
    """Idle, bulk alone, both, bulk alone again."""
    with staged(load) as stage:
        stage.ask(5.0, 2.0)
        stage.seen()  # warm
        stage.feed()
        wait_until(lambda: stage.bulk_tokens > load.rows * load.bulk_tokens, every=0.1, timeout=60,
                   what="bulk is under way")  # fmt: skip
        alone = [stage.bulk_rate(time.monotonic() + load.seconds / 2)]
        rate = SHARE * alone[0] / load.tokens
        progress(f"bulk alone: {alone[0]:.0f} tokens/s; {rate:.1f} interactive jobs/s follow")
        stage.ask(rate, WARM_SECONDS)  # what a batch of these rows meets for the first time
        stage.bulk_rate(time.monotonic() + WARM_SECONDS)
        stage.seen()
        stage.ask(rate, load.seconds)
        beside = stage.bulk_rate(time.monotonic() + load.seconds)
        loaded = stage.seen()
        progress(f"beside interactive: {beside:.0f} tokens/s")
        alone.append(stage.bulk_rate(time.monotonic() + load.seconds / 2))
        wait_until(lambda: _idle(stage), every=0.1, timeout=120, what="bulk has ended")
        stage.ask(rate, load.seconds)
        idle = stage.seen()
    return figures(load, alone, beside, idle, loaded)


def _idle(stage: Stage) -> bool:
    before = stage.bulk_tokens
    time.sleep(1.5)
    return stage.bulk_tokens == before


def figures(
    load: Load, alone: Sequence[float], beside: float, idle: Seen, loaded: Seen
) -> list[Figure]:
    """As the table shows them; times in ms."""
    p50, p99 = ([1e3 * percentile(s.to_first, p) for s in (idle, loaded)] for p in (50, 99))
    step = 1e3 * statistics.median(loaded.gaps)
    claim, engine = (1e3 * percentile(s, 99) for s in (loaded.to_claim, loaded.claim_to_first))
    bound = 2 * p99[0] + step
    share = loaded.tokens / load.seconds / statistics.mean(alone)
    return [
        Figure.median("bulk alone, before and after", alone, "tokens/s"),
        Figure("bulk beside interactive jobs", beside, "tokens/s"),
        Figure("interactive tokens over bulk alone", share, "×"),
        Figure("interactive jobs idle", len(idle.to_first), "jobs"),
        Figure("interactive jobs beside bulk", len(loaded.to_first), "jobs"),
        Figure("a step beside bulk", step, "ms"),
        Figure("TTFT idle, p50", p50[0], "ms"),
        Figure("TTFT beside bulk, p50", p50[1], "ms"),
        Figure("TTFT idle, p99", p99[0], "ms"),
        Figure("TTFT beside bulk, p99", p99[1], "ms"),
        Figure("of that, until a worker has the job, p99", claim, "ms"),
        Figure("and from then until its first token is in Redis, p99", engine, "ms"),
        Figure("TTFT beside bulk, p99, over 2 x idle p99 + a step", p99[1] / bound, "×",
               Goal("≤", 1.0)),
        Figure("bulk beside interactive jobs over alone", beside / statistics.mean(alone), "×",
               Goal("≥", 0.9)),
    ]  # fmt: skip


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="simulated")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--bulk-tokens", type=int, default=96, help="the most of a bulk answer")
    parser.add_argument("--tokens", type=int, default=16, help="of an interactive answer")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each part")
    parser.add_argument("--rate", type=float, default=100.0, help="simulated steps/s")
    parser.add_argument("--headroom", type=float, default=0.125, help="0: all park")
    parser.add_argument("--folder", help="keep the synthetic model here, or use the one there")
    parser.add_argument("--output", type=Path)
    options = vars(parser.parse_args())
    output = options.pop("output")
    load = Load(**options)
    report(f"Lanes, {load.model}, {load.rows} rows", measure(load), output)


if __name__ == "__main__":
    main()
