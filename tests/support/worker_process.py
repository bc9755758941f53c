"""Workers as real processes, or inside the test's own.

Run as a module it is a worker's parent; `Hacks` change the child in ways that no setting allows.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import redis

from mlx_serving.common import events
from mlx_serving.common.protocol.client import Protocol
from mlx_serving.common.protocol.keys import Keys
from mlx_serving.common.settings import Settings, load_settings
from mlx_serving.worker.models.loading import EngineSpec
from mlx_serving.worker.process.child import Child, ChildSpec, run_child
from tests.support.forked_process import ForkedProcess, context_of_children, write_to
from tests.support.freezing import freeze
from tests.support.helpers import wait_until
from tests.support.paths import ROOT
from tests.support.poison import Poison, die
from tests.support.wrong_clock import WrongClock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from multiprocessing.connection import Connection

    from mlx_serving.producer.client import Client
    from mlx_serving.producer.handles import JobHandle

LEASE_SECONDS = 2.0
QUICK: dict[str, Any] = {
    "worker__lease_seconds": LEASE_SECONDS,
    "log__format": "json",
    "batch__max_rows": 32,
}


@dataclass(frozen=True)
class Hacks:
    """`block_at_step` hangs the engine's step n for good; `protocol`: what the worker speaks.

    `hold_lock`: it hangs in native code that holds the interpreter's lock, so nothing else runs.
    `prefill_rate`: prompt tokens a second of the simulated device; `slow_first_step`: seconds that
    its first step takes.
    `poison`: what a marked prompt does to the simulated engine. `load`: how loading goes wrong, of
    all models or, "<how> <path>", of one.
    `memory_pressure`: the parent sees signs of it.
    `freeze`: where the worker stops for good, see `tests.support.freezing`. `clock_file` holds the
    seconds by which its wall clock is wrong, read at every look at the clock. `machine`: the name
    of its machine.
    """

    block_at_step: int = 0
    hold_lock: bool = False
    prefill_rate: float = 0.0
    slow_first_step: float = 0.0
    protocol: int = 0
    poison: Poison | None = None
    load: str = ""
    memory_pressure: bool = False
    freeze: str = ""
    clock_file: str = ""
    machine: str = ""


def quick_settings(url: str, **changes: Any) -> Settings:
    return load_settings(redis__url=url, **(QUICK | changes))


def hacked_child(hacks: Hacks, spec: ChildSpec, lifeline: Connection) -> None:
    if hacks.block_at_step:
        _block_engine(hacks.block_at_step, hold_lock=hacks.hold_lock)
    if hacks.prefill_rate:
        spec = replace(
            spec, engine=replace(spec.engine, prefill_tokens_per_second=hacks.prefill_rate)
        )
    if hacks.slow_first_step:
        _slow_first_step(hacks.slow_first_step)
    if hacks.poison:
        hacks.poison.install()
    if hacks.load:
        _break_load(hacks.load)
    if hacks.freeze:
        freeze(hacks.freeze)
    if hacks.clock_file:
        WrongClock(Path(hacks.clock_file)).start()
    _rename(hacks)
    run_child(spec, lifeline)


def _rename(hacks: Hacks) -> None:
    from mlx_serving.common.job import schema
    from mlx_serving.worker.claiming import claims
    from mlx_serving.worker.delivery import sweeper

    if hacks.machine:
        for module in (claims, sweeper):
            vars(module)["machine_id"] = lambda: hacks.machine
    if hacks.protocol:
        for module in (schema, claims):
            vars(module)["PROTOCOL"] = hacks.protocol


def _break_load(how: str) -> None:
    from mlx_serving.worker.process import child

    what, _, where = how.partition(" ")
    load = vars(child)["load"]

    def broken(spec: EngineSpec, settings: Settings, path: str, *rest: Any) -> Any:
        if where and path != where:
            return load(spec, settings, path, *rest)
        if what == "missing":
            raise FileNotFoundError("no such model")
        return dying(what)

    vars(child)["load"] = broken


def dying(how: str) -> Iterator[None]:
    die(how)
    yield


def _block_engine(at_step: int, *, hold_lock: bool) -> None:
    from mlx_serving.worker.engine.simulated import SimulatedEngine

    steps = iter(range(1, 1 << 30))
    step = SimulatedEngine.step

    def blocking(engine: SimulatedEngine) -> Any:
        if next(steps) >= at_step:
            (ctypes.PyDLL(None) if hold_lock else time).sleep(3600)
        return step(engine)

    SimulatedEngine.step = blocking  # type: ignore[method-assign, assignment]


def _slow_first_step(seconds: float) -> None:
    from mlx_serving.worker.engine.simulated import SimulatedEngine

    step = SimulatedEngine.step
    pauses = iter([seconds])

    def slow(engine: SimulatedEngine) -> Any:
        time.sleep(next(pauses, 0.0))
        return step(engine)

    SimulatedEngine.step = slow  # type: ignore[method-assign, assignment]


class Pressed:
    """A probe that sees memory pressure at every death."""

    def start(self) -> None:
        pass

    def pressed(self) -> bool:
        return True


def main(given: dict[str, Any], child: Callable[..., None] = hacked_child) -> int:
    from mlx_serving.worker.process import supervisor

    hacks = given["hacks"]
    hacks["poison"] = hacks["poison"] and Poison(**hacks["poison"])
    if hacks["memory_pressure"]:
        vars(supervisor)["default_probe"] = Pressed
    vars(supervisor)["run_child"] = partial(child, Hacks(**hacks))
    settings = quick_settings(given["url"], **given["settings"])
    others = tuple(given["others"].items())
    engine = (
        EngineSpec("mlx", settings.models["tally"], others=others)
        if given["rate"] is None
        else EngineSpec("simulated", "", given["rate"], others)
    )
    return supervisor.run_worker(settings, "tally", engine, given["name"])


def main_of_forked(given: dict[str, Any], log: str) -> int:
    """`main` where the process is forked; so is its engine child, which joins its group."""
    from mlx_serving.worker.process import supervisor

    vars(supervisor)["spawn_context"] = context_of_children
    return main(given, partial(_forked_child, log, os.getpgrp(), dict(os.environ)))


def _forked_child(
    log: str, group: int, environ: Mapping[str, str], hacks: Hacks, spec: ChildSpec,
    lifeline: Connection,
) -> None:  # fmt: skip
    os.setpgid(0, group)
    os.environ.clear()  # the fork server's, which knows nothing of this test
    os.environ.update(environ)
    write_to(log)
    hacked_child(hacks, spec, lifeline)


class WorkerProcess:
    """A parent with its engine child.

    `rate`: a simulated row's tokens a second; 0 costs no time; None runs Tally on MLX. `others`:
    alias and path of the models that it serves beside tally. `spawned`: start it as production
    does, with all that this costs, instead of forking it; a worker that runs MLX always is.
    """

    def __init__(
        self,
        url: str,
        name: str,
        rate: float | None = 100.0,
        hacks: Hacks = Hacks(),
        others: Mapping[str, str] = {},
        *,
        spawned: bool = False,
        **settings: Any,
    ) -> None:
        given = {
            "url": url, "name": name, "rate": rate, "hacks": asdict(hacks), "settings": settings,
            "others": dict(others),
        }  # fmt: skip
        self.name = name
        self._log = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115 -- closed at the end
        self._redis = redis.Redis.from_url(url)
        self._child_pid = 0
        self.process = (
            self._spawned(json.dumps(given))
            if spawned or rate is None
            else ForkedProcess(main_of_forked, (given, self._log.name), Path(self._log.name))
        )

    def _spawned(self, given: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.support.worker_process", given],
            cwd=ROOT,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._redis.close()
        self._log.close()

    @property
    def child_pid(self) -> int:
        """The engine child's process id; waits until it serves."""
        if not self._child_pid:
            key = Keys().worker(self.name)
            pid = wait_until(lambda: self._redis.hget(key, "pid"), timeout=30, what=self.log())
            self._child_pid = int(pid)  # type: ignore[arg-type]
        return self._child_pid

    def next_child(self) -> int:
        """Wait until another child serves than the one last seen; return its process id."""
        old, key = self.child_pid, Keys().worker(self.name)

        def another() -> int:
            pid = int(self._redis.hget(key, "pid") or old)
            return pid if pid != old else 0

        self._child_pid = wait_until(another, timeout=30, what="another child")
        return self._child_pid

    def serving(self) -> Self:
        """Wait until the worker serves."""
        assert self.child_pid
        return self

    def signal(self, number: int) -> None:
        """Signal both processes."""
        for pid in (self.process.pid, self.child_pid):
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def terminate(self) -> None:
        """SIGTERM to the parent, as an init system does."""
        self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL both, if they still run."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        with suppress(ProcessLookupError):
            if self._child_pid and _is_a_child(self._child_pid):
                os.kill(self._child_pid, signal.SIGKILL)

    def exit_status(self, timeout: float = 20) -> int:
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still runs: {self.log()}") from None

    def child_lives(self) -> bool:
        return _is_a_child(self.child_pid)

    def log(self) -> str:
        return self.whole_log()[-6000:]

    def whole_log(self) -> str:
        return Path(self._log.name).read_text()


