"""P4: tokens/s through Redis to live consumers, over the same engine without Redis.

    python -m benchmarks.contract.streaming --model 0.6b --streams 64 --tokens 256 --rounds 6

Two processes hold the same engine: the real worker, and a bare loop (`engine.add`, `engine.step`)
without queue, publisher or consumers. They take turns on the same jobs, each right
after a short run of its own, and who is first changes from round to round. Through Redis, two other
processes consume all streams live by `AsyncClient`; every stream is subscribed before the first
token. Both windows run from the first token to the last: received by a consumer (all processes
share CLOCK_MONOTONIC), or returned by `engine.step`.

The inter-token gap is the time between two arrivals of tokens on one stream, in steps of the bare
loop's median. Models: `tally`, `tiny`, `0.6b` (random weights, no download), or `simulated`, which
sleeps instead of computing: there the ratio shows what delivery alone costs.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import redis
from rq.suspension import resume, suspend

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
    running_worker,
    table,
    wait_until,
)
from mlx_serving.common.job.schema import GenerationJob
from mlx_serving.common.redis.local import LocalRedis
from mlx_serving.common.settings import TALLY_PATH, Settings
from mlx_serving.producer.client import Client
from mlx_serving.worker.models.loading import EngineSpec

MODELS = ("simulated", "tally", "tiny", "0.6b")
CONSUMERS = 2
RUN_SECONDS = 600.0
WARM_TOKENS = 32


@dataclass(frozen=True)
class Load:
    """What is run: `tokens` is each stream's max_tokens, `rate` the simulated steps/s."""

    model: str = "simulated"
    streams: int = 64
    tokens: int = 256
    rate: float = 100.0
    dtype: str = "bfloat16"
    flush_ms: float | None = None  # None: the worker's default
    folder: str | None = None  # None: a synthetic model is written anew

    def jobs(self, tokens: int) -> list[GenerationJob]:
        """Every stream's job; the same tokens in every round."""
        return [GenerationJob.parse(self._job(i) | {"max_tokens": tokens, "seed": i})
                for i in range(self.streams)]  # fmt: skip

    def _job(self, number: int) -> dict[str, Any]:
        if self.model == "tally":
            prompt = count_prompt(number, self.tokens)
        else:
            prompt = {"prompt": f"{number:04d} {'abcdefgh ' * 3}"}
        return {"model": MODEL, "temperature": 0.0, **prompt}


@dataclass
class Run:
    """One pass over all streams. Times are seconds of CLOCK_MONOTONIC."""

    arrivals: list[list[float]] = field(default_factory=list)  # of tokens, by stream
    tokens: list[list[int]] = field(default_factory=list)  # ids, by stream

    @property
    def tokens_per_second(self) -> float:
        """Over the window from the first token to the last."""
        times = [at for stream in self.arrivals for at in stream]
        return sum(map(len, self.tokens)) / (max(times) - min(times))

    @property
    def steady_tokens_per_second(self) -> float:
        """The same while every stream runs; what begins and ends one by one is left out."""
        begin = max(stream[0] for stream in self.arrivals)
        end = min(stream[-1] for stream in self.arrivals)
        inside = [at for stream in self.arrivals for at in stream if begin < at <= end]
        share = len(inside) / sum(map(len, self.arrivals))
        return share * sum(map(len, self.tokens)) / (end - begin)

    def gaps(self) -> list[float]:
        """Seconds between arrivals on a stream, all streams together."""
        return [b - a for stream in self.arrivals for a, b in pairwise(stream)]


# The bare loop's process


def _bare_loop(connection: Connection, settings: Settings, spec: EngineSpec) -> None:
    from mlx_serving.worker.engine.interface import Request, SamplingParams
    from mlx_serving.worker.models.loading import finish, load

    loaded = finish(load(spec, settings, spec.model_path, settings.cache.budget_bytes))
    engine, encode = loaded.engine, loaded.encode
    connection.send("ready")
    while (jobs := connection.recv()) is not None:
        run = Run([[] for _ in jobs], [[] for _ in jobs])
        for number, job in enumerate(jobs):
            sampling = SamplingParams(job.temperature, job.top_p, job.top_k, job.min_p, job.seed)
            engine.add(Request(str(number), encode(job), sampling, job.max_tokens))
        while engine.has_work:
            outputs = engine.step()
            now = time.monotonic()
            for output in outputs:
                if output.token_ids:
                    run.arrivals[int(output.request_id)].append(now)
                    run.tokens[int(output.request_id)] += output.token_ids
        connection.send(run)


