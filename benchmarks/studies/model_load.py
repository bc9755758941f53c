"""What a load costs the rows of another model: the longest slice, the longest gap between tokens.

python -m benchmarks.studies.model_load --shape tiny

One engine decodes; a second model of the same shape is brought up in slices, as the worker does it,
with a step of the first after each. Run twice: the second load finds compiled what the first one
compiled.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.lib.harness import Figure, bench_settings, percentile, progress, report

STEPS = 50


@contextmanager
def folder_of(shape: str, folder: Path | None) -> Iterator[Path]:
    """Yield a folder with a model of the shape, made where it is not there yet."""
    from benchmarks.lib.synthetic import save_model
    from mlx_serving.worker.engine.memory.device import device_name

    progress(device_name())
    with tempfile.TemporaryDirectory() as temporary:
        path = folder or Path(temporary) / "model"
        if not path.exists():
            import mlx.core as mx

            save_model(path, shape, dtype=mx.float32 if shape == "tiny" else mx.bfloat16)
        yield path


def timed(what: Callable[[], Any]) -> float:
    """Seconds that it takes."""
    began = time.perf_counter()
    what()
    return time.perf_counter() - began


def figures(path: Path, streams: int) -> list[Figure]:
    """Decode, load twice, and compare."""
    from mlx_serving.worker.engine.interface import Request, SamplingParams
    from mlx_serving.worker.models.loading import EngineSpec, finish, load

    settings = bench_settings(
        "redis://unused", batch__max_rows=streams, cache__budget_bytes=2 << 30
    )
    spec = EngineSpec("mlx")
    first = finish(load(spec, settings, str(path), settings.cache.budget_bytes))
    progress("the first model is up")
    engine = first.engine
    for row in range(streams):
        prompt = tuple((7 * row + n) % 250 for n in range(32))
        engine.add(Request(str(row), prompt, SamplingParams(), 4000))
    while engine.running < streams:
        engine.step()
    steady = [timed(engine.step) for _ in range(STEPS)]
    found = [Figure("step, nothing is loaded, p50", percentile(steady, 50) * 1e3, "ms")]
    for name in ("first load", "second load"):
        slices, steps = _load_between_steps(engine, load(spec, settings, str(path), 2 << 30))
        longest = sorted(slices)[-8:]
        progress(f"{name}, longest slices: " + " ".join(f"{s * 1e3:.0f}" for s in longest) + " ms")
        gaps = [a + b for a, b in zip(slices, steps, strict=True)]
        found += [
            Figure(f"{name}, all slices", sum(slices), "s"),
            Figure(f"{name}, slices", len(slices)),
            Figure(f"{name}, longest gap between tokens", max(gaps) * 1e3, "ms"),
            Figure(f"{name}, gap between tokens, p50", percentile(gaps, 50) * 1e3, "ms"),
        ]
    return found


def _load_between_steps(
    engine: Any,  # noqa: ANN401 - any engine
    loading: Iterator[None],
) -> tuple[list[float], list[float]]:
    """Seconds of each slice, and of the step after it."""
    slices, steps, done = [], [], object()
    while True:
        began = time.perf_counter()
        over = next(loading, done) is done
        slices.append(time.perf_counter() - began)
        steps.append(timed(engine.step))
        if over:
            return slices, steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--shape", default="tiny", choices=("tiny", "0.6b", "8b"))
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    with folder_of(given.shape, given.folder) as path:
        report(f"load beside {given.streams} rows", figures(path, given.streams), given.output)


if __name__ == "__main__":
    main()
