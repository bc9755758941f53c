"""Two models, mixed load, workers whose budget holds one: loads, waits, and what failed.

python -m benchmarks.studies.models
python -m benchmarks.studies.models --workers 1 --share 0.1

The real worker, queue and scripts; only the models are simulated: a load takes `--load-seconds`, a
token `1 / --rate` s. Jobs come at random times (Poisson) and go to the second model with
probability `--share`. The wait is from enqueue to the first claim.
"""

import argparse
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Final

from benchmarks.lib.harness import MODEL, Figure, bench_settings, percentile, progress, report
from mlx_serving import Client
from mlx_serving.common.redis.local import LocalRedis
from mlx_serving.common.results import GenerationResult
from mlx_serving.common.settings import Settings
from mlx_serving.common.telemetry import configure_logging
from mlx_serving.worker.models.loading import SIMULATED_BYTES, EngineSpec
from mlx_serving.worker.process.child import Child, ChildSpec

SECOND: Final = "second"
TOKENS: Final = (16, 128)


@dataclass(frozen=True)
class Load:
    """What is run. Rates are a second."""

    workers: int = 2
    seconds: float = 90.0
    jobs_a_second: float = 4.0
    share: float = 0.3
    patience: float = 15.0
    load_seconds: float = 4.0
    rows: int = 16
    rate: float = 40.0
    seed: int = 1

    def arrivals(self) -> Iterator[tuple[float, str, int]]:
        """Seconds since the start, model, tokens."""
        chance, at = random.Random(self.seed), 0.0
        while (at := at + chance.expovariate(self.jobs_a_second)) < self.seconds:
            model = SECOND if chance.random() < self.share else MODEL
            yield at, model, chance.randint(*TOKENS)


@contextmanager
def running(settings: Settings, load: Load, name: str) -> Iterator[Child]:
    """Run a worker's child as threads of this process."""
    spec = EngineSpec(
        "simulated", "", load.rate, others=((SECOND, ""),), load_seconds=load.load_seconds
    )
    child = Child(ChildSpec(settings, MODEL, name, spec))
    thread = Thread(target=child.run, name=name)
    thread.start()
    child.runner.ready.wait()
    try:
        yield child
    finally:
        child.messages.post("hand_over")
        thread.join()


def run(load: Load) -> list[Figure]:
    """Run it once on a private Redis."""
    with ExitStack() as stack:
        server = stack.enter_context(LocalRedis())
        settings = bench_settings(
            server.url, batch__max_rows=load.rows, worker__model_budget_bytes=SIMULATED_BYTES,
            worker__model_wait_seconds=load.patience,
        )  # fmt: skip
        client = stack.enter_context(Client(settings=settings))
        workers = [
            stack.enter_context(running(settings, load, f"w{n}")) for n in range(load.workers)
        ]
        began, handles = time.monotonic(), []
        for at, model, tokens in load.arrivals():
            time.sleep(max(0.0, began + at - time.monotonic()))
            handles.append((model, client.submit(model=model, prompt="x", max_tokens=tokens)))
        progress(f"{len(handles)} jobs are in")
        results = [(model, handle.result(timeout=300)) for model, handle in handles]
        took = time.monotonic() - began
        counts = [worker.counters.read()[0].get("model_loads", {}) for worker in workers]
    loads = sum(sum(by_model.values()) for by_model in counts) - load.workers
    return figures(load, results, loads, took)


def figures(
    load: Load, results: Sequence[tuple[str, GenerationResult]], loads: float, took: float
) -> list[Figure]:
    """What is told of it."""
    waits = {
        model: [_wait(result) for name, result in results if name == model]
        for model in (MODEL, SECOND)
    }
    every = [wait for some in waits.values() for wait in some]
    failed = sum(result.state.value != "finished" for _, result in results)
    rows = [
        Figure("jobs", len(results)),
        Figure("of them not finished", failed),
        Figure("loads after the first of each worker", loads),
        Figure("wait p50", percentile(every, 50), "s"),
        Figure("wait p99", percentile(every, 99), "s"),
        Figure("wait, longest", max(every), "s"),
    ]
    rows += [
        Figure(f"wait p99, {name} model", percentile(waits[model], 99), "s")
        for name, model in (("first", MODEL), ("second", SECOND))
    ]
    return [*rows, Figure("jobs ended after the last came", took - load.seconds, "s")]


def _wait(result: GenerationResult) -> float:
    timings = result.timings
    assert timings is not None
    assert timings.started_ms is not None
    assert timings.enqueued_ms is not None
    return (timings.started_ms - timings.enqueued_ms) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    for name, default in vars(Load()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    parser.add_argument("--output", type=Path)
    given = vars(parser.parse_args())
    output = given.pop("output")
    load = Load(**given)
    configure_logging(log_format="json", level="error")
    report(f"two models, room for one: {load}", run(load), output)


if __name__ == "__main__":
    main()
