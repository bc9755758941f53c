"""Prefix affinity off and on: chats over several workers, prompt tokens computed, TTFT.

    python -m benchmarks.studies.affinity                               # two workers
    python -m benchmarks.studies.affinity --workers 4 --rounds 2

Conversations of several turns begin at a set rate, each with one of a few long system prompts;
every turn sends all that was said before, reads the whole answer, and waits a moment. Real workers
with Tally, paged KV blocks and a prefix cache; each run has a Redis, workers and empty caches of
its own, off and on in turn. Where MLX has no GPU the pure-MLX path of the paged cache runs: times
compare with each other only.

*Computed* are the prompt tokens that no cache gave (`usage`), *later* the second turns and those
after them; *queued* is from enqueue to claim.
"""

import argparse
import asyncio
import random
import statistics
import string
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.contract.streaming import Load, engine_spec
from benchmarks.lib.harness import (
    MODEL,
    Figure,
    bench_settings,
    percentile,
    progress,
    report,
    running_worker,
)
from mlx_serving.common.redis.local import LocalRedis
from mlx_serving.common.settings import Settings
from mlx_serving.producer.async_client import AsyncClient
from mlx_serving.worker.models.loading import EngineSpec

SYSTEMS: Final = 3


@dataclass(frozen=True, slots=True)
class Bench:
    """What runs. `system`, `said`: characters of a system prompt and of a user's turn.

    `rate`: conversations that begin a second, `think`: seconds between their turns.
    """

    workers: int = 2
    talks: int = 12
    turns: int = 4
    system: int = 768
    said: int = 256
    rate: float = 0.5
    think: float = 2.0
    tokens: int = 4
    rows: int = 16
    affinity_ms: int = 150


@dataclass(frozen=True, slots=True)
class Turn:
    """What became of one turn. `first`: seconds to the first token, `queued`: to the claim."""

    number: int
    first: float
    queued: float
    prompt: int
    cached: int


def letters(chance: random.Random, size: int) -> str:
    """Text that no other prompt begins with."""
    return "".join(chance.choices(string.ascii_lowercase, k=size))


async def talk(client: AsyncClient, bench: Bench, number: int) -> list[Turn]:
    """One conversation, to its end."""
    chance = random.Random(1000 + number)
    system = letters(random.Random(number % SYSTEMS), bench.system)
    messages = [{"role": "system", "content": system}]
    await asyncio.sleep(number / bench.rate)
    turns = []
    for turn in range(bench.turns):
        messages.append({"role": "user", "content": letters(chance, bench.said)})
        began, first = time.monotonic(), 0.0
        handle = await client.submit(
            model=MODEL, messages=messages, max_tokens=bench.tokens, temperature=0, seed=number,
            lane="interactive",
        )  # fmt: skip
        async for event in client.stream(handle.id):
            if event.choices and not first:
                first = time.monotonic() - began
        result = await client.result(handle.id)
        assert result.usage is not None
        details = result.usage.prompt_tokens_details
        cached = details.cached_tokens if details else 0
        timings = result.timings
        queued = ((timings.started_ms or 0) - (timings.enqueued_ms or 0)) / 1000
        turns.append(Turn(turn, first, queued, result.usage.prompt_tokens, cached))
        messages.append({"role": "assistant", "content": result.text or "-"})
        await asyncio.sleep(chance.uniform(0.5, 1.5) * bench.think)
    return turns


async def talks(settings: Settings, bench: Bench) -> list[Turn]:
    """All conversations, each from its own moment on."""
    async with AsyncClient(settings=settings) as client:
        found = await asyncio.gather(*(talk(client, bench, n) for n in range(bench.talks)))
    return [turn for turns in found for turn in turns]


def run(bench: Bench, spec: EngineSpec, affinity_ms: int) -> list[Turn]:
    """Bring Redis and workers up, and talk."""
    with ExitStack() as stack:
        server = stack.enter_context(LocalRedis())
        client = stack.enter_context(server.client())
        settings = bench_settings(
            server.url,
            batch__max_rows=bench.rows,
            cache__kind="paged",
            cache__prefix_affinity_ms=affinity_ms,
        )
        for n in range(bench.workers):
            stack.enter_context(running_worker(settings, spec, client, name=f"affinity-{n}"))
        return asyncio.run(talks(settings, bench))


def figures(name: str, runs: Sequence[Sequence[Turn]]) -> list[Figure]:
    """Medians of the rounds."""

    def found(turns: Sequence[Turn], first: int) -> float:
        chosen = [turn for turn in turns if turn.number >= first]
        return sum(turn.cached for turn in chosen) / sum(turn.prompt for turn in chosen)

    def to_first(turns: Sequence[Turn], first: int) -> float:
        return 1000 * statistics.median(turn.first for turn in turns if turn.number >= first)

    def queued(turns: Sequence[Turn], percent: int) -> float:
        return 1000 * percentile([turn.queued for turn in turns], percent)

    computed = [float(sum(turn.prompt - turn.cached for turn in turns)) for turns in runs]
    return [
        Figure.median(f"{name}: computed", computed, "tokens"),
        Figure.median(f"{name}: prompt tokens found", [found(turns, 0) for turns in runs]),
        Figure.median(f"{name}: prompt tokens found, later", [found(turns, 1) for turns in runs]),
        Figure.median(f"{name}: queued p50", [queued(turns, 50) for turns in runs], "ms"),
        Figure.median(f"{name}: queued p95", [queued(turns, 95) for turns in runs], "ms"),
        Figure.median(f"{name}: TTFT p50", [to_first(turns, 0) for turns in runs], "ms"),
        Figure.median(f"{name}: TTFT p50 later", [to_first(turns, 1) for turns in runs], "ms"),
    ]


def measure(bench: Bench = Bench(), rounds: int = 3) -> list[Figure]:
    """Off and on in turn."""
    cases = {"off": 0, "on": bench.affinity_ms}
    runs: dict[str, list[list[Turn]]] = {name: [] for name in cases}
    with engine_spec(Load("tally")) as spec:
        for number in range(rounds):
            for name in cases if number % 2 == 0 else reversed(cases):
                progress(f"round {number + 1}, affinity {name}")
                runs[name].append(run(bench, spec, cases[name]))
    return [figure for name in cases for figure in figures(name, runs[name])]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    default = Bench()
    parser.add_argument("--workers", type=int, default=default.workers)
    parser.add_argument("--talks", type=int, default=default.talks)
    parser.add_argument("--turns", type=int, default=default.turns)
    parser.add_argument("--system", type=int, default=default.system, help="characters")
    parser.add_argument("--said", type=int, default=default.said, help="characters of a turn")
    parser.add_argument("--rate", type=float, default=default.rate, help="that begin a second")
    parser.add_argument("--think", type=float, default=default.think, help="seconds between turns")
    parser.add_argument("--tokens", type=int, default=default.tokens, help="of an answer")
    parser.add_argument("--rows", type=int, default=default.rows, help="of a worker's batch")
    parser.add_argument("--affinity-ms", type=int, default=default.affinity_ms)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    options = vars(parser.parse_args())
    output, rounds = options.pop("output"), options.pop("rounds")
    report("Prefix affinity", measure(Bench(**options), rounds), output)


if __name__ == "__main__":
    main()
