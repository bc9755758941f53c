"""A worker's parent for the chaos run, and what its child does besides serving.

The child writes a trace, and has places where it kills itself, alone or with its parent, when
the run arms one: no signal from outside could hit them.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import sys
import time
import zlib
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from mlx_serving.common.attempts import Attempt
from mlx_serving.worker.models.loading import EngineSpec
from mlx_serving.worker.process.child import ChildSpec, run_child
from tests.chaos import mutants
from tests.chaos.trace import TraceWriter, now
from tests.support.freezing import is_job
from tests.support.worker_fakes import commit_rows, payload_of
from tests.support.worker_process import quick_settings
from tests.support.wrong_clock import WrongClock

if TYPE_CHECKING:
    from collections.abc import Callable

    from mlx_serving.common.protocol.calls import Call, WireRow

TRAPS: Final = ("claim", "prefill", "attempt", "decode", "before_finish", "after_finish")
FIRST_ROWS: Final = "first rows"  # a trap that kills nobody: see `Traps.hold`
WITH_PARENT: Final = 0x80
HOLDING: Final = 0x40
HOLD_SECONDS: Final = 20.0


class Traps:
    """One mapped byte: 0, or the trap that is armed, plus `WITH_PARENT`; or `HOLDING`."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(b"\0")
        with path.open("r+b") as file:
            self._byte = mmap.mmap(file.fileno(), 1)

    def arm(self, trap: str, *, with_parent: bool) -> None:
        self._byte[0] = _number(trap) + (WITH_PARENT if with_parent else 0)

    def disarm(self) -> None:
        self._byte[0] = 0

    def armed(self, trap: str) -> bool:
        return self._byte[0] & ~WITH_PARENT == _number(trap)

    @property
    def holding(self) -> bool:
        """Whether a thread of the child stands still."""
        return bool(self._byte[0] == HOLDING)

    def hold(self, trap: str, trace: TraceWriter) -> None:
        """If this trap is armed, let the calling thread stand still until it is disarmed.

        The rest of the process goes on: so a row is late on its way, as in a network.
        """
        if not self.armed(trap):
            return
        self._byte[0] = HOLDING
        trace.write(("H", now(), trap))
        until = time.monotonic() + HOLD_SECONDS
        while self.holding and time.monotonic() < until:
            time.sleep(0.002)

    def spring(self, trap: str, trace: TraceWriter) -> None:
        if not self.armed(trap):
            return
        with_parent = bool(self._byte[0] & WITH_PARENT)
        self.disarm()
        trace.write(("X", now(), trap))
        if with_parent:
            os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)


def _number(trap: str) -> int:
    return (*TRAPS, FIRST_ROWS).index(trap) + 1


