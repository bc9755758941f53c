"""One long row among short ones: what the short ones pay, in time and in KV memory.

    python -m benchmarks.studies.ragged --shape 0.6b --batch 64 --long 16384 --steps 60

Two batches of one engine's kind take turns, `batch` short rows against one long row and the rest
short, all decoding greedily: the step's ratio is what the long row costs everybody. Then the same
of mlx-lm's BatchGenerator, whose cache pads every row to the longest. Before it runs, its need is
computed (rows x longest x bytes a token, twice: joining rows copies a layer's cache) and, where
that is more than `PEER_SHARE` of the device's memory, the peer gets the longest row, halved
until it fits, and the need at the full length stands beside it: running a shared device out of
memory can hang it.

Memory: what is allocated beyond the model while the ragged batch decodes, steps' temporaries
included (`mx.get_active_memory` after each step, and MLX's own peak), over live bytes, which are
the tokens in the rows' caches times the bytes of one.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

import mlx.core as mx
from mlx_lm.generate import BatchGenerator

from benchmarks.lib.harness import Figure, Goal, progress, report
from benchmarks.lib.synthetic import SHAPES, build_bare_engine, build_model, build_served_model
from mlx_serving.worker.engine.interface import Request, SamplingParams
from mlx_serving.worker.engine.kv.padded import LanguageModel
from mlx_serving.worker.engine.model_runner import ModelRunner

SHORT: Final = (32, 224)  # prompt tokens of a short row, at least and at most
STEP_GOAL: Final = Goal("≤", 1.3)
BYTES_GOAL: Final = Goal("≤", 1.25)
PEER_SHARE: Final = 0.6
WARM_STEPS: Final = 5


@dataclass(frozen=True)
class Case:
    """The peer's model, the same as the engine holds it; how many rows decode how long."""

    model: LanguageModel
    served: LanguageModel
    vocab_size: int
    batch: int
    steps: int
    rounds: int

    @property
    def max_tokens(self) -> int:
        """More than any row decodes here: no row leaves."""
        return (self.steps + WARM_STEPS) * (self.rounds + 1) + 2 * self.batch

    def prompts(self, long: int) -> list[list[int]]:
        """Return a prompt a row; the first has `long` tokens where that isn't 0."""
        chance = random.Random(long)
        lengths = [chance.randint(*SHORT) for _ in range(self.batch)]
        if long:
            lengths[0] = long
        top = min(self.vocab_size, 250)
        return [[chance.randrange(top) for _ in range(length)] for length in lengths]


class EngineBatch:
    """Our engine with every row decoding."""

    def __init__(self, case: Case, long: int) -> None:
        """Prefill all prompts."""
        self.prompts = case.prompts(long)
        self.runner = ModelRunner(case.served)
        self.engine = build_bare_engine(
            self.runner, case.vocab_size, max_batch_rows=case.batch, kv_budget_bytes=_budget()
        )
        self.decoded = 0
        for number, prompt in enumerate(self.prompts):
            request = Request(str(number), tuple(prompt), SamplingParams(), case.max_tokens)
            self.engine.add(request)
        while self.engine.running < case.batch:
            self._count(self.engine.step())

    def _count(self, outputs: Sequence[object]) -> None:
        self.decoded += len(outputs)

    def step(self) -> None:
        """One decode step of all rows."""
        outputs = self.engine.step()
        self._count(outputs)
        assert len(outputs) == len(self.prompts)

    def live_bytes(self) -> int:
        """Bytes of the tokens in the rows' caches: prompts and what is decoded."""
        tokens = sum(map(len, self.prompts)) + self.decoded
        cost = self.runner.cost
        return tokens * cost.bytes_per_token + len(self.prompts) * cost.fixed_bytes


def _budget() -> int | None:
    """KV bytes that admission may reserve; a CPU's default is small."""
    return None if mx.default_device().type == mx.DeviceType.gpu else 1 << 33


def peer_batch(case: Case, long: int) -> Iterator[None]:
    """Decode the same rows by BatchGenerator; each `next` is one step of all of them."""
    generator = BatchGenerator(
        case.model, max_tokens=case.max_tokens, completion_batch_size=case.batch
    )
    with closing(generator):
        generator.insert(case.prompts(long))
        while len(generator.next_generated()) < case.batch:
            pass
        while True:
            assert len(generator.next_generated()) == case.batch
            yield