# A consumer's process


def _consume(connection: Connection, settings: Settings) -> None:
    connection.send("ready")
    while (job_ids := connection.recv()) is not None:
        connection.send(asyncio.run(_follow_all(settings, job_ids)))


async def _follow_all(settings: Settings, job_ids: Sequence[str]) -> Run:
    from mlx_serving.producer.async_client import AsyncClient

    run = Run([[] for _ in job_ids], [[] for _ in job_ids])
    async with AsyncClient(settings=settings) as client:

        async def follow(number: int, job_id: str) -> None:
            async for event in client.stream(job_id):
                ids = [token for choice in event.choices for token in choice.token_ids]
                if ids:
                    run.arrivals[number].append(time.monotonic())
                    run.tokens[number] += ids

        await asyncio.gather(*(follow(n, job_id) for n, job_id in enumerate(job_ids)))
    return run


@dataclass(frozen=True)
class Stage:
    """All processes, up and idle."""

    client: redis.Redis
    producer: Client
    worker_pid: int  # of the parent; the engine runs in its child
    bare: Child
    consumers: Sequence[Child]

    def run_bare(self, jobs: Sequence[GenerationJob]) -> Run:
        """One pass without Redis."""
        self.bare.send(jobs)
        return self.bare.receive(Run, RUN_SECONDS)

    def run_streams(self, jobs: Sequence[GenerationJob]) -> Run:
        """One pass through the worker, Redis and the consumers."""
        suspend(self.client)
        ids = [handle.id for handle in self.producer.submit_many(jobs)]
        shares = [ids[i :: len(self.consumers)] for i in range(len(self.consumers))]
        for consumer, share in zip(self.consumers, shares, strict=True):
            consumer.send(share)
        channels = [self.producer.keys.channel(job_id) for job_id in ids]
        wait_until(
            lambda: all(count for _, count in self.client.pubsub_numsub(*channels)),
            every=0.01, timeout=30, what="every stream is subscribed",
        )  # fmt: skip
        resume(self.client)
        self.client.publish(self.producer.keys.wake(jobs[0].queue), "")
        runs = [consumer.receive(Run, RUN_SECONDS) for consumer in self.consumers]
        whole = Run([[]] * len(ids), [[]] * len(ids))
        for first, run in enumerate(runs):
            whole.arrivals[first :: len(runs)] = run.arrivals
            whole.tokens[first :: len(runs)] = run.tokens
        return whole


def _write_model(connection: Connection, folder: str, shape: str, dtype: str) -> None:
    import mlx.core as mx

    from benchmarks.lib.synthetic import save_model

    save_model(Path(folder), shape, dtype=getattr(mx, dtype))
    connection.send("written")


@contextmanager
def engine_spec(load: Load) -> Iterator[EngineSpec]:
    """Yield the engine that `load` names.

    A synthetic model is written to a temporary folder, or to `load.folder`, where it stays.
    """
    if load.model == "simulated":
        yield EngineSpec("simulated", tokens_per_second=load.rate)
    elif load.model == "tally":
        yield EngineSpec("mlx", str(TALLY_PATH))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            folder = load.folder or temporary
            if not (Path(folder) / "config.json").exists():
                child = child_call(_write_model, folder, load.model, load.dtype)
                try:
                    child.receive(str)
                finally:
                    child.end()
                progress("the model is written")
            yield EngineSpec("mlx", folder)