def _is_a_child(pid: int) -> bool:
    """Whether that process, which was an engine child once, still is one."""
    line = _command_line(pid)
    return "spawn_main" in line or "multiprocessing.forkserver" in line


def _command_line(pid: int) -> str:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return "" if state == "Z" else Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


class InProcessWorker:
    """A child's parts in threads of this process: quick to start, nothing to kill."""

    def __init__(
        self,
        url: str,
        name: str = "local",
        rate: float = 100.0,
        others: Iterable[str] = (),
        **settings: Any,
    ) -> None:
        engine = EngineSpec("simulated", "", rate, tuple((model, "") for model in others))
        spec = ChildSpec(quick_settings(url, **settings), "tally", name, engine)
        self.name = name
        self.child = Child(spec)
        self._status: list[int] = []
        self._thread = threading.Thread(target=self._run, name=f"worker {name}")

    def _run(self) -> None:
        self._status.append(self.child.run())

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.drain()

    def drain(self, *, at_once: bool = True) -> int:
        """Drain; returns the exit status."""
        self.child.messages.post("hand_over" if at_once else "drain", "")
        return self.exit_status()

    def exit_status(self, timeout: float = 20) -> int:
        self._thread.join(timeout)
        assert not self._thread.is_alive()
        return self._status[0]


