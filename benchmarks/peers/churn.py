"""Jobs that come and go all the time: the engine's tokens/s over mlx-lm's BatchGenerator's.

    python -m benchmarks.peers.churn --shape 0.6b --batch 64 --steps 150 --rounds 3

One process, one model, the same stream of jobs for both: prompts of 16 to 128 tokens, completions
of 16 to 64, a new job handed over whenever one ends, so that `batch` jobs are always in hand. Ours
is `engine.add` and `engine.step`, text included; the peer `insert` and `next`, tokens alone.
They take turns; each turn is `steps` calls, and counts tokens over the time of the turn. Both run
until every first job has left before the clock starts.

Settings 0 is greedy; n gives the jobs n different pairs of temperature and top_p in turn, the
peer's as one sampler a pair, made once.
"""

import argparse
import itertools
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import mlx.core as mx
from mlx_lm.generate import BatchGenerator
from mlx_lm.sample_utils import make_sampler

from benchmarks.lib.harness import Figure, Goal, progress, report
from benchmarks.lib.synthetic import SHAPES, build_bare_engine, build_model, build_served_model
from mlx_serving.worker.engine.interface import Request, SamplingParams
from mlx_serving.worker.engine.kv.padded import LanguageModel
from mlx_serving.worker.engine.model_runner import ModelRunner

GOAL: Final = Goal("≥", 1.3)
WARM_STEPS: Final = 80  # longer than any job: one prefill chunk and 64 tokens


@dataclass(frozen=True)
class Job:
    """One job: its number, prompt, length in tokens, and which of the settings it has."""

    number: int
    prompt: list[int]
    tokens: int


def jobs(vocab_size: int, seed: int = 0) -> Iterator[Job]:
    """Return jobs without end, the same for every contestant."""
    chance = random.Random(seed)
    top = min(vocab_size, 250)
    for number in itertools.count():
        length = chance.randint(16, 128)
        prompt = [chance.randrange(top) for _ in range(length)]
        yield Job(number, prompt, chance.randint(16, 64))


def settings_of(count: int) -> list[SamplingParams]:
    """Return `count` different settings; 0: greedy alone."""
    if not count:
        return [SamplingParams()]
    return [SamplingParams(temperature=0.8 + 0.05 * n, top_p=0.95 - 0.02 * n) for n in range(count)]


@dataclass(frozen=True)
class Case:
    """What both contestants run: the peer's model, and the same as the engine holds it."""

    model: LanguageModel
    served: LanguageModel
    vocab_size: int
    batch: int
    settings: Sequence[SamplingParams]


def engine_loop(case: Case) -> Iterator[int]:
    """Step our engine; yields the tokens of each step."""
    engine = build_bare_engine(ModelRunner(case.served), case.vocab_size, max_batch_rows=case.batch)
    feed = jobs(case.vocab_size)
    lengths: dict[str, int] = {}
    while True:
        while len(lengths) < case.batch:
            job = next(feed)
            sampling = case.settings[job.number % len(case.settings)]
            lengths[str(job.number)] = job.tokens
            engine.add(Request(str(job.number), tuple(job.prompt), sampling, job.tokens))
        outputs = engine.step()
        for output in outputs:
            lengths[output.request_id] -= len(output.token_ids)
            if output.finish_reason is not None:
                assert lengths.pop(output.request_id) == 0, "a job of another length"
        yield sum(len(output.token_ids) for output in outputs)


def peer_loop(case: Case) -> Iterator[int]:
    """Step mlx-lm's BatchGenerator; yields the tokens of each call."""
    samplers: list[Any] = [
        make_sampler(s.temperature, top_p=s.top_p) if s.temperature else None for s in case.settings
    ]
    generator = BatchGenerator(case.model, completion_batch_size=case.batch)
    feed = jobs(case.vocab_size)
    lengths: dict[int, int] = {}
    try:
        while True:
            while len(lengths) < case.batch:
                job = next(feed)
                sampler = samplers[job.number % len(samplers)]
                (uid,) = generator.insert([job.prompt], [job.tokens], samplers=[sampler])
                lengths[uid] = job.tokens
            _, responses = generator.next()
            for response in responses:
                lengths[response.uid] -= 1
                if response.finish_reason is not None:
                    assert lengths.pop(response.uid) == 0, "a job of another length"
            yield len(responses)
    finally:
        generator.close()


def turn(loop: Iterator[int], steps: int) -> float:
    """Return tokens/s over `steps` calls."""
    started = time.perf_counter()
    tokens = sum(next(loop) for _ in range(steps))
    return tokens / (time.perf_counter() - started)


def measure(case: Case, steps: int, rounds: int) -> list[Figure]:
    """Both in turn; medians of the rounds."""
    ours, peer = engine_loop(case), peer_loop(case)
    cold = [_seconds(loop) for loop in (ours, peer)]
    progress(f"warm: ours {cold[0]:.1f} s, peer {cold[1]:.1f} s")
    pairs = []
    for _ in range(rounds):
        pairs.append((turn(ours, steps), turn(peer, steps)))
        progress(f"round {len(pairs)}: {pairs[-1][0]:.0f}, peer {pairs[-1][1]:.0f} tokens/s")
    name = f"{len(case.settings)} settings" if len(case.settings) > 1 else "one setting"
    return [
        Figure.median(f"{name}: engine", [a for a, _ in pairs], "tokens/s"),
        Figure.median(f"{name}: BatchGenerator", [b for _, b in pairs], "tokens/s"),
        Figure(f"{name}: engine, first {WARM_STEPS} steps", cold[0], "s"),
        Figure(f"{name}: BatchGenerator, first {WARM_STEPS} steps", cold[1], "s"),
        Figure.median(f"{name}: engine over BatchGenerator", [a / b for a, b in pairs], "×", GOAL),
    ]


def _seconds(loop: Iterator[int]) -> float:
    """Warm up until every first job has left; return how long that took."""
    started = time.perf_counter()
    turn(loop, WARM_STEPS)
    return time.perf_counter() - started


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="tiny")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=150, help="of a turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--settings", default="0", help="numbers of settings; 0: greedy")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    vocab_size = cast("int", SHAPES[arguments.shape]["vocab_size"])
    dtype = getattr(mx, arguments.dtype)
    model = build_model(arguments.shape, dtype=dtype)
    served = build_served_model(arguments.shape, dtype=dtype)
    progress("the model is built")
    figures = [
        figure
        for number in arguments.settings.split(",")
        for figure in measure(
            Case(model, served, vocab_size, arguments.batch, settings_of(int(number))),
            arguments.steps,
            arguments.rounds,
        )
    ]
    report(f"Churn, batch {arguments.batch}, {arguments.shape}", figures, arguments.output)


if __name__ == "__main__":
    main()
