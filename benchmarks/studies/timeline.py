"""Where a decode step's time goes on the host, and who holds the worker's interpreter.

    python -m benchmarks.studies.timeline --model 0.6b --streams 64 --steps 100
    python -m benchmarks.studies.timeline --model 0.6b --streams 64 --worker  # needs py-spy

In process: the engine's parts are timed by `perf_counter` while it decodes, and the step is cut
into

  graph     Python builds the forward pass and the sampler (lazy arrays: nothing is computed)
  launch    `mx.async_eval`: MLX encodes the graph and hands it to the device
  wait      the rest of the runner's decode: reading the tokens of the step before
  text      the detokenizer's one call for all rows
  outputs   the rest of the step: why rows ended, Output objects, the scheduler

What the device computes overlaps all of it but `wait`.

With --worker: the real worker, Redis and two consuming processes run the streams, while py-spy
samples the engine child's threads. Of the samples that hold the interpreter lock, a thread's part
is its share.
"""

import argparse
import shutil
import subprocess
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from benchmarks.contract.streaming import MODELS, WARM_TOKENS, Load, engine_spec, staged
from benchmarks.lib.harness import Figure, report

PARTS: Final = ("graph", "launch", "wait", "text", "outputs")
WARM_STEPS: Final = 10
SAMPLES_PER_SECOND: Final = 200


class Stopwatches:
    """Seconds spent in named calls, summed since `lap` was last asked for."""

    def __init__(self) -> None:
        """All at zero."""
        self._seconds: dict[str, float] = defaultdict(float)

    def time(self, owner: Any, attribute: str, name: str) -> None:  # noqa: ANN401 - any object
        """Put a stopwatch around `owner.attribute` from now on."""
        setattr(owner, attribute, self.around(getattr(owner, attribute), name))

    def around(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        """Return `call` with a stopwatch around it."""

        def timed(*arguments: Any, **keywords: Any) -> Any:  # noqa: ANN401 - whatever it returns
            started = time.perf_counter()
            try:
                return call(*arguments, **keywords)
            finally:
                self._seconds[name] += time.perf_counter() - started

        return timed

    def lap(self) -> dict[str, float]:
        """Return the sums, and start again at zero."""
        seconds, self._seconds = self._seconds, defaultdict(float)
        return seconds


class TimedDetokenizer:
    """A detokenizer with a stopwatch around `push`; the native one's methods can't be replaced."""

    def __init__(self, inner: Any, watches: Stopwatches) -> None:  # noqa: ANN401 - native or twin
        """Hold the one that works."""
        self._inner = inner
        self.push = watches.around(inner.push, "text")

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the other has
        """Leave everything else to it."""
        return getattr(self._inner, name)


def in_process(load: Load, steps: int) -> list[Figure]:
    """Median milliseconds of each part of a step, and of the whole."""
    with engine_spec(load) as spec:
        laps = _laps(load, spec.model_path, steps)
    figures = [Figure.median(f"{name}", [lap[name] * 1e3 for lap in laps], "ms") for name in PARTS]
    return [*figures, Figure.median("step", [lap["step"] * 1e3 for lap in laps], "ms")]


def _laps(load: Load, folder: str, steps: int) -> list[dict[str, float]]:
    import mlx.core as mx

    from mlx_serving.worker.engine.interface import Request, SamplingParams
    from mlx_serving.worker.engine.loader import EngineOptions, load_engine

    engine = load_engine(folder, EngineOptions(max_batch_rows=load.streams))
    for row in range(load.streams):
        prompt = tuple((7 * row + n) % 250 for n in range(32))
        engine.add(Request(str(row), prompt, SamplingParams(), 2 * steps + 100))
    while engine.running < load.streams:
        engine.step()
    for _ in range(WARM_STEPS):
        engine.step()
    watches = _watch(engine, mx)
    laps = []
    for _ in range(steps):
        started = time.perf_counter()
        engine.step()
        laps.append(_cut(watches.lap(), time.perf_counter() - started))
    return laps


def _watch(engine: Any, mx: Any) -> Stopwatches:  # noqa: ANN401 - private parts of the engine
    watches = Stopwatches()
    runner = engine._runner  # noqa: SLF001 - the timeline looks inside
    watches.time(type(runner._cache), "step", "model")  # noqa: SLF001
    watches.time(type(runner._sampler), "sample", "sampler")  # noqa: SLF001 - one a membership
    watches.time(mx, "async_eval", "launch")
    watches.time(runner, "decode", "decode")
    engine._detokenizer = TimedDetokenizer(engine._detokenizer, watches)  # noqa: SLF001
    return watches


def _cut(seconds: dict[str, float], step: float) -> dict[str, float]:
    graph = seconds["model"] + seconds["sampler"]
    launch, text = seconds["launch"], seconds["text"]
    wait = seconds["decode"] - graph - launch
    outputs = step - seconds["decode"] - text
    return dict(zip(PARTS, (graph, launch, wait, text, outputs), strict=True)) | {"step": step}


# The worker, by py-spy


def in_worker(load: Load) -> list[Figure]:
    """Each thread's share of the samples that hold the engine child's interpreter lock."""
    with tempfile.TemporaryDirectory() as folder, staged(load) as stage:
        stage.run_streams(load.jobs(WARM_TOKENS))
        output = Path(folder) / "samples.txt"
        child = children(stage.worker_pid)[-1]
        command = [
            "py-spy", "record", "--gil", "--threads", "--format", "raw", "--duration", "600",
            "--rate", str(SAMPLES_PER_SECOND), "--output", str(output), "--pid", str(child),
        ]  # fmt: skip
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True) as spy:
            assert spy.stdout is not None
            said = spy.stdout.readline()
            if "Sampling" not in said:
                raise RuntimeError(f"py-spy: {said}{spy.stdout.read()}".strip())
            stage.run_streams(load.jobs(load.tokens))
            spy.send_signal(2)  # SIGINT: it writes what it has
            spy.communicate(timeout=60)
        return shares(output.read_text())


def children(pid: int) -> list[int]:
    """Child processes of a process, oldest first (Linux)."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = status.read_text().rpartition(")")[2].split()[1]
        except OSError:
            continue
        if int(parent) == pid:
            found.append(int(status.parent.name))
    return sorted(found)


def shares(raw: str) -> list[Figure]:
    """Read py-spy's raw format: a stack and its number of samples a line, the thread first."""
    counts: Counter[str] = Counter()
    for line in raw.splitlines():
        stack, _, count = line.rpartition(" ")
        thread = stack.partition(";")[0]
        counts[thread.rpartition(": ")[2]] += int(count)
    total = sum(counts.values())
    return [
        Figure("samples that hold the interpreter lock", total, "samples"),
        *(Figure(f"of them: {thread}", count / total, "×")
          for thread, count in counts.most_common()),
    ]  # fmt: skip


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=[m for m in MODELS if m != "simulated"], default="tiny")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=256, help="of each stream, with --worker")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--folder", help="keep the synthetic model here, or use the one there")
    parser.add_argument("--worker", action="store_true", help="threads of a real worker, by py-spy")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = vars(parser.parse_args())
    worker, steps, output = (options.pop(name) for name in ("worker", "steps", "output"))
    load = Load(**options)
    if worker and shutil.which("py-spy") is None:
        parser.error("--worker: py-spy is not installed (pip install py-spy)")
    figures = in_worker(load) if worker else in_process(load, steps)
    what = "threads of the engine child" if worker else "a decode step on the host"
    report(f"{what}, {load.streams} rows, {load.model}", figures, output)


if __name__ == "__main__":
    main()