class Observer:
    """Wraps what a process calls."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._trace = TraceWriter(folder)
        self._traps = Traps(folder / "trap")
        self._held: set[str] = set()  # jobs whose rows stand still

    def install_in_parent(self) -> None:
        from mlx_serving.common.protocol.client import Protocol

        _wrap(Protocol, "run", self._around_call)

    def install(self) -> None:
        from mlx_serving.common.protocol.client import Protocol
        from mlx_serving.worker.delivery.publisher import Publisher
        from mlx_serving.worker.dispatcher import Dispatcher
        from mlx_serving.worker.engine.engine import Engine
        from mlx_serving.worker.engine.prefilling import Prefilling

        _wrap(Protocol, "run", self._around_call)
        _wrap(Protocol, "send", self._around_send)
        _wrap(Publisher, "push", self._around_push)
        _wrap(Engine, "add", self._around_add)
        _wrap(Prefilling, "_try_prefill", self._around_prefill)
        _wrap(Dispatcher, "run", self._around_serving)

    def _around_serving(self, run: Callable[[Any], int], dispatcher: Any) -> int:
        (self._folder / f"ready.{os.getpid()}").touch()
        return run(dispatcher)

    def _around_call(self, run: Callable[..., Any], protocol: Any, call: Call[Any]) -> Any:
        arguments = [str(a) for a in call.arguments if not isinstance(a, bytes)]
        if call.script == "commit":
            return self._commit(run, protocol, call)
        sent = now()
        reply = run(protocol, call)
        if call.script == "claim":
            self._claimed(reply, sent)
        elif call.script == "release":
            rows = zip(arguments[2::5], arguments[3::5], reply, strict=True)
            self._trace.write(*(("R", now(), *row) for row in rows))
        elif call.script in {"reap", "reconcile", "crash"}:
            outcomes = reply if call.script == "crash" else reply.outcomes
            self._trace.write(*(("Q", now(), *outcome) for outcome in outcomes))
        return reply

    def _around_send(self, send: Callable[..., Any], protocol: Any, call: Call[Any]) -> Any:
        """A claim whose reply is read later."""
        sent, receive = now(), send(protocol, call)

        def observed(timeout: float | None = None) -> Any:
            reply = receive(timeout)
            self._claimed(reply, sent)
            return reply

        return observed

    def _claimed(self, reply: Any, sent: int) -> None:
        if not reply.jobs:
            return
        lines = (("C", sent, now(), j.job_id, j.epoch, j.attempt.nonce) for j in reply.jobs)
        self._trace.write(*lines)
        if not self._held.isdisjoint(j.job_id for j in reply.jobs):
            self._traps.disarm()  # what stood still is an older attempt's now
        self._traps.spring("claim", self._trace)

    def _commit(self, run: Callable[..., Any], protocol: Any, call: Call[Any]) -> Any:
        rows = commit_rows(call)
        kinds = [_kind(row) for row in rows]
        if "end" in kinds:
            self._traps.spring("before_finish", self._trace)
        if "attempt" in kinds:
            self._held = {row.job_id for row in rows}
            self._traps.hold(FIRST_ROWS, self._trace)
            self._held = set()
        sent = now()
        reply = run(protocol, call)
        replied = now()
        self._trace.write(
            *(
                (
                    "K",
                    sent,
                    replied,
                    row.job_id,
                    row.epoch,
                    row.seq,
                    kind,
                    r.status,
                    row.nonce,
                    crc_of(payload_of(row)),
                )
                for row, kind, r in zip(rows, kinds, reply, strict=True)
            )
        )
        if "end" in kinds:
            self._traps.spring("after_finish", self._trace)
        if "attempt" in kinds:
            self._traps.spring("attempt", self._trace)
        return reply

    def _around_push(self, push: Callable[..., None], publisher: Any, outputs: Any) -> None:
        at = now()
        self._trace.write(
            *(("T", at, *_attempt(o.request_id), len(o.token_ids)) for o in outputs if o.token_ids)
        )
        push(publisher, outputs)
        self._traps.spring("decode", self._trace)

    def _around_add(self, add: Callable[..., None], engine: Any, request: Any) -> None:
        if is_job(request.id):
            self._trace.write(("P", now(), *_attempt(request.id)))
        add(engine, request)

    def _around_prefill(self, prefill: Callable[..., Any], engine: Any, chunk: Any) -> Any:
        result = prefill(engine, chunk)
        self._traps.spring("prefill", self._trace)  # computed, and not yet in the batch
        return result


def _attempt(request_id: str) -> tuple[str, int]:
    attempt = Attempt.parse(request_id)
    return attempt.job_id, attempt.epoch


def crc_of(payload: bytes) -> int:
    """What a row and the entry of a stream are compared by."""
    return zlib.crc32(payload)


def _kind(row: WireRow) -> str:
    if row.state:
        return "end"
    return "attempt" if row.body.startswith('"type":"attempt"') else "tokens"


def _wrap(owner: type, name: str, around: Callable[..., Any]) -> None:
    original = getattr(owner, name)

    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        return around(partial(_call, original), self, *args, **kwargs)

    setattr(owner, name, wrapper)


def _call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


def chaos_child(given: dict[str, Any], spec: ChildSpec, *args: Any) -> None:
    folder = Path(given["folder"])
    (folder / f"pid.{os.getpid()}").touch()
    if given["mutant"]:
        mutants.apply(given["mutant"])
    WrongClock(Path(given["clock"])).start()
    Observer(folder).install()
    run_child(spec, *args)


def main(text: str) -> int:
    given = json.loads(text)
    from mlx_serving.worker.process import supervisor

    assert "run_child" in vars(supervisor)
    vars(supervisor)["run_child"] = partial(chaos_child, given)
    WrongClock(Path(given["clock"])).start()
    Observer(Path(given["folder"])).install_in_parent()
    settings = quick_settings(given["url"], **given["settings"])
    engine = (
        EngineSpec("mlx", settings.models["tally"])
        if given["engine"] == "tally"
        else EngineSpec("simulated", "", 150.0)
    )
    return supervisor.run_worker(settings, "tally", engine, given["name"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
