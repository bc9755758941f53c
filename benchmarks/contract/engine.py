"""P1, P2, P3: what the engine's decode step costs over a bare ``model(y, cache)`` loop.

    python -m benchmarks.contract.engine --shape 0.6b --batch 1,8,64 --output engine.json

All loops run in one process on the same model, prompts and device; each is timed several times
in turn. Ratios are medians of the rounds' ratios. P1: every row greedy. P2: every row with its own
temperature, top-p, top-k, min-p and seed. P3: the first steps of a batch whose settings nobody
used before, worst of five; its control is the same with nothing swapped, and shows how much of it
is the machine's own unrest.

The floor is the time in which this device can read the weights that a step reads: their bytes
over the bandwidth of a large copy, measured here.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import BatchKVCache, make_prompt_cache
from mlx_lm.sample_utils import make_sampler
from msgspec.structs import replace

from benchmarks.lib.synthetic import SHAPES, build_bare_engine, build_model, build_served_model
from mlx_serving.worker.engine.engine import Engine
from mlx_serving.worker.engine.interface import Request, SamplingParams
from mlx_serving.worker.engine.kv.padded import LanguageModel
from mlx_serving.worker.engine.kv.paged.cache import PagedCache
from mlx_serving.worker.engine.model_runner import ModelRunner

PROMPT_TOKENS = 32
SWAPS_A_ROUND = 2  # of settings, at most: where the KV cache grew beside one, it is taken again
GREEDY = SamplingParams()


@dataclass(frozen=True)
class Case:
    """One run's size; the model of the bare loop and the peers, and the engine's."""

    model: LanguageModel
    served: LanguageModel
    vocab_size: int
    batch: int
    steps: int

    @property
    def max_tokens(self) -> int:
        """More than any row decodes here, in 10 steps for each swap of P3 too."""
        return 3 * self.steps + 200 + self.batch // 8

    def kv_budget_bytes(self, runner: ModelRunner) -> int:
        """Bytes in which all rows fit, each as long as it can get."""
        cost = runner.cost
        longest = PROMPT_TOKENS + self.max_tokens + cost.overhead_tokens
        return 2 * self.batch * longest * cost.bytes_per_token

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
    """The limit: forward pass and argmax on mlx-lm's cache, pipelined, tokens read by the host."""
    caches: list[Any] = make_prompt_cache(cast("Any", case.model))
    if case.batch > 1:
        caches = [BatchKVCache([0] * case.batch) for _ in caches]
    prompts = mx.array(case.prompts())
    tokens = mx.argmax(case.model(prompts, cache=caches)[:, -1], axis=-1)
    mx.eval(tokens)
    while True:
        following = mx.argmax(case.model(tokens[:, None], cache=caches)[:, -1], axis=-1)
        mx.async_eval(following)
        tokens.tolist()
        tokens = following
        yield


def start_engine(case: Case, settings: list[SamplingParams]) -> Engine:
    """Return an engine whose rows all decode; no end of sequence, so that they stay."""
    runner = ModelRunner(case.served)
    engine = build_bare_engine(
        runner,
        case.vocab_size,
        max_batch_rows=case.batch,
        kv_budget_bytes=case.kv_budget_bytes(runner),
    )
    for index, (prompt, sampling) in enumerate(zip(case.prompts(), settings, strict=True)):
        engine.add(Request(str(index), tuple(prompt), sampling, case.max_tokens))
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
        case.model, max_tokens=case.max_tokens, completion_batch_size=case.batch
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