@contextmanager
def staged(load: Load) -> Iterator[Stage]:
    """Bring all processes up."""
    with ExitStack() as stack:
        server = stack.enter_context(LocalRedis())
        client = stack.enter_context(server.client())
        overrides: dict[str, Any] = {"batch__max_rows": load.streams}
        if load.flush_ms is not None:
            overrides["worker__flush_interval_ms"] = load.flush_ms
        settings = bench_settings(server.url, **overrides)
        spec = stack.enter_context(engine_spec(load))
        children = [child_call(_bare_loop, settings, spec)]  # it loads while the worker does
        children += [child_call(_consume, settings) for _ in range(CONSUMERS)]
        for child in children:
            stack.callback(child.end)
            stack.callback(child.send, None)
        pid = stack.enter_context(running_worker(settings, spec, client))
        progress("the worker is up")
        for child in children:
            child.receive(str)
        progress("the in-process engine and the consumers are up")
        producer = stack.enter_context(Client(settings=settings))
        yield Stage(client, producer, pid, children[0], children[1:])


def measure(load: Load, rounds: int = 6) -> list[Figure]:
    """Both in turn, who is first in turn too; medians of the rounds."""
    with staged(load) as stage:
        warm, jobs = load.jobs(WARM_TOKENS), load.jobs(load.tokens)
        turns = ((stage.run_bare, 0), (stage.run_streams, 1))
        for run, _ in turns:
            run(warm)
        progress("both are warm")
        pairs = []
        for number in range(rounds):
            runs: dict[int, Run] = {}
            for run, side in turns if number % 2 == 0 else turns[::-1]:
                run(warm)  # a device that idled has slow clocks
                runs[side] = run(jobs)
            pairs.append((runs[0], runs[1]))
            bare, streams = (r.tokens_per_second for r in pairs[-1])
            progress(f"round {number + 1} of {rounds}: {bare:,.0f}, {streams:,.0f}, "
                     f"{streams / bare:.3f}")  # fmt: skip
    return figures(pairs)


def figures(pairs: Sequence[tuple[Run, Run]]) -> list[Figure]:
    """(bare, through Redis) of each round as figures; each ratio within its round."""
    steps = [statistics.median(bare.gaps()) for bare, _ in pairs]
    gaps = {p: [percentile(streams.gaps(), p) for _, streams in pairs] for p in (50, 99)}
    ratios = [streams.tokens_per_second / bare.tokens_per_second for bare, streams in pairs]
    steady = [
        streams.steady_tokens_per_second / bare.steady_tokens_per_second for bare, streams in pairs
    ]
    same = [
        sum(a == b for a, b in zip(bare.tokens, streams.tokens, strict=True))
        for bare, streams in pairs
    ]
    in_steps = {p: [gap / step for gap, step in zip(gaps[p], steps, strict=True)] for p in (50, 99)}
    return [
        Figure.median("in-process engine", [b.tokens_per_second for b, _ in pairs], "tokens/s"),
        Figure.median("through Redis", [s.tokens_per_second for _, s in pairs], "tokens/s"),
        Figure.median("step of the in-process engine", [s * 1e3 for s in steps], "ms"),
        Figure.median("inter-token gap, p50", [g * 1e3 for g in gaps[50]], "ms"),
        Figure.median("inter-token gap, p99", [g * 1e3 for g in gaps[99]], "ms"),
        Figure.median("streams equal to in-process, token by token", same, "streams"),
        Figure.median("inter-token gap, p50 in steps", in_steps[50], "steps"),
        Figure.median("P4 inter-token gap, p99 in steps", in_steps[99], "steps", Goal("≤", 3.0)),
        Figure(
            "through Redis over in-process, lowest round", min(ratios), "×", None, tuple(ratios)
        ),
        Figure(
            "through Redis over in-process, highest round", max(ratios), "×", None, tuple(ratios)
        ),
        Figure.median("the same while all streams run", steady, "×"),
        Figure.median("P4 through Redis over in-process", ratios, "×", Goal("≥", 0.95)),
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="simulated")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256, help="of each stream")
    parser.add_argument("--rate", type=float, default=100.0, help="simulated steps/s")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--flush-ms", type=float, help="the worker's worker.flush_interval_ms")
    parser.add_argument("--folder", help="keep the synthetic model here, or use the one there")
    parser.add_argument("--rounds", type=int, default=6)
    options = vars(parser.parse_args())
    rounds = options.pop("rounds")
    load = Load(**options)
    print(table({f"P4 {load.streams} streams, {load.model}": measure(load, rounds)}))


if __name__ == "__main__":
    main()