def time_turns(case: Case, loops: Sequence[Callable[[], object]]) -> list[list[float]]:
    """Time the loops in turn; returns ms a step, by loop and round."""
    times: list[list[float]] = [[] for _ in loops]
    for _ in range(case.rounds):
        for loop, turns in zip(loops, times, strict=True):
            for _ in range(WARM_STEPS):
                loop()
            started = time.perf_counter()
            for _ in range(case.steps):
                loop()
            turns.append((time.perf_counter() - started) / case.steps * 1e3)
    return times


def measure(case: Case, long: int) -> list[Figure]:
    """Our engine's figures, then the peer's."""
    bytes_per_token = ModelRunner(case.served).cost.bytes_per_token
    return [*_ours(case, long), *_peers(case, long, bytes_per_token)]


def _ours(case: Case, long: int) -> list[Figure]:
    memory, live = _memory(case, long)
    progress("memory is measured")
    short, ragged = EngineBatch(case, 0), EngineBatch(case, long)
    progress("both batches decode")
    times = time_turns(case, [short.step, ragged.step])
    name = f"engine, one row of {long}"
    return [
        *_ratios("engine", long, times, STEP_GOAL),
        Figure(f"{name}: live KV", live / 2**30, "GiB"),
        Figure(f"{name}: median allocated over live", memory[0], "×"),
        Figure(f"{name}: peak allocated over live", memory[1], "×", BYTES_GOAL),
    ]


def _memory(case: Case, long: int) -> tuple[tuple[float, float], int]:
    """Allocated over live bytes while a ragged batch decodes, (median, peak); and live bytes."""
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    batch = EngineBatch(case, long)
    for _ in range(WARM_STEPS):
        batch.step()
    mx.reset_peak_memory()
    live = batch.live_bytes()
    seen = []
    for _ in range(case.steps):
        batch.step()
        seen.append((mx.get_active_memory() - before) / batch.live_bytes())
    return (statistics.median(seen), (mx.get_peak_memory() - before) / live), live


def _ratios(who: str, long: int, times: list[list[float]], goal: Goal | None) -> list[Figure]:
    short, ragged = times
    return [
        Figure.median(f"{who}, all short", short, "ms"),
        Figure.median(f"{who}, one row of {long}", ragged, "ms"),
        Figure.median(
            f"{who}, one row of {long}: step over all short",
            [b / a for a, b in zip(short, ragged, strict=True)], "×", goal,
        ),
    ]  # fmt: skip


def _peers(case: Case, long: int, bytes_per_token: int) -> list[Figure]:
    def need(tokens: int) -> int:
        return 2 * case.batch * (tokens + case.max_tokens) * bytes_per_token

    room = int(device_bytes() * PEER_SHARE)
    fits = long
    while fits > SHORT[1] and need(fits) > room:
        fits //= 2
    full = f"BatchGenerator, one row of {long}"
    figures = [Figure(f"{full}: KV padded to the longest", need(long) / 2 / 2**30, "GiB")]
    if fits <= SHORT[1]:
        return figures
    progress(f"the peer's row of {fits} fits")
    short, ragged = peer_batch(case, 0), peer_batch(case, fits)
    times = time_turns(case, [lambda: next(short), lambda: next(ragged)])
    return [*figures, *_ratios("BatchGenerator", fits, times, None)]


def device_bytes() -> int:
    """Memory of the device that MLX computes on."""
    info = mx.device_info()
    keys = ("total_memory", "memory_size", "max_recommended_working_set_size")
    return next((int(info[key]) for key in keys if key in info), 8 << 30)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="tiny")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--long", type=int, default=16_384, help="tokens of the long prompt")
    parser.add_argument("--steps", type=int, default=60, help="of a turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    vocab_size = cast("int", SHAPES[arguments.shape]["vocab_size"])
    dtype = getattr(mx, arguments.dtype)
    model = build_model(arguments.shape, dtype=dtype)
    served = build_served_model(arguments.shape, dtype=dtype)
    case = Case(model, served, vocab_size, arguments.batch, arguments.steps, arguments.rounds)
    title = f"One row of {arguments.long} among {arguments.batch - 1} short, {arguments.shape}"
    report(title, measure(case, arguments.long), arguments.output)


if __name__ == "__main__":
    main()
