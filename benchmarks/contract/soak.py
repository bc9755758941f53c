"""Soak: many short jobs with churn through Redis and one worker; memory must not creep.

    python -m benchmarks.contract.soak --jobs 50000
    python -m benchmarks.contract.soak --jobs 50000 --kv-cache paged --prefix-mib 64

Jobs of 1 to 4 tokens on Tally come and go in a window of `--in-flight`: prompts of many lengths,
greedy and sampled, one to three choices, with log probabilities, with stop strings, streamed and
not, some cancelled at once. Prompts of a small pool come again and again, greedily: each has to get
the same answer every time.

The first fifth runs under `recycle_after_tokens`, so that the engine child is replaced by plan
about four times in the middle of its work. The rest is one child's, so that no replacement hides
what creeps. Twenty times in a run the window is let run empty: what the child holds then, resident
and in MLX's arrays, is what nothing needs. The slope is that of the least-squares line through
these idle readings of the run's second half: its rise from end to end, in percent of their mean.
Memory is also read once a second while jobs run. The worker runs with one fixed mmap threshold of
glibc's malloc, so that freed arrays go back to the system and resident memory says what is held.
"""

import argparse
import json
import os
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import redis

from benchmarks.lib.harness import (
    MODEL,
    Figure,
    Goal,
    bench_settings,
    machine,
    progress,
    running_worker,
    table,
)
from mlx_serving.common.protocol.keys import Keys
from mlx_serving.common.redis.connection import resolve
from mlx_serving.common.redis.local import LocalRedis
from mlx_serving.common.results import GenerationResult
from mlx_serving.common.settings import TALLY_PATH, Settings
from mlx_serving.common.states import TERMINAL
from mlx_serving.producer.batch.store import JobStore
from mlx_serving.producer.client import Client
from mlx_serving.worker.models.loading import EngineSpec

RECYCLED_SHARE: Final = 0.2  # of the jobs, under recycling
RECYCLES: Final = 4
TOKENS_A_JOB: Final = 2.6  # the mean of 1 to 4, and of the choices
IDLE_MOMENTS: Final = 20
SETTLED_SECONDS: Final = 3.2  # until an idle worker has said so
STUCK_SECONDS: Final = 60.0  # without one job that ends, those that are open count as lost
LANE: Final = "bulk"
ENDED: Final = {state.value for state in TERMINAL}
WORDS: Final = ("count from 1 to 9", "echo: apple", "sort: 5 3 9", "upper: tea", "reverse: stone")


@dataclass(frozen=True)
class Load:
    """What is run."""

    jobs: int = 50_000
    in_flight: int = 384
    rows: int = 64
    kv_cache: str = "auto"
    prefix_mib: int = 0
    seed: int = 1
    seconds: float = 0.0  # stop submitting after so long, and report; 0: run all jobs

    def settings(self, url: str, *, recycled: bool) -> Settings:
        """A worker's; never replaced, or a few times within its share of the jobs."""
        tokens = int(RECYCLED_SHARE * self.jobs * TOKENS_A_JOB / (RECYCLES + 1)) if recycled else 0
        return bench_settings(
            url, models={MODEL: str(TALLY_PATH)}, batch__max_rows=self.rows,
            cache__kind=self.kv_cache, cache__prefix_bytes=self.prefix_mib << 20,
            engine__recycle_after_tokens=tokens, engine__recycle_after_hours=0,
            worker__drain_seconds=0.05,
        )  # fmt: skip


@dataclass(frozen=True)
class Reading:
    """One look at the engine child; bytes."""

    at: float
    pid: int
    rss: int
    active: int
    ended: int  # jobs, by then
    idle: bool = False


class Watch(threading.Thread):
    """Reads the child's memory once a second: RSS from /proc, MLX's from the worker's presence."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self._redis = redis.Redis.from_url(url, decode_responses=True)
        self._stopping = threading.Event()
        self.readings: list[Reading] = []
        self.ended = 0

    def run(self) -> None:
        """Read until stopped."""
        while not self._stopping.wait(1.0):
            self.look()

    def look(self, *, idle: bool = False) -> None:
        """Read once."""
        said: dict[str, str] = self._redis.hgetall(Keys().worker("bench-worker"))  # type: ignore[assignment]
        pid, active = int(said.get("pid", 0)), int(said.get("memory_active_bytes", 0))
        if pid and active and (rss := resident(pid)):
            now = time.monotonic()
            self.readings.append(Reading(now, pid, rss, active, self.ended, idle))

    def last_line(self) -> str:
        """The last reading, for people."""
        if not self.readings:
            return "no reading yet"
        last = self.readings[-1]
        return f"{last.ended} jobs, RSS {last.rss / 1e6:.1f} MB, MLX {last.active / 1e6:.4f} MB"

    def stop(self) -> None:
        """Stop reading."""
        self._stopping.set()
        self.join()
        self._redis.close()


def resident(pid: int) -> int:
    """Resident bytes of a process; 0 where it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
    except (OSError, IndexError):
        return 0


