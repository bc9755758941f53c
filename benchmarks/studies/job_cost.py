"""What a no-op job costs the worker's interpreter, phase by phase: its parts without its threads.

    python -m benchmarks.studies.job_cost --jobs 1600 --rounds 5

The engine child's own parts, driven by one thread in turns: a claim of 32 jobs, read and handed to
the engine; the engine's turns until all have ended; the flush that commits them. CPU time of that
thread, so other work on the machine adds little but cache misses; the tenth percentile, given
beside the median, is nearly free of them. `benchmarks.contract.dispatch` says what the real
process, with its threads, uses.
"""

import argparse
import gc

from benchmarks.contract.dispatch import job
from benchmarks.lib.harness import MODEL, Figure, bench_settings, table
from benchmarks.studies.publishing import Stopwatch
from mlx_serving.common.redis.local import LocalRedis
from mlx_serving.common.telemetry import configure_logging
from mlx_serving.producer.client import Client
from mlx_serving.worker.dispatcher import CLAIM_MOST
from mlx_serving.worker.models.loading import EngineSpec
from mlx_serving.worker.process.child import Child, ChildSpec

PHASES = ("claim, read, hand over", "engine's turns", "flush")


class SteppedChild:
    """A worker's parts, none of whose threads runs."""

    def __init__(self, url: str) -> None:
        """Load the simulated engine at zero cost."""
        settings = bench_settings(url)
        self._child = Child(ChildSpec(settings, MODEL, "stepped", EngineSpec("simulated")))
        self._child.runner.engine = self._child._load()  # noqa: SLF001 -- its threads stay off

    def claim(self) -> None:
        """Claim jobs and hand them to the engine; another claim is then under way."""
        self._child.dispatcher._claim()  # noqa: SLF001 -- as above

    def decode(self) -> None:
        """Run the engine thread's turns until its work is done."""
        runner, engine = self._child.runner, self._child.loaded_models.engines
        while engine.has_work or runner.in_line():
            runner._turn(engine)  # noqa: SLF001 -- as above

    def flush(self) -> None:
        """Commit all that was decoded."""
        self._child.publisher.flush()

    @property
    def held(self) -> int:
        """Jobs that are held."""
        return len(self._child.publisher.held())


def measure(jobs: int = 1600, rounds: int = 5) -> list[Figure]:
    """A figure a phase and one for all, in µs a job.

    Raises:
        ValueError: claims would not all be full.

    """
    if jobs % CLAIM_MOST:
        raise ValueError(f"jobs: must be a multiple of {CLAIM_MOST}, got {jobs}")
    watch = Stopwatch()
    with LocalRedis() as server, Client(settings=bench_settings(server.url)) as client:
        child = SteppedChild(server.url)
        for _ in range(rounds + 1):
            client.submit_many(job(number) for number in range(jobs))
            gc.collect()
            _run(child, watch, jobs)
    warm = jobs // CLAIM_MOST  # claims of the first round
    per_job = {
        phase: [time / CLAIM_MOST for time in watch.phases[phase][warm:]] for phase in PHASES
    }
    watch.phases = per_job | {"all": [sum(each) for each in zip(*per_job.values(), strict=True)]}
    return watch.figures()


def _run(child: SteppedChild, watch: Stopwatch, jobs: int) -> None:
    done = 0
    while done < jobs:
        watch.time(PHASES[0], child.claim)
        done += child.held
        watch.time(PHASES[1], child.decode)
        watch.time(PHASES[2], child.flush)
        assert not child.held


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=1600, help=f"a multiple of {CLAIM_MOST}")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    configure_logging(level="error")
    print(table({"CPU a no-op job, without threads": measure(options.jobs, options.rounds)}))


if __name__ == "__main__":
    main()
