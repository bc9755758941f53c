"""P1, P2, P3: what the engine's decode step costs over a bare ``model(y, cache)`` loop.

    python benchmarks/engine.py --shape 0.6b --batch 64 --steps 100 --output engine.json

All loops run in one process on the same model, prompts and device; each is timed several times
in turn and the median step counts. P1: every row greedy. P2: every row with its own temperature,
top-p, top-k, min-p and seed. P3: the first step of a batch whose settings nobody used before.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_sampler

from benchmarks.synthetic import SHAPES, build_model, build_tokenizer
from mlx_serving.worker.engine.engine import Engine
from mlx_serving.worker.engine.kv_cache import LanguageModel, new_cache
from mlx_serving.worker.engine.model_runner import ModelRunner
from mlx_serving.worker.engine.models import EngineOptions, build_engine
from mlx_serving.worker.engine.sequence import ModelInfo, Request, SamplingParams

PROMPT_TOKENS = 32
GREEDY = SamplingParams()


@dataclass(frozen=True)
class Case:
    """One run's size and model."""

    model: LanguageModel
    vocab_size: int
    batch: int
    steps: int

    def prompts(self) -> list[list[int]]:
        """Random prompts of one length, so that no loop pays for padding."""
        chance = random.Random(0)
        top = min(self.vocab_size, 250)
        return [[chance.randrange(top) for _ in range(PROMPT_TOKENS)] for _ in range(self.batch)]


def distinct_settings(count: int, seed: int) -> list[SamplingParams]:
    chance = random.Random(seed)
    return [
        SamplingParams(
            temperature=chance.uniform(0.5, 1.5),
            top_p=chance.uniform(0.7, 0.99),
            top_k=chance.randrange(20, 2000),
            min_p=chance.uniform(0.0, 0.05),
            seed=chance.randrange(2**64),
        )
        for _ in range(count)
    ]


def bare_loop(case: Case) -> Iterator[None]:
    """The floor: forward pass and argmax on a batch cache, pipelined, tokens read by the host."""
    cache: list[Any] = new_cache(case.model, case.batch)
    if case.batch == 1:
        cache = make_prompt_cache(case.model)
    prompts = mx.array(case.prompts())
    tokens = mx.argmax(case.model(prompts, cache=cache)[:, -1], axis=-1)
    mx.eval(tokens)
    while True:
        following = mx.argmax(case.model(tokens[:, None], cache=cache)[:, -1], axis=-1)
        mx.async_eval(following)
        tokens.tolist()
        tokens = following
        yield


def start_engine(case: Case, settings: list[SamplingParams]) -> Engine:
    """Return an engine whose rows all decode; no end of sequence, so that they stay."""
    info = ModelInfo("synthetic", "", "", case.vocab_size, frozenset())
    options = EngineOptions(max_batch_rows=case.batch, kv_budget_bytes=1 << 36)
    engine = build_engine(ModelRunner(case.model), build_tokenizer(case.vocab_size), info, options)
    for index, (prompt, sampling) in enumerate(zip(case.prompts(), settings, strict=True)):
        engine.add(Request(str(index), tuple(prompt), sampling, max_tokens=case.steps * 100))
    while len(engine.step()) < case.batch:
        pass
    return engine


def engine_loop(case: Case, settings: list[SamplingParams]) -> Iterator[None]:
    engine = start_engine(case, settings)
    while True:
        assert len(engine.step()) == case.batch
        yield


def batch_generator_loop(case: Case, settings: list[SamplingParams]) -> Iterator[None]:
    """mlx-lm's own continuous batch."""
    generator = BatchGenerator(
        case.model, max_tokens=case.steps * 100, completion_batch_size=case.batch
    )
    samplers = [
        make_sampler(s.temperature, top_p=s.top_p, top_k=s.top_k, min_p=s.min_p)
        if s.temperature
        else None
        for s in settings
    ]
    generator.insert(case.prompts(), samplers=cast("Any", samplers))
    try:
        while len(generator.next_generated()) < case.batch:
            pass
        while True:
            assert len(generator.next_generated()) == case.batch
            yield
    finally:
        generator.close()


def time_steps(loop: Iterator[None], steps: int) -> float:
    """Return the mean time of a step in this round, ms."""
    return time_calls(lambda: next(loop), steps)


def time_calls(call: Callable[[], object], count: int) -> float:
    """Return the mean time of a call, ms."""
    started = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - started) / count * 1e3


def measure(case: Case, loops: dict[str, Iterator[None]], rounds: int = 5) -> dict[str, float]:
    """Time the loops in turn, so that drift hits all of them; return median ms a step."""
    steps = max(1, case.steps // rounds)
    for loop in loops.values():
        time_steps(loop, min(3, steps))
    times: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(rounds):
        for name, loop in loops.items():
            times[name].append(time_steps(loop, steps))
    return {name: statistics.median(values) for name, values in times.items()}


def unseen_over_steady(case: Case, rounds: int = 5) -> float:
    """P3: a step right after every row got settings never seen before, over the steps before it.

    The rows' settings are swapped in place, so that no prefill is in the figure. Two steps are
    timed, since the host reads a step's tokens while the next one runs.
    """
    engine = start_engine(case, distinct_settings(case.batch, seed=2))
    runner = cast("ModelRunner", engine._runner)  # noqa: SLF001 - see above
    ratios = []
    for seed in range(3, 3 + rounds):
        steady = min(time_calls(engine.step, 2) for _ in range(3))
        settings = distinct_settings(case.batch, seed)
        for row, sampling in zip(runner._rows, settings, strict=True):  # noqa: SLF001
            row.request = replace(row.request, sampling=sampling)
        runner._sampler = None  # noqa: SLF001
        ratios.append(time_calls(engine.step, 2) / steady)
    return max(ratios)


def run(case: Case, *, peer: bool) -> dict[str, float]:
    greedy = [GREEDY] * case.batch
    mixed = distinct_settings(case.batch, seed=1)
    loops = {
        "bare": bare_loop(case),
        "engine_greedy": engine_loop(case, greedy),
        "engine_mixed": engine_loop(case, mixed),
    }
    if peer:
        loops["batch_generator_greedy"] = batch_generator_loop(case, greedy)
    times = measure(case, loops)
    bare = times["bare"]
    figures = {f"{name}_ms": value for name, value in times.items()}
    figures["P1_greedy_over_bare"] = times["engine_greedy"] / bare
    figures["P2_mixed_over_bare"] = times["engine_mixed"] / bare
    figures["P3_first_over_steady"] = unseen_over_steady(case)
    if peer:
        figures["batch_generator_greedy_over_bare"] = times["batch_generator_greedy"] / bare
    return figures


def device_name() -> str:
    info = mx.device_info()
    return f"{mx.default_device()} {info.get('device_name', '')}".strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="tiny")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--no-peer", action="store_true", help="leave mlx-lm's BatchGenerator out")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    vocab_size = SHAPES[arguments.shape]["vocab_size"]
    model = build_model(arguments.shape, dtype=getattr(mx, arguments.dtype))
    case = Case(model, vocab_size, arguments.batch, arguments.steps)
    figures = run(case, peer=not arguments.no_peer)
    settings = {key: str(value) for key, value in vars(arguments).items()}
    report = {"device": device_name(), "mlx": version("mlx"), "settings": settings} | figures
    for name, value in report.items():
        print(f"{name:36} {value:.3f}" if isinstance(value, float) else f"{name:36} {value}")
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