def slope_percent(values: Sequence[float]) -> float:
    """Rise of the least-squares line from the first to the last, in percent of the mean."""
    line = statistics.linear_regression(range(len(values)), values)
    return 100 * line.slope * (len(values) - 1) / statistics.mean(values)


class Churn:
    """Jobs, and whether what comes back for them is right."""

    def __init__(self, load: Load) -> None:
        self._random = random.Random(load.seed)
        self._answers: dict[str, list[list[int]]] = {}
        self.wrong: list[str] = []
        self.ends: Counter[str] = Counter()

    def job(self) -> dict[str, Any]:
        """The next one."""
        chance = self._random
        job: dict[str, Any] = {
            "model": MODEL, "lane": LANE, "max_tokens": chance.randint(1, 4), "seed": 7,
            "result_ttl": 300, "stream": chance.random() < 0.2, "temperature": 0.0,
        }  # fmt: skip
        if chance.random() < 0.5:  # of the pool
            text = f"{chance.choice(WORDS)} {chance.randrange(8)}"
        else:
            text = "x" * chance.choice((1, 1, 5, 5, 20, 20, 60, 250)) + str(chance.random())
            job |= {"temperature": chance.choice((0.3, 1.0)), "seed": chance.randrange(1 << 30)}
            job |= {"n": chance.choice((1, 1, 2, 3)), "stop": chance.choice(([], ["q"]))}
            job |= chance.choice(({}, {"logprobs": True}, {"repetition_penalty": 1.2}))
        return job | {"messages": [{"role": "user", "content": text}]}

    def cancels(self) -> bool:
        """Whether the next job is cancelled at once."""
        return self._random.random() < 0.02

    def take(self, job: dict[str, Any], result: GenerationResult | None) -> None:
        """Judge how a job ended."""
        state = result.state.value if result else "gone"
        self.ends[state] += 1
        if result is None or state != "finished":
            return
        tokens = [list(choice.token_ids) for choice in result.choices]
        if not all(1 <= len(each) <= job["max_tokens"] for each in tokens):
            self.wrong.append(result.id)
        if not job["temperature"]:
            asked = f"{job['max_tokens']} {job['messages'][0]['content']}"
            if self._answers.setdefault(asked, tokens) != tokens:
                self.wrong.append(result.id)


@dataclass
class Run:
    """What was seen."""

    churn: Churn
    watch: Watch
    began: float = field(default_factory=time.monotonic)
    lost: int = 0
    recycles: int = 0
    seconds: float = 0.0
    children: list[int] = field(default_factory=list)


