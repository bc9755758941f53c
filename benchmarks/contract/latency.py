"""P7: how long an idle worker takes to start a job, over a bare BLMPOP wake-up.

    python -m benchmarks.contract.latency --samples 150 --rounds 3

One producer, one clock (its own `perf_counter_ns`), one private redis-server, samples of both
kinds in turn, a pause before each so that everybody idles. Both sides have the same hops:

* bare: RPUSH → a consumer that blocks in BLMPOP wakes → its PUBLISH reaches the producer.
* started: the enqueue script → our idle worker wakes (pub/sub) → its claim script takes the id
  off the queue, which is when the job is running, durably and under a lease. Redis itself tells
  the producer of that moment, by its keyspace notification of the LREM.
* first event: the same job's `attempt` event reaches the producer by pub/sub: claim, payload
  check, engine thread, one step of the simulated engine, publisher and commit script included.

Building the job (validation, serialising) is before the clock starts. P7 is *started* over bare.
"""

import argparse
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import redis

from benchmarks.contract.dispatch import PAYLOAD_BYTES, QUEUE, job
from benchmarks.lib.harness import (
    Figure,
    Goal,
    bench_settings,
    child_call,
    percentile,
    running_worker,
    table,
)
from mlx_serving.common.protocol import calls
from mlx_serving.common.protocol.client import Protocol
from mlx_serving.common.protocol.keys import Keys
from mlx_serving.common.redis.connection import Endpoint, connect
from mlx_serving.common.redis.local import LocalRedis
from mlx_serving.producer.envelope import seal
from mlx_serving.worker.models.loading import EngineSpec

PAUSE_SECONDS = (0.01, 0.03)  # a random one, so that no poll of anybody's keeps step with us
PATIENCE_SECONDS = 5.0
ECHO = "bare:echo"
TAKEN = frozenset({b"lrem", b"lpop"})


@dataclass
class Samples:
    """Microseconds from just before the enqueue."""

    bare: list[float] = field(default_factory=list)
    started: list[float] = field(default_factory=list)
    first_event: list[float] = field(default_factory=list)


def _echo(connection: Connection, url: str) -> None:
    """Publish back whatever BLMPOP delivers, until it is told to stop."""
    client = connect(Endpoint(url=url), block_seconds=PATIENCE_SECONDS)
    connection.send("ready")
    while True:
        popped: Any = client.blmpop(PATIENCE_SECONDS, 1, "bare", direction="LEFT", count=1)
        if popped is None:
            continue
        if popped[1][0] == b"stop":
            return
        client.publish(ECHO, popped[1][0])


class Prober:
    """The producer."""

    def __init__(self, client: redis.Redis, keys: Keys) -> None:
        self._redis, self._keys = client, keys
        self._protocol = Protocol(client, keys)
        self._taken = f"__keyspace@0__:{keys.rq_queue(QUEUE)}".encode()
        self._pubsub = client.pubsub(ignore_subscribe_messages=True)
        client.config_set("notify-keyspace-events", "Kl")
        self._pubsub.subscribe(ECHO, self._taken)
        self._pubsub.psubscribe(keys.channel("*"))
        while self._pubsub.get_message(timeout=0.2) is not None:
            pass

    def _next(self) -> tuple[bytes, bytes]:
        """Next message as (channel, data)."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            message = self._pubsub.get_message(timeout=PATIENCE_SECONDS)
            if message is not None:
                return message["channel"], message["data"]
        raise TimeoutError("no message: the worker or the echo is gone")

    def _await_claim(self) -> None:
        while True:
            channel, command = self._next()
            if channel == self._taken and command in TAKEN:
                return

    def bare(self, number: int) -> float:
        """One wake-up by BLMPOP, µs."""
        started = time.perf_counter_ns()
        self._redis.rpush("bare", number)
        assert self._next() == (ECHO.encode(), str(number).encode())
        return (time.perf_counter_ns() - started) / 1e3

    def ours(self, number: int) -> tuple[float, float]:
        """One job: µs until it is started, and until its first event."""
        entry = seal(job(number), max_payload_bytes=PAYLOAD_BYTES)
        call = calls.enqueue(entry)
        started = time.perf_counter_ns()
        self._protocol.run(call)
        self._await_claim()
        taken = time.perf_counter_ns()
        channel = self._keys.channel(entry.job_id).encode()
        while self._next()[0] != channel:
            pass
        first = time.perf_counter_ns()
        while b'"type":"end"' not in self._next()[1]:
            pass
        return (taken - started) / 1e3, (first - started) / 1e3


@contextmanager
def echoing(url: str, client: redis.Redis) -> Iterator[None]:
    """Run the bare consumer."""
    child = child_call(_echo, url)
    try:
        child.receive(str)
        yield
    finally:
        client.rpush("bare", "stop")
        child.end()


def take(prober: Prober, count: int) -> Samples:
    """One round of samples of both kinds, in turn."""
    samples = Samples()
    chance = random.Random(count)
    for number in range(count):
        time.sleep(chance.uniform(*PAUSE_SECONDS))
        samples.bare.append(prober.bare(number))
        time.sleep(chance.uniform(*PAUSE_SECONDS))
        started, first_event = prober.ours(number)
        samples.started.append(started)
        samples.first_event.append(first_event)
    return samples


def measure(samples: int = 150, rounds: int = 3) -> list[Figure]:
    """Percentiles of each round, and their medians."""
    with LocalRedis() as server, server.client() as client:
        settings = bench_settings(server.url)
        with (
            running_worker(settings, EngineSpec("simulated"), client),
            echoing(server.url, client),
        ):
            prober = Prober(client, Keys())
            take(prober, 10)  # warm
            taken = [take(prober, samples) for _ in range(rounds)]
    return figures(taken)


def figures(taken: Sequence[Samples]) -> list[Figure]:
    """p50 and p99 by kind; each ratio within its round."""
    by_kind = {
        "bare BLMPOP wake-up": [t.bare for t in taken],
        "enqueue → started": [t.started for t in taken],
        "enqueue → first event": [t.first_event for t in taken],
    }
    report = [
        Figure.median(f"{kind}, p{percent}", [percentile(r, percent) for r in rounds], "µs")
        for kind, rounds in by_kind.items()
        for percent in (50, 99)
    ]
    bare = [percentile(t.bare, 50) for t in taken]
    for name, rounds, goal in (
        ("P7 started over bare, p50", [t.started for t in taken], Goal("≤", 4.0)),
        ("first event over bare, p50", [t.first_event for t in taken], None),
    ):
        ratios = [percentile(r, 50) / b for r, b in zip(rounds, bare, strict=True)]
        report.append(Figure.median(name, ratios, "×", goal))
    return report


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print(table({"P7 idle enqueue → started": measure(arguments.samples, arguments.rounds)}))


if __name__ == "__main__":
    main()
