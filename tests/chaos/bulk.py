"""Bulk files under kills: `python -m tests.chaos.bulk --lines 10000 --kills 10`.

Two workers run Tally; one runner feeds and collects. Kills fall on the runner, in its feeder and
its collector at places where it hurts most, and on the workers; who dies is replaced. In the end
every line must have one answer, and the right one. The runner's kills all fall in the first half,
so that the growth of its memory can be seen over the second.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_serving.common.redis.local import LocalRedis
from mlx_serving.common.settings import load_settings
from mlx_serving.producer.batch.background import encode_settings
from mlx_serving.producer.client import Client
from mlx_serving.tally.examples import check as is_right
from mlx_serving.tally.one_turn import system_turn
from mlx_serving.tally.tasks import TASKS
from tests.chaos import bulk_runner
from tests.support.bulk_files import read_jsonl, simulated_line, text_of, tokens_of, write_lines
from tests.support.figures import show
from tests.support.paths import ROOT
from tests.support.worker_process import WorkerProcess, counted

if TYPE_CHECKING:
    from collections.abc import Callable

    from mlx_serving.producer.batch.api import Batches
    from mlx_serving.producer.batch.folder import BatchFolder
    from mlx_serving.tally.examples import Example

KINDS = ("sort", "spell", "count", "json")
SYSTEMS = [system_turn(random.Random(n)) for n in range(20)]
WORKER = "worker"
SIMULATED_RATE = 200.0  # tokens a second and row
START_SECONDS = 60.0
LIMIT_SECONDS = 1500.0
MOST_ANSWER_CHARS = 60


@dataclass
class Report:
    """What became of a run. `problems` is empty where all held."""

    lines: int
    kills: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0
    validation_seconds: float = 0.0
    rss_kib: list[tuple[float, int]] = field(default_factory=list)  # share of lines ended, KiB
    torn_bytes: int = 0

    @property
    def rss_growth(self) -> float:
        """Growth of the last runner's memory from half of the lines to the end."""
        second = [kib for share, kib in self.rss_kib if share >= 0.5]
        return second[-1] / second[0] - 1 if len(second) > 1 else 0.0

    def __str__(self) -> str:
        rss = [kib for _, kib in self.rss_kib]
        return (
            f"{self.lines} lines in {self.seconds:.0f} s (validated in "
            f"{self.validation_seconds:.1f} s); kills: {dict(self.kills)}; torn bytes cut: "
            f"{self.torn_bytes}; runner RSS {rss[-1] if rss else 0} KiB at the end, "
            f"{self.rss_growth:+.1%} over the second half; problems: {self.problems or 'none'}"
        )


@dataclass(frozen=True)
class Work:
    """A line, and whether a text is the right answer to it."""

    request: dict[str, Any]
    is_right: Callable[[str], bool]


def works(count: int, seed: int, *, simulated: bool) -> list[Work]:
    if simulated:
        return [
            Work(simulated_line(i), lambda text, i=i: text == counted(tokens_of(i)))  # type: ignore[misc]
            for i in range(count)
        ]
    return [
        Work(request(i, example), partial(is_right, example))
        for i, example in enumerate(examples(count, seed))
    ]


def examples(count: int, seed: int) -> list[Example]:
    """Prompts with one right answer, short ones, a system turn before each."""
    rng = random.Random(seed)
    found: list[Example] = []
    while len(found) < count:
        example = TASKS[rng.choice(KINDS)].sample(rng)
        if example.answer is not None and len(example.answer) <= MOST_ANSWER_CHARS:
            found.append(example)
    return found


def request(index: int, example: Example) -> dict[str, Any]:
    turns = [turn for turn in example.messages if turn["role"] != "system"]
    body = {
        "model": "gpt-4o-mini", "messages": [*SYSTEMS[index % len(SYSTEMS)], *turns],
        "temperature": 0,
        "max_completion_tokens": 160,
        "user": "somebody",
    }  # fmt: skip
    url = "/v1/chat/completions"
    return {"custom_id": f"r-{index}", "method": "POST", "url": url, "body": body}


class Keeper:
    """Keeps one runner at work, as a service manager would, until the batch has ended."""

    def __init__(self, folder: BatchFolder, url: str, scratch: Path) -> None:
        self._folder, self._url = folder, url
        self.trap = scratch / "trap"
        self._log = (scratch / "runner.log").open("ab")
        self.process = self._start()
        self.deaths = 0

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", bulk_runner.__name__, str(self._folder.path), str(self.trap)],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=self._log, stderr=self._log,
        )  # fmt: skip
        assert process.stdin is not None
        process.stdin.write(encode_settings(load_settings(redis__url=self._url)))
        process.stdin.close()
        return process

    def tend(self) -> None:
        """Replace a runner that was killed."""
        status = self.process.poll()
        if status is not None and status != 0:
            self.deaths += 1
            self.process = self._start()

    def rss_kib(self) -> int:
        try:
            text = Path(f"/proc/{self.process.pid}/status").read_text()
        except FileNotFoundError:
            return 0
        return next((int(line.split()[1]) for line in text.splitlines() if "VmRSS" in line), 0)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._log.close()