def feed(load: Load, jobs: int, settings: Settings, run: Run) -> None:
    """Keep the window full until so many jobs have ended."""
    store = JobStore(resolve(settings, MODEL))
    pause_every, paused_at = max(1, load.jobs // IDLE_MOMENTS), 0
    opened: dict[str, dict[str, Any]] = {}
    submitted, moved_at = 0, time.monotonic()
    with Client(settings=settings) as client:
        while submitted < jobs or opened:
            room = min(
                load.in_flight - len(opened), jobs - submitted, paused_at + pause_every - submitted
            )
            if room > 0:
                new = [run.churn.job() for _ in range(room)]
                handles = client.submit_many(new)
                submitted += room
                opened |= {handle.id: job for handle, job in zip(handles, new, strict=True)}
                store.cancel([h.id for h in handles if run.churn.cancels()], "soak")
            ids = list(opened)
            done = [i for i, s in zip(ids, store.states(ids), strict=True) if s in ENDED or not s]
            for job_id, result in zip(done, store.results(done), strict=True):
                run.churn.take(opened.pop(job_id), result)
            if done:
                store.forget(done)
                run.watch.ended += len(done)
                moved_at = time.monotonic()
            elif time.monotonic() - moved_at > STUCK_SECONDS:
                run.lost += len(opened)
                break
            time.sleep(0.05)
            if not opened and submitted >= paused_at + pause_every:
                paused_at = submitted
                time.sleep(SETTLED_SECONDS)
                run.watch.look(idle=True)
                progress(run.watch.last_line())
                if load.seconds and time.monotonic() - run.began > load.seconds:
                    break
    store.close()


def soak(load: Load) -> Run:
    """Run both legs."""
    with LocalRedis() as server, server.client() as client, watching(server.url) as watch:
        run = Run(Churn(load), watch)
        first = int(RECYCLED_SHARE * load.jobs)
        for jobs, recycled in ((first, True), (load.jobs - first, False)):
            settings = load.settings(server.url, recycled=recycled)
            with running_worker(settings, EngineSpec("mlx", str(TALLY_PATH)), client):
                feed(load, jobs, settings, run)
            progress(f"{run.watch.ended} jobs ended: {dict(run.churn.ends)}")
        run.seconds = time.monotonic() - run.began
    run.children = list(dict.fromkeys(r.pid for r in run.watch.readings))
    run.recycles = len(run.children) - 2  # the two legs' first children are no replacements
    run.lost += run.churn.ends["gone"]
    return run


@contextmanager
def watching(url: str) -> Iterator[Watch]:
    watch = Watch(url)
    watch.start()
    yield watch
    watch.stop()


def second_half(run: Run) -> list[Reading]:
    """Idle readings after half of the jobs had ended, all of one child."""
    last = run.children[-1]
    idle = [r for r in run.watch.readings if r.idle]
    return [r for r in idle if r.pid == last and r.ended >= run.watch.ended / 2]


def figures(run: Run) -> list[Figure]:
    """What the run is judged by."""
    late = second_half(run)
    values = [
        Figure("jobs that ended", float(sum(run.churn.ends.values())), ""),
        Figure("jobs/s", run.watch.ended / run.seconds, "1/s"),
        Figure("lost", float(run.lost), "", Goal("≤", 0)),
        Figure("failed", float(run.churn.ends["failed"]), "", Goal("≤", 0)),
        Figure("wrong or changing answers", float(len(run.churn.wrong)), "", Goal("≤", 0)),
        Figure("planned replacements seen", float(run.recycles), "", Goal("≥", 1)),
    ]
    for name, of in (
        ("RSS", [reading.rss for reading in late]),
        ("MLX active", [reading.active for reading in late]),
    ):
        if len(of) > 1:
            mean = statistics.mean(of)
            values.append(Figure(f"{name} when idle, mean of the second half", mean / 1e6, "MB"))
            values.append(
                Figure(
                    f"{name} when idle, slope over the second half",
                    slope_percent(of),
                    "%",
                    Goal("≤", 1),
                )
            )
    return values


def series(run: Run) -> list[str]:
    """Idle readings, and what was read since the one before, in MB."""
    lines = [
        "jobs ended   child   RSS idle  (min  mean  max between)  MLX active idle  (min  mean  max)"
    ]
    since: list[Reading] = []
    for reading in run.watch.readings:
        since.append(reading)
        if not reading.idle:
            continue
        same = [r for r in since if r.pid == reading.pid]
        rss, active = [r.rss / 1e6 for r in same], [r.active / 1e6 for r in same]
        lines.append(
            f"{reading.ended:10d} {reading.pid:7d}   {reading.rss / 1e6:8.2f}  ({min(rss):6.1f} "
            f"{statistics.mean(rss):6.1f} {max(rss):6.1f})   {reading.active / 1e6:10.4f}  "
            f"({min(active):6.2f} {statistics.mean(active):6.2f} {max(active):6.2f})"
        )
        since = []
    return lines


def measure(load: Load) -> list[Figure]:
    """Run and print the series."""
    run = soak(load)
    print("\n".join(series(run)))
    return figures(run)


def main() -> None:
    """Run, print, write."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(64 << 10)  # of the worker, which inherits it
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--jobs", type=int, default=Load.jobs)
    parser.add_argument("--in-flight", type=int, default=Load.in_flight)
    parser.add_argument("--rows", type=int, default=Load.rows)
    parser.add_argument("--kv-cache", choices=("auto", "paged", "padded"), default=Load.kv_cache)
    parser.add_argument("--prefix-mib", type=int, default=Load.prefix_mib)
    parser.add_argument("--seed", type=int, default=Load.seed)
    parser.add_argument("--seconds", type=float, default=Load.seconds, help="stop after so long")
    parser.add_argument("--output", type=Path)
    options = vars(parser.parse_args())
    output = options.pop("output")
    load = Load(**options)
    found = measure(load)
    print(table({f"Soak: {load.jobs} short jobs with churn": found}))
    if output:
        report = {"machine": machine(), "load": options, "figures": [f.as_json() for f in found]}
        output.write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
