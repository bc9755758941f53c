"""What a step and a flush of 64 streams cost the worker's interpreter, which the engine shares.

    python -m benchmarks.studies.publishing --rows 64 --steps 400

CPU time of one thread, so that other work on the machine adds little but cache misses; the tenth
percentile, given beside the median, is nearly free of them. *push* is what the engine's thread
does after a step, *flush* what the publisher's does for all rows at once: take them, build the
call, send it, read and settle the replies.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any, TypeVar

from benchmarks.lib.harness import MODEL, Figure, bench_settings, table
from mlx_serving.common.attempts import new_nonce
from mlx_serving.common.protocol import calls
from mlx_serving.common.redis.connection import connect, resolve
from mlx_serving.common.redis.local import LocalRedis
from mlx_serving.producer.client import Client
from mlx_serving.worker.delivery.held import HeldJob
from mlx_serving.worker.delivery.measured_protocol import MeasuredProtocol
from mlx_serving.worker.delivery.publisher import EngineLink, Publisher, PublisherOptions
from mlx_serving.worker.engine.interface import ModelInfo, Output
from mlx_serving.worker.status.counters import Counters

T = TypeVar("T")
LEASE_MS = 600_000
INFO = ModelInfo(MODEL, "r", "t", 100_000, frozenset({0}))


class Stopwatch:
    """CPU time of this thread, by phase, in microseconds."""

    def __init__(self) -> None:
        self.phases: dict[str, list[float]] = {}

    def time(self, phase: str, work: Callable[..., T], *arguments: Any) -> T:
        """Do one piece of work."""
        began = time.thread_time()
        result = work(*arguments)
        self.phases.setdefault(phase, []).append((time.thread_time() - began) * 1e6)
        return result

    def figures(self) -> list[Figure]:
        """Median of each phase, and the tenth percentile."""
        return [
            Figure(f"{phase}, {name}", value, "µs")
            for phase, times in self.phases.items()
            for name, value in (
                ("p50", statistics.median(times)),
                ("p10", sorted(times)[len(times) // 10]),
            )
        ]


def _claimed(protocol: MeasuredProtocol, rows: int) -> list[HeldJob]:
    claim = calls.claim(
        "w", [f"{MODEL}:default"], nonce=new_nonce(), most=rows, lease_ms=LEASE_MS, protocol=9,
        capacity_tokens=1 << 30, max_payload_bytes=1 << 20,
    )  # fmt: skip
    held = [HeldJob(job) for job in protocol.run(claim).jobs]
    for job in held:
        job.model, job.model_name = INFO, MODEL
    return held


def measure(rows: int = 64, steps: int = 400) -> list[Figure]:
    """A flush a step, all rows with one token each."""
    watch, counters = Stopwatch(), Counters()
    with LocalRedis() as server:
        settings = bench_settings(server.url)
        endpoint = resolve(settings, MODEL)
        protocol = MeasuredProtocol(connect(endpoint), endpoint.keys, counters)
        with Client(settings=settings) as client:
            client.submit_many([{"model": MODEL, "prompt": "x", "max_tokens": steps + 1}] * rows)
        publisher = Publisher(
            protocol, "w", PublisherOptions(LEASE_MS, flush_seconds=0.0),
            EngineLink(lambda _: None, lambda: True, lambda _: True), counters=counters,
        )  # fmt: skip
        held = _claimed(protocol, rows)
        publisher.hold(held)
        for step in range(steps):
            outputs = [Output(job.request_id, 0, [step + 1000], f" {step}") for job in held]
            watch.time("push", publisher.push, outputs)
            watch.time("flush", publisher.flush)
        protocol.redis.close()
    return watch.figures()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    print(table({f"host cost, {options.rows} streams": measure(options.rows, options.steps)}))


if __name__ == "__main__":
    main()
