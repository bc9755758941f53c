"""The prefix cache: `python -m benchmarks.studies.prefix [--shape 0.6b] [--output prefix.json]`.

P5: 64 jobs that share a prefix of 1,024 tokens and arrive together; prompt tokens computed over
unique tokens, with the prefix cache and without, and the time until every job has its first
token. A prefix of 1,040 tokens does not end with a block; it is measured too.

Lookup: one call that finds a prefix of 10,000 blocks (320,000 tokens) in an index that holds
it among as many others, native and twin, in milliseconds; the same for a prompt of 1,024 tokens.
"""

import argparse
import json
import random
import statistics
import time
from array import array
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from benchmarks.lib.synthetic import SHAPES, build_bare_engine, build_model
from mlx_serving.worker.engine.engine import Engine
from mlx_serving.worker.engine.interface import Request, SamplingParams
from mlx_serving.worker.engine.kv.choice import choose_cache
from mlx_serving.worker.engine.kv.paged.cache import BLOCK_TOKENS, PROMPT_TOKENS
from mlx_serving.worker.engine.kv.prefix import index as twin
from mlx_serving.worker.engine.kv.prefix.choice import choose_prefix_index
from mlx_serving.worker.engine.loader import warm_up
from mlx_serving.worker.engine.model_runner import ModelRunner
from mlx_serving.worker.engine.native import load_native
from mlx_serving.worker.engine.scheduling.chunk import PrefillChunk

if TYPE_CHECKING:
    from collections.abc import Callable

JOBS = 64
TAIL_TOKENS = 32  # of each job, its own
LOOKUP_BLOCKS = 10_000
LOOKUPS = 7


class CountingRunner(ModelRunner):
    """Counts the prompt tokens that it computes, without padding and with it."""

    tokens = padded = 0

    def prefill(self, chunk: PrefillChunk) -> None:
        """Count, then compute."""
        starts = [row.prefill.cached_tokens + chunk.start for row in chunk.leaders]
        for row, start in zip(chunk.leaders, starts, strict=True):
            self.tokens += max(0, min(start + chunk.length, row.context_length) - start)
        self.padded += len(chunk.groups) * -(-chunk.length // PROMPT_TOKENS) * PROMPT_TOKENS
        super().prefill(chunk)


def new_engine(
    shape: str, dtype: mx.Dtype, prefix_cache_bytes: int | None
) -> tuple[Engine, CountingRunner]:
    """An engine on random weights, with blocks on any device."""
    model = build_model(shape, dtype=dtype)
    runner = CountingRunner(model, choose_cache(model, kind="paged"))
    vocabulary = SHAPES[shape]["vocab_size"]
    engine = build_bare_engine(
        runner, vocabulary, max_batch_rows=JOBS, prefix_cache_bytes=prefix_cache_bytes
    )
    warm_up(engine)
    return engine, runner


def jobs_of(prefix_tokens: int, seed: int) -> list[Request]:
    chance = random.Random(seed)
    prefix, *tails = (
        tuple(chance.randrange(250) for _ in range(count))
        for count in (prefix_tokens, *[TAIL_TOKENS] * JOBS)
    )
    return [
        Request(f"{seed}.{n}", prefix + tail, SamplingParams(), 4) for n, tail in enumerate(tails)
    ]


def run(engine: Engine, jobs: list[Request]) -> float:
    """Add all jobs, step until each has its first token; the seconds of that. Then end them."""
    started = time.perf_counter()
    for job in jobs:
        engine.add(job)
    missing = {job.id for job in jobs}
    first = 0.0
    while engine.has_work:
        missing -= {output.request_id for output in engine.step() if output.token_ids}
        if not missing and not first:
            first = time.perf_counter() - started
    return first


def shared_prefix(shape: str, dtype: mx.Dtype, rounds: int) -> dict[str, float]:
    """P5 and what it saves."""
    figures: dict[str, float] = {}
    for label, cache_bytes in (("with", None), ("without", 0)):
        engine, runner = new_engine(shape, dtype, cache_bytes)
        run(engine, jobs_of(1024, seed=1))  # shapes that a GPU's libraries see for the first time
        for prefix_tokens in (1024, 1040):
            seconds = []
            for seed in range(2, rounds + 2):
                runner.tokens = runner.padded = 0
                seconds.append(run(engine, jobs_of(prefix_tokens, seed=seed + prefix_tokens)))
            unique = prefix_tokens + JOBS * TAIL_TOKENS
            name = f"{label}_cache_{prefix_tokens}"
            # The last token of a prompt is computed too, in the decode batch.
            figures[f"{name}_computed_over_unique"] = round((runner.tokens + JOBS) / unique, 4)
            figures[f"{name}_padded_over_unique"] = round((runner.padded + JOBS) / unique, 4)
            figures[f"{name}_all_first_tokens_ms"] = round(statistics.median(seconds) * 1e3, 1)
            print({k: v for k, v in figures.items() if k.startswith(name)}, flush=True)
    return figures


def lookup() -> dict[str, float]:
    """Milliseconds of a lookup, by implementation."""
    native, _ = load_native()
    makes: dict[str, Callable[[int], Any]] = {"twin": twin.PrefixIndex}
    if native is not None:
        makes["native"] = native.PrefixIndex
    figures: dict[str, float] = {}
    chance = random.Random(0)
    prompts = [
        array("i", [chance.randrange(150_000) for _ in range(LOOKUP_BLOCKS * BLOCK_TOKENS)])
        for _ in range(2)
    ]
    keys = [prompt.tobytes() for prompt in prompts]
    for name, make in makes.items():
        index = make(BLOCK_TOKENS)
        for number, key in enumerate(keys):
            first = number * LOOKUP_BLOCKS
            index.insert(b"", key, list(range(first, first + LOOKUP_BLOCKS)))
        short = keys[0][: 4 * 1024]
        for label, key in (("10000_blocks", keys[0]), ("1024_tokens", short)):
            milliseconds = []
            for _ in range(LOOKUPS):
                started = time.perf_counter()
                index.match(b"", key)
                milliseconds.append((time.perf_counter() - started) * 1e3)
            figures[f"lookup_{label}_{name}_ms"] = round(statistics.median(milliseconds), 4)
    return figures


def churn() -> dict[str, float]:
    """Microseconds a job of 1,024 tokens costs the index: find, hold, enter, release, evict."""
    figures = {}
    for prefer_native in (True, False):
        make, report = choose_prefix_index(prefer_native=prefer_native)
        index = make(BLOCK_TOKENS)
        chance = random.Random(0)
        prompts = [
            array("i", [chance.randrange(150_000) for _ in range(1024)]).tobytes()
            for _ in range(100)
        ]
        started = time.perf_counter()
        for number in range(2000):
            key = prompts[chance.randrange(100)]
            known, _ = index.match(b"", key)
            index.hold(known)
            blocks = known + [number * 32 + n for n in range(32 - len(known))]
            index.insert(b"", key, blocks)
            index.release(blocks)
            index.evict(len(index) - 2000)
        figures[f"job_of_1024_tokens_{report.implementation}_us"] = round(
            (time.perf_counter() - started) / 2000 * 1e6, 1
        )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default=None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    dtype = options.dtype or ("bfloat16" if options.shape == "0.6b" else "float32")
    figures = {**lookup(), **churn()}
    print(figures, flush=True)
    figures |= shared_prefix(options.shape, getattr(mx, dtype), options.rounds)
    report = {"shape": options.shape, "dtype": dtype, "device": str(mx.default_device()), **figures}
    print(json.dumps(report, indent=2))
    if options.output:
        options.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
