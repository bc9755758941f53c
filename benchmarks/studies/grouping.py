"""Bulk lines grouped by prefix against the file's order: prompt tokens computed, tokens/s.

    python -m benchmarks.studies.grouping                               # Tally
    python -m benchmarks.studies.grouping --model 0.6b --prefix 1024 --rows 64
    python -m benchmarks.studies.grouping --affinity --lines 240 --prefix 640 --rows 8

A bulk file of prompts with 20 different beginnings, in random order, goes through the real feeder,
Redis, and one or two real workers with a prefix cache on paged KV blocks. Where MLX has no GPU the
paged cache's pure-MLX path runs, which is slow: its tokens/s are no figures of a GPU's.

* room for 2: the prefix cache may keep two of the 20 beginnings that no row uses.
* room for all: it may keep all 20.
* off: no prefix cache, every prompt is computed.
* affinity off, on: whether a worker passes over lines whose beginning another one has
  (`cache.prefix_affinity_ms`); beginnings of 512 characters or more have a mark.

*Computed* are the prompt tokens that no cache gave (`usage`); *unique* are those that differ: each
beginning once, and every line's own.
"""

import argparse
import json
import random
import string
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer

from benchmarks.contract.streaming import Load, engine_spec
from benchmarks.lib.harness import MODEL, Figure, bench_settings, progress, report, running_worker
from mlx_serving.common.redis.local import LocalRedis
from mlx_serving.producer.batch.objects import Batch
from mlx_serving.producer.client import Client
from mlx_serving.worker.models.loading import EngineSpec

PREFIXES: Final = 20
OWN: Final = 24  # characters of each line
DECODED: Final = 8  # tokens a line
KV_BYTES: Final = {"tally": 2048, "tiny": 256, "0.6b": 114_688}  # a token's keys and values


@dataclass(frozen=True, slots=True)
class Bench:
    """What runs. `prefix`: characters of a beginning."""

    model: str = "tally"
    lines: int = 2000
    prefix: int = 160
    rows: int = 16
    folder: str | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """One run of the file. `prefixes`: how many the cache may keep idle; 0: it is off.

    `affinity`: whether workers heed marks; None where lines have none.
    """

    order: str
    workers: int
    prefixes: int
    affinity: bool | None = None

    @property
    def name(self) -> str:
        """How the table calls it."""
        cache = {0: "off", PREFIXES: "all"}.get(self.prefixes, str(self.prefixes))
        marks = {None: "", False: ", affinity off", True: ", affinity on"}[self.affinity]
        workers = f"{self.workers} worker{'s' * (self.workers > 1)}"
        return f"{workers}, room for {cache}, {self.order}{marks}"


CASES: Final = (
    Case("file", 1, 0), Case("file", 1, 2), Case("prefix", 1, 2), Case("file", 1, PREFIXES),
    Case("prefix", 1, PREFIXES), Case("file", 2, 2), Case("prefix", 2, 2),
)  # fmt: skip
AFFINITY_CASES: Final = tuple(
    Case(order, workers, prefixes, affinity)
    for order, prefixes in (("prefix", 2), ("file", PREFIXES))
    for workers in (2, 4)
    for affinity in (False, True)
)


def prompts(bench: Bench) -> list[str]:
    """Twenty beginnings, each as often as the others, in random order."""
    chance = random.Random(0)

    def text(size: int) -> str:
        return "".join(chance.choices(string.ascii_lowercase, k=size))

    beginnings = [text(bench.prefix) for _ in range(PREFIXES)]
    order = [n % PREFIXES for n in range(bench.lines)]
    chance.shuffle(order)
    return [beginnings[n] + text(OWN) for n in order]


def unique_tokens(texts: Sequence[str], tokenizer: Path) -> int:
    """Tokens of a tree of the prompts."""
    encoder = Tokenizer.from_file(str(tokenizer))
    total, last = 0, list[int]()
    for ids in sorted(encoder.encode(text, add_special_tokens=False).ids for text in texts):
        pairs = zip(ids, last, strict=False)
        total += len(ids) - sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        last = ids
    return total


def run(bench: Bench, case: Case, spec: EngineSpec, path: Path) -> tuple[Batch, float]:
    """The batch, ended, and the seconds from the first line fed to the last one written down."""
    room = case.prefixes * (bench.prefix + 32) * KV_BYTES[bench.model]
    with ExitStack() as stack:
        server = stack.enter_context(LocalRedis())
        client = stack.enter_context(server.client())
        settings = bench_settings(
            server.url, batch__max_rows=bench.rows, cache__prefix_bytes=room, cache__kind="paged",
            cache__prefix_affinity_ms=150 if case.affinity else 0,
        )  # fmt: skip
        for n in range(case.workers):
            stack.enter_context(running_worker(settings, spec, client, name=f"grouping-{n}"))
        batches = Client(settings=settings).batches
        folder = path.with_suffix(f".{time.monotonic_ns()}")
        options: dict[str, Any] = {
            "model": MODEL,
            "raw": True,
            "max_tokens": DECODED,
            "temperature": 0,
        }
        batch = batches.submit(path, folder=folder, start=False, order=case.order, **options)
        started = time.perf_counter()
        return batches.run(batch.id), time.perf_counter() - started


def measure(bench: Bench = Bench(), cases: Sequence[Case] = CASES) -> list[Figure]:
    """Each case on the same file."""
    figures = []
    texts = prompts(bench)
    load = Load(bench.model, folder=bench.folder)
    with tempfile.TemporaryDirectory() as scratch, engine_spec(load) as spec:
        path = Path(scratch) / "lines.jsonl"
        path.write_text("".join(json.dumps(text) + "\n" for text in texts))
        unique = unique_tokens(texts, Path(spec.model_path) / "tokenizer.json")
        for case in cases:
            progress(case.name)
            batch, seconds = run(bench, case, spec, path)
            if batch.request_counts.completed != bench.lines:
                raise RuntimeError(f"{case.name}: {batch.request_counts} of {bench.lines} lines")
            usage = batch.usage
            computed = usage.input_tokens - usage.input_tokens_details.cached_tokens
            figures += [
                Figure(f"{case.name}: computed", computed, "tokens"),
                Figure(f"{case.name}: computed over unique", computed / unique, "×"),
                Figure(f"{case.name}: of the prompts", usage.input_tokens / seconds, "tokens/s"),
                Figure(f"{case.name}: decoded", usage.output_tokens / seconds, "tokens/s"),
            ]
            print(*figures[-4:], sep="\n", flush=True)
    return figures


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=KV_BYTES, default="tally")
    parser.add_argument("--lines", type=int, default=2000)
    parser.add_argument("--prefix", type=int, default=160, help="characters of a beginning")
    parser.add_argument("--rows", type=int, default=16, help="of a worker's batch")
    parser.add_argument("--folder", help="of a synthetic model")
    parser.add_argument("--cases", default="", help="numbers of the cases, from 0; without: all")
    parser.add_argument("--affinity", action="store_true", help="cases of several workers")
    parser.add_argument("--output", type=Path)
    options = vars(parser.parse_args())
    output, chosen = options.pop("output"), options.pop("cases")
    among = AFFINITY_CASES if options.pop("affinity") else CASES
    cases = [among[int(n)] for n in chosen.split(",") if n] or among
    report("Grouping by prefix", measure(Bench(**options), cases), output)


if __name__ == "__main__":
    main()