def measure(
    case: Case, loops: dict[str, Iterator[None]], rounds: int = 5
) -> dict[str, list[float]]:
    """Time the loops in turn, so that drift hits all of them; return ms a step, by round."""
    steps = max(1, case.steps // rounds)
    for loop in loops.values():
        time_steps(loop, min(3, steps))
    times: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(rounds):
        for name, loop in loops.items():
            times[name].append(time_steps(loop, steps))
    return times


def unseen_over_steady(case: Case, rounds: int = 5) -> dict[str, float]:
    """P3: two steps right after every row got settings never seen, over two steps before it.

    The rows' settings are swapped in place, so that neither prefill nor joining is in the figure.
    The control is the same where nothing is swapped. All rows are equally long, so now and then
    the KV cache grows for all of them at once: such a pair is a figure of its own, and the swap is
    taken again. Pools of blocks grow a few layers a step, with a deep model beside nearly every
    step, so they are grown before.
    """
    engine = start_engine(case, distinct_settings(case.batch, seed=2))
    runner = cast("ModelRunner", engine._runner)  # noqa: SLF001 - see above
    _grow_pools(runner)
    ratios: dict[str, list[float]] = {"first": [], "control": [], "cache_grows": []}

    def time_pair(kind: str, steady: float) -> None:
        before = runner.kv_bytes
        ratio = _two_steps(engine) / steady
        ratios[kind if runner.kv_bytes == before else "cache_grows"].append(ratio)

    for seed in range(3, 3 + SWAPS_A_ROUND * rounds):
        steady = min(_two_steps(engine) for _ in range(3))
        time_pair("control", steady)
        settings = distinct_settings(case.batch, seed)
        for row, sampling in zip(runner._rows, settings, strict=True):  # noqa: SLF001
            row.request = replace(row.request, sampling=sampling)
        runner._sampler = None  # noqa: SLF001
        time_pair("first", steady)
        if len(ratios["first"]) == rounds:
            break
    return {f"P3_{kind}_over_steady": max(values) for kind, values in ratios.items() if values}


def _grow_pools(runner: ModelRunner) -> None:
    """Give pools of blocks as much as a step leaves them."""
    decode_cache = runner._cache  # noqa: SLF001 - see `unseen_over_steady`
    if isinstance(decode_cache, PagedCache):
        decode_cache._pools.need(2 * decode_cache._wanted())  # noqa: SLF001


def replaced_over_steady(case: Case, rounds: int = 5) -> float:
    """P3 with all that comes with it: every row is aborted and a new one takes its place.

    The new rows' prompts are one token, which needs no prefill; their settings were never seen.
    """
    engine = start_engine(case, distinct_settings(case.batch, seed=2))
    names = [str(row) for row in range(case.batch)]
    ratios = []
    for seed in range(13, 13 + rounds):
        steady = min(_two_steps(engine) for _ in range(3))
        for name in names:
            engine.abort(name)
        names = [f"{seed}/{row}" for row in range(case.batch)]
        for name, sampling in zip(names, distinct_settings(case.batch, seed), strict=True):
            engine.add(Request(name, (seed,), sampling, case.max_tokens))
        ratios.append(_two_steps(engine) / steady)
    return max(ratios)


def _two_steps(engine: Engine) -> float:
    mx.synchronize()
    started = time.perf_counter()
    engine.step()
    engine.step()
    mx.synchronize()
    return time.perf_counter() - started


def run(case: Case, *, peer: bool) -> dict[str, float]:
    """All figures of one batch size, by name."""
    greedy = [GREEDY] * case.batch
    loops = {
        "bare": bare_loop(case),
        "engine_greedy": engine_loop(case, greedy),
        "engine_mixed": engine_loop(case, distinct_settings(case.batch, seed=1)),
    }
    if peer:
        loops["batch_generator_greedy"] = batch_generator_loop(case, greedy)
    times = measure(case, loops)
    over_bare = {
        name: statistics.median(a / b for a, b in zip(values, times["bare"], strict=True))
        for name, values in times.items()
    }
    figures = {f"{name}_ms": statistics.median(values) for name, values in times.items()}
    figures["floor_ms"] = floor_ms(case.model)
    figures["P1_greedy_over_bare"] = over_bare["engine_greedy"]
    figures["P2_mixed_over_bare"] = over_bare["engine_mixed"]
    figures |= unseen_over_steady(case)
    figures["first_of_new_rows_over_steady"] = replaced_over_steady(case)
    if peer:
        figures["batch_generator_greedy_over_bare"] = over_bare["batch_generator_greedy"]
    return figures


@cache
def copy_bandwidth() -> float:
    """Bytes/s of a large copy on this device, read and written bytes together; best of ten."""
    on_gpu = mx.default_device().type == mx.DeviceType.gpu
    source = mx.zeros(((1 << 30 if on_gpu else 1 << 28) // 4,), dtype=mx.float32)
    mx.eval(source)
    seconds = []
    for number in range(10):
        started = time.perf_counter()
        mx.eval(source + number)
        seconds.append(time.perf_counter() - started)
    return 2 * source.nbytes / min(seconds)


def floor_ms(model: LanguageModel) -> float:
    """Milliseconds to read the weights once: of an untied embedding a step reads a few rows."""
    weights = dict(tree_flatten(cast("Any", model).parameters()))
    untied = any(name.startswith("lm_head") for name in weights)
    read: int = sum(
        weight.nbytes for name, weight in weights.items() if not (untied and "embed_tokens" in name)
    )
    return read / copy_bandwidth() * 1e3


def device_name() -> str:
    info = mx.device_info()
    return f"{mx.default_device()} {info.get('device_name', '')}".strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="tiny")
    parser.add_argument("--batch", default="64", help="rows; several as 1,8,64")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--no-peer", action="store_true", help="leave mlx-lm's BatchGenerator out")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    dtype = getattr(mx, arguments.dtype)
    model = build_model(arguments.shape, dtype=dtype)
    served = build_served_model(arguments.shape, dtype=dtype)
    settings = {key: str(value) for key, value in vars(arguments).items()}
    report: dict[str, Any] = {
        "device": device_name(), "mlx": version("mlx"), "settings": settings,
        "copy_bandwidth_GB_s": copy_bandwidth() / 1e9,
    }  # fmt: skip
    show(report)
    for batch in map(int, arguments.batch.split(",")):
        case = Case(model, served, SHAPES[arguments.shape]["vocab_size"], batch, arguments.steps)
        figures = run(case, peer=not arguments.no_peer)
        show({"batch": batch} | figures)
        report |= {f"{name}[{batch}]": value for name, value in figures.items()}
        if arguments.output:
            arguments.output.write_text(json.dumps(report, indent=2) + "\n")


def show(figures: dict[str, Any]) -> None:
    """Print one a line."""
    for name, value in figures.items():
        text = f"{value:.3f}" if isinstance(value, float) else value
        print(f"{name:36} {text}", flush=True)


if __name__ == "__main__":
    main()
