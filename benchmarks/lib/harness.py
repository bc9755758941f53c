"""What the queue's benchmarks share: figures with goals, real worker processes, waiting."""

import ctypes
import json
import multiprocessing
import os
import platform
import signal
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, Literal, TypeVar

import redis

from mlx_serving.common.redis.connection import resolve
from mlx_serving.common.settings import Settings, load_settings
from mlx_serving.worker.models.loading import EngineSpec

MODEL = "bench"
T = TypeVar("T")

START_SECONDS = 120.0  # a worker's start: imports, and a model's load and first compile
LIBRARIES = ("mlx", "mlx-lm", "redis", "rq", "hiredis", "msgspec", "pydantic")
_STARTED = time.monotonic()
SPAWN = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Goal:
    """A bound of the performance contract."""

    sign: Literal["≥", "≤"]
    bound: float

    def met_by(self, value: float) -> bool:
        """Whether the value is on the right side."""
        return value >= self.bound if self.sign == "≥" else value <= self.bound

    def __str__(self) -> str:
        """As the table shows it."""
        return f"{self.sign} {self.bound:g}"


@dataclass(frozen=True)
class Figure:
    """One measured number: the median of its rounds."""

    name: str
    value: float
    unit: str = ""
    goal: Goal | None = None
    rounds: tuple[float, ...] = ()

    @classmethod
    def median(
        cls, name: str, rounds: Sequence[float], unit: str = "", goal: Goal | None = None
    ) -> "Figure":
        """Take the rounds' median."""
        return cls(name, statistics.median(rounds), unit, goal, tuple(rounds))

    def as_json(self) -> dict[str, Any]:
        """Plain data; with a goal, whether it is met."""
        data = asdict(self) | {"goal": str(self.goal) if self.goal else None}
        return data | ({"met": self.goal.met_by(self.value)} if self.goal else {})

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Figure":
        """Read what `as_json` gave."""
        goal = None
        if data["goal"]:
            sign, bound = data["goal"].split()
            goal = Goal(sign, float(bound))
        return cls(data["name"], data["value"], data["unit"], goal, tuple(data["rounds"]))


def percentile(values: Sequence[float], percent: int) -> float:
    """Value below which `percent` of 1 to 99 lie, interpolated."""
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def progress(what: str) -> None:
    """Say on standard error how far a long run is, and how long this process has run."""
    seconds = time.monotonic() - _STARTED
    print(f"  {seconds:6.1f} s  {what}", file=sys.stderr, flush=True)


def wait_until(done: Callable[[], bool], *, every: float, timeout: float, what: str) -> None:
    """Poll until done. Raises TimeoutError, naming `what`."""
    deadline = time.monotonic() + timeout
    while not done():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout:g} s: {what}")
        time.sleep(every)


def free_port() -> int:
    """A TCP port that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def count_prompt(first: int, tokens: int) -> dict[str, Any]:
    """Fields of a job that Tally answers with about so many tokens: it counts."""
    text = f"count from {first} to {first + tokens}"
    return {"messages": [{"role": "user", "content": text}]}


def bench_settings(url: str, **overrides: Any) -> Settings:
    """Quiet settings for the Redis at `url`."""
    return load_settings(**({"redis__url": url, "log__level": "error"} | overrides))


def _end_with_parent() -> None:
    """Have Linux end this process with the benchmark that started it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _serve(settings: Settings, spec: EngineSpec, name: str) -> None:
    _end_with_parent()
    from mlx_serving.common.telemetry import configure_logging
    from mlx_serving.worker.process.supervisor import run_worker

    configure_logging(log_format=settings.log.format, level=settings.log.level)
    sys.exit(run_worker(settings, MODEL, spec, name))


@contextmanager
def running_worker(
    settings: Settings, spec: EngineSpec, client: redis.Redis, name: str = "bench-worker"
) -> Iterator[int]:
    """Run one real worker (parent and engine child); yields the parent's process id."""
    process = SPAWN.Process(target=_serve, args=(settings, spec, name))
    process.start()
    try:
        key = resolve(settings).keys.worker(name)
        wait_until(
            lambda: bool(client.exists(key)) or not process.is_alive(),
            every=0.05, timeout=START_SECONDS, what="the worker is up",
        )  # fmt: skip
        if not process.is_alive():
            raise RuntimeError(f"the worker ended with status {process.exitcode}")
        yield process.pid or 0
    finally:
        if process.is_alive() and process.pid is not None:
            os.kill(process.pid, signal.SIGTERM)
        process.join(60)


def child_call(target: Callable[..., None], *arguments: Any) -> "Child":
    """Start `target(connection, *arguments)` in a spawned process."""
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=_called, args=(target, theirs, arguments))
    process.start()
    theirs.close()
    return Child(process, ours)


def _called(
    target: Callable[..., None], connection: Connection, arguments: tuple[Any, ...]
) -> None:
    _end_with_parent()
    target(connection, *arguments)


@dataclass(frozen=True)
class Child:
    """A spawned process and the pipe to it."""

    process: SpawnProcess
    connection: Connection

    def receive(self, kind: type[T], timeout: float = START_SECONDS) -> T:
        """Next message. Raises TimeoutError; EOFError where the process ended before."""
        if not self.connection.poll(timeout):
            raise TimeoutError(f"nothing within {timeout:g} s from {self.process.name}")
        message = self.connection.recv()
        assert isinstance(message, kind)
        return message

    def send(self, message: object) -> None:
        """Send a message."""
        self.connection.send(message)

    def end(self) -> None:
        """Wait for its end; insist after 10 s."""
        self.process.join(10)
        if self.process.is_alive():
            self.process.terminate()
            self.process.join(10)
        self.connection.close()


def machine(client: redis.Redis | None = None) -> dict[str, Any]:
    """Where the figures were measured."""
    facts: dict[str, Any] = {
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in LIBRARIES},
    }
    if client is not None:
        facts["redis_server"] = client.info("server")["redis_version"]
    return facts


def _version(name: str) -> str:
    try:
        return version(name)
    except ModuleNotFoundError:  # PackageNotFoundError is one
        return "not installed"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def report(title: str, figures: Sequence[Figure], output: Path | None) -> None:
    """Print the table of one benchmark; write its figures where asked."""
    print(table({title: figures}))
    if output is not None:
        output.write_text(json.dumps([figure.as_json() for figure in figures], indent=2) + "\n")


def table(reports: Mapping[str, Sequence[Figure]]) -> str:
    """All figures as lines of text."""
    lines = []
    for title, figures in reports.items():
        lines.append(f"\n{title}")
        for figure in figures:
            value = f"{figure.value:>12,.3f}" if figure.value < 100 else f"{figure.value:>12,.0f}"
            goal = ""
            if figure.goal is not None:
                verdict = "met" if figure.goal.met_by(figure.value) else "NOT MET"
                goal = f"   goal {figure.goal}: {verdict}"
            lines.append(f"  {figure.name:58}{value} {figure.unit:9}{goal}".rstrip())
    return "\n".join(lines)