class Workers:
    """Keeps two workers alive; with a rate they are simulated."""

    def __init__(self, url: str, rows: int, rate: float | None) -> None:
        self._url, self._rows, self._rate = url, rows, rate
        self._generation = 0
        self.alive = [self._start() for _ in range(2)]

    def _start(self) -> WorkerProcess:
        self._generation += 1
        name = f"bulk-{self._generation}"
        return WorkerProcess(self._url, name, self._rate, batch__max_rows=self._rows)

    def kill(self, index: int) -> None:
        old = self.alive[index].serving()
        old.kill()
        self.alive[index] = self._start()
        old.__exit__()

    def close(self) -> None:
        for worker in self.alive:
            worker.__exit__()


def plan(kills: int, seed: int) -> list[tuple[float, str]]:
    """At which share of the lines which kill is made; the runner's are in the first half."""
    rng = random.Random(seed)
    places = cycle(bulk_runner.PLACES)
    chosen = [next(places) if n % 3 else WORKER for n in range(1, kills + 1)]
    spots = [rng.uniform(0.02, 0.45 if kind != WORKER else 0.8) for kind in chosen]
    return sorted(zip(spots, chosen, strict=True))


def run(
    lines: int,
    kills: int,
    *,
    seed: int = 1,
    small: bool = False,
    simulated: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Report:
    """Run it all in a folder and a Redis of its own; `small` windows suit few lines."""
    report, asked = Report(lines), works(lines, seed, simulated=simulated)
    options: dict[str, Any] = (
        {"depth": 32, "in_flight": 64} if small else {"depth": 128, "in_flight": 512}
    )
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bulk-")))
        server = stack.enter_context(LocalRedis(appendonly="always"))
        path = write_lines(scratch / "in.jsonl", [work.request for work in asked])
        workers = Workers(server.url, 16 if small else 32, SIMULATED_RATE if simulated else None)
        stack.callback(workers.close)
        batches = Client(settings=load_settings(redis__url=server.url)).batches
        began = time.monotonic()
        batch = batches.submit(path, start=False, model_map={"gpt-4o-mini": "tally"}, **options)
        report.validation_seconds = time.monotonic() - began
        keeper = Keeper(batches.folder(batch.id), server.url, scratch)
        stack.callback(keeper.close)
        for worker in workers.alive:
            worker.serving()
        began = time.monotonic()
        Torment(report, batches, batch.id, keeper, workers, say).go(plan(kills, seed))
        report.seconds = time.monotonic() - began
        if keeper.deaths != report.kills.total() - report.kills[WORKER]:
            report.problems.append(f"the runner died {keeper.deaths} times")
        _audit(report, batches, batch.id, asked)
        _log(report, scratch / "runner.log")
    return report


@dataclass
class Torment:
    """Kills by plan until the batch has ended."""

    report: Report
    batches: Batches
    batch_id: str
    keeper: Keeper
    workers: Workers
    say: Callable[[str], None]

    def go(self, kills: list[tuple[float, str]]) -> None:
        until = time.monotonic() + LIMIT_SECONDS
        said = 0.0
        while time.monotonic() < until:
            time.sleep(0.05)
            self.keeper.tend()
            batch = self.batches.status(self.batch_id)
            counts = batch.request_counts
            share = (counts.completed + counts.failed) / self.report.lines
            if batch.ended:
                return
            if time.monotonic() - said > 1:
                said = time.monotonic()
                if rss := self.keeper.rss_kib():
                    self.report.rss_kib.append((share, rss))
                if len(self.report.rss_kib) % 10 == 0:
                    self.say(f"{share:6.1%}  {dict(self.report.kills)}")
            if kills and share >= kills[0][0] and not self.keeper.trap.exists():
                self._kill(kills.pop(0)[1])
        self.report.problems.append(f"not over within {LIMIT_SECONDS} s")

    def _kill(self, what: str) -> None:
        self.report.kills[what] += 1
        if what == WORKER:
            self.workers.kill(self.report.kills[WORKER] % 2)
        else:
            self.keeper.trap.write_text(what)


def _audit(report: Report, batches: Batches, batch_id: str, asked: list[Work]) -> None:
    folder = batches.folder(batch_id)
    lines = read_jsonl(folder.output)
    ids = Counter(line["custom_id"] for line in lines)
    report.problems += [f"{name} came {count} times" for name, count in ids.items() if count > 1]
    report.problems += [f"r-{i} is missing" for i in range(len(asked)) if f"r-{i}" not in ids]
    report.problems += [f"{line} failed" for line in read_jsonl(folder.errors)]
    for line in lines:
        work = asked[int(line["custom_id"][2:])]
        if not work.is_right(text_of(line)):
            told = json.dumps([work.request["body"]["messages"], text_of(line)])
            report.problems.append(f"{line['custom_id']} is wrong: {told}")
    batch = batches.status(batch_id)
    if (batch.status, batch.request_counts.completed) != ("completed", len(asked)):
        report.problems.append(f"the batch says {batch.status}, {batch.request_counts}")


def _log(report: Report, path: Path) -> None:
    torn = [line for line in path.read_text().splitlines() if "batch_torn_tail_cut" in line]
    report.torn_bytes = sum(int(line.rpartition("bytes=")[2].split()[0]) for line in torn)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--simulated", action="store_true", help="an engine that only counts")
    given = parser.parse_args()
    report = run(given.lines, given.kills, seed=given.seed, simulated=given.simulated, say=show)
    show(str(report))
    return 1 if report.problems or report.rss_growth >= 0.05 else 0


if __name__ == "__main__":
    sys.exit(main())