def counted(tokens: int) -> str:
    """What the simulated engine says in so many tokens."""
    return " ".join(str(n) for n in range(1, tokens + 1))


def submit(client: Client, count: int, tokens: int, **fields: Any) -> list[JobHandle]:
    job = {"model": "tally", "prompt": "x", "max_tokens": tokens, "result_ttl": 120} | fields
    return client.submit_many([job] * count)


def check_answers(client: Client, handles: Iterable[JobHandle], tokens: int) -> None:
    """Every job finished with the right text; every stream is whole, in order, once."""
    for handle in handles:
        result = client.result(handle.id, timeout=30)
        assert (result.state.value, result.error) == ("finished", None), handle.id
        assert result.text == counted(tokens)
        assert result.token_ids == list(range(1, tokens + 1))
        stream = job_events(client, handle.id)
        assert [event.seq for event in stream] == list(range(1, len(stream) + 1))
        assert [event.type for event in stream].count("end") == 1
        assert stream[-1].type == "end"
        deltas = [delta for event in stream for delta in event.choices]
        assert [t for delta in deltas for t in delta.token_ids] == list(range(1, tokens + 1))
        assert "".join(delta.text for delta in deltas) == counted(tokens)


def job_events(client: Client, job_id: str) -> list[events.Event]:
    with redis.Redis.from_url(client.endpoint.url) as connection:
        payloads = Protocol(connection, client.keys).read_events(job_id)
    return [events.decode(payload) for payload in payloads]


def decoded(client: Client, handles: Iterable[JobHandle]) -> Iterator[int]:
    """How many tokens each job has in its stream."""
    for handle in handles:
        stream = job_events(client, handle.id)
        yield sum(len(delta.token_ids) for event in stream for delta in event.choices)


def wait_until_decoded(client: Client, handles: Iterable[JobHandle], tokens: int = 3) -> None:
    """Wait until each job has so many tokens in its stream."""
    schema = list(handles)
    wait_until(lambda: all(count >= tokens for count in decoded(client, schema)), timeout=20)


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
