"""What the scale benchmark is told to run, and what it says of each stage."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.lib.harness import MODEL, Figure, Goal, machine
from benchmarks.lib.process_cpu import GroupLoad
from mlx_serving.common.job.schema import GenerationJob

PROMPT = "The quick brown fox jumps over the lazy dog. " * 5


@dataclass(frozen=True)
class Plan:
    """What is run. `rate`, `fast` and `bulk` are a row's tokens/s; 0 leaves a stage out."""

    workers: tuple[int, ...] = (1, 8, 16, 32, 64)
    rows: int = 64
    rate: float = 3.0
    bulk: float = 0.0
    fast: tuple[float, ...] = ()
    tokens: int = 64  # of a job, on average
    bulk_tokens: int = 256
    queued: int = 100_000
    hosts: int = 10
    consumers: int = 4
    seconds: float = 6.0
    durable: bool = False  # a stage with AOF `always`
    ceiling: bool = False

    def job(self, number: int, *, stream: bool) -> GenerationJob:
        """Job `number`: in the default lane with `stream`, in the bulk lane without."""
        lane: dict[str, Any] = {} if stream else {"lane": "bulk", "stream": False}
        fields = {
            "model": MODEL,
            "prompt": PROMPT[:200],
            "max_tokens": self._length(number, stream=stream),
        } | lane
        return GenerationJob.parse(fields | {"seed": number})

    def _length(self, number: int, *, stream: bool) -> int:
        """Tokens of job `number`: 1 to twice the mean, so that rows end at all times."""
        return 1 + number * 7919 % (2 * (self.tokens if stream else self.bulk_tokens) - 1)


SMALL = Plan((1, 2, 4), 16, tokens=32, queued=2000, hosts=2, consumers=1)
"""What a machine with few cores can show."""
QUICK = Plan((1, 2), 4, tokens=8, queued=100, hosts=2, consumers=1, seconds=2.0)


@dataclass(frozen=True)
class Point:
    """One stage's figures; rates a second, sizes a token."""

    name: str
    workers: int
    offered: float  # tokens/s, were steps to take their sleep and no more
    streams: int  # rows that ran, at the end of the window
    queued: int  # jobs that waited in the queue then
    tokens: float
    events: float
    jobs: float
    gap_p50_ms: float
    gap_p99_ms: float
    backlog: int
    commands: float
    scripts: float
    bytes_in: float
    bytes_out: float
    loads: Mapping[str, GroupLoad]

    @property
    def proves(self) -> bool:
        """Whether no group of processes was too busy."""
        return not any(load.busy for load in self.loads.values())


def write(output: Path, plan: Plan, points: Sequence[Point], limits: Sequence[Figure]) -> None:
    """Write the JSON file."""
    report = {"plan": asdict(plan), "machine": machine(), "points": [asdict(p) for p in points]}
    report["ceilings"] = [figure.as_json() for figure in limits]
    output.write_text(json.dumps(report, indent=2) + "\n")


def line(point: Point) -> str:
    """A point in one line."""
    shares = ", ".join(
        f"{name} {load.share:.0%} of {load.cores} (busiest {load.busiest:.0%})"
        for name, load in point.loads.items()
    )
    return (
        f"{point.workers} workers, {point.streams} rows, {point.queued:,} queued, {point.name}: "
        f"{point.tokens:,.0f} of {point.offered:,.0f} tokens/s, "
        f"{point.events:,.0f} events/s, {point.jobs:,.0f} jobs/s, "
        f"gap {point.gap_p50_ms:.0f}/{point.gap_p99_ms:.0f} ms, backlog {point.backlog}; "
        f"a token: {point.commands:.1f} commands, {point.scripts:.3f} scripts, "
        f"{point.bytes_in:.0f} B in, {point.bytes_out:.0f} B out; CPU {shares}"
    )


def figures(points: Sequence[Point]) -> list[Figure]:
    """Over linear; the goal holds where no group was too busy."""
    one = next(p for p in points if p.workers == 1)
    scaled = [p for p in points if p.name == one.name and p is not one]
    return [Figure("1 worker", one.tokens, "tokens/s")] + [
        Figure(
            f"P8 {p.workers} workers over linear" + ("" if p.proves else " (a group over 70%)"),
            p.tokens / (p.workers * one.tokens), "×", Goal("≥", 0.95) if p.proves else None,
        )
        for p in scaled
    ]  # fmt: skip
