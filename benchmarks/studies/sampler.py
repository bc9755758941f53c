"""The sampler alone on logits [64, 151936]: ``python -m benchmarks.studies.sampler``.

Milliseconds a call, waiting for the device after each: the pure-MLX reference, the native piece
(the GPU's kernel or the CPU's C++), and a bare argmax as the limit. Cases are timed in turn,
several rounds; the median counts.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
from msgspec.structs import replace

from benchmarks.contract.engine import device_name, distinct_settings
from mlx_serving.worker.engine.acceleration import choose_sampler
from mlx_serving.worker.engine.interface import SamplingParams
from mlx_serving.worker.engine.sampling.noise import token_words
from mlx_serving.worker.engine.sampling.parameters import RowSampling
from mlx_serving.worker.engine.sampling.reference import ReferenceDraw
from mlx_serving.worker.engine.sampling.sampler import BatchSampler, MakeDraw

HISTORY_TOKENS = 1024
TOP_LOGPROBS = 5


def cases(rows: int) -> dict[str, list[SamplingParams]]:
    """Sixty-four rows each; every mixed row has settings of its own."""
    mixed = distinct_settings(rows, seed=1)
    return {
        "greedy": [SamplingParams()] * rows,
        "temperature only": [SamplingParams(temperature=0.8, seed=n) for n in range(rows)],
        "top-p only": [SamplingParams(temperature=0.8, top_p=0.9, seed=n) for n in range(rows)],
        "mixed": mixed,
        "mixed, penalties": [
            replace(one, repetition_penalty=1.1, presence_penalty=0.3, frequency_penalty=0.2)
            for one in mixed
        ],
        "mixed, logprobs": [replace(params, logprobs=TOP_LOGPROBS) for params in mixed],
    }


def sampling_call(
    params: list[SamplingParams], words: mx.array, make: MakeDraw, logits: mx.array
) -> Callable[[], None]:
    chance = random.Random(0)
    vocab_size = words.size

    def rows() -> list[RowSampling]:
        return [
            RowSampling(one, 0, HISTORY_TOKENS // 2, history, HISTORY_TOKENS // 2 + 1)
            for one in params
        ]

    history = [chance.randrange(vocab_size) for _ in range(HISTORY_TOKENS)]
    tokens = mx.array([chance.randrange(vocab_size) for _ in params], dtype=mx.int32)
    sampler = BatchSampler(rows(), words, make)

    def call() -> None:
        nonlocal sampler
        if sampler.needs_rebuild:
            sampler = BatchSampler(rows(), words, make)
        mx.eval(sampler.sample(logits, tokens).arrays)

    return call


def median_ms(call: Callable[[], None], calls: int) -> float:
    times = []
    for _ in range(calls):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e3


def measure(logits: mx.array, calls: int, rounds: int) -> dict[str, float]:
    """Median milliseconds by case and implementation, and reference over native."""
    words = token_words(logits.shape[1])
    make, report = choose_sampler(prefer_native=True, logits_dtype=logits.dtype)
    print(report, flush=True)
    runs = {"argmax": lambda: mx.eval(mx.argmax(logits, axis=-1))}
    for name, params in cases(logits.shape[0]).items():
        runs[f"{name}, reference"] = sampling_call(params, words, ReferenceDraw, logits)
        if make is not ReferenceDraw:
            runs[f"{name}, native"] = sampling_call(params, words, make, logits)
    for call in runs.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):  # interleaved, so that a busy moment hits all alike
        for name, call in runs.items():
            times[name].append(median_ms(call, calls))
    figures = {name: statistics.median(values) for name, values in times.items()}
    for name in cases(1):
        if f"{name}, native" in figures:
            ratio = figures[f"{name}, reference"] / figures[f"{name}, native"]
            figures[f"{name}, reference over native"] = ratio
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="bfloat16")
    parser.add_argument("--calls", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    shape = (arguments.rows, arguments.vocabulary)
    logits = (mx.random.normal(shape, key=mx.random.key(0)) * 3).astype(
        getattr(mx, arguments.dtype)
    )
    mx.eval(logits)
    figures = measure(logits, arguments.calls, arguments.rounds)
    for name, value in figures.items():
        print(f"{name:40} {value:.3f}")
    if arguments.output:
        settings = {key: str(value) for key, value in vars(arguments).items()}
        report = {"device": device_name(), "unit": "ms a call", "settings": settings} | figures
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
