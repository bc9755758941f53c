"""How a process ends in which a thread has used MLX."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NoReturn

import structlog

from mlx_serving.common.errors import MlxServingError
from mlx_serving.common.job.schema import LANES, queue_name
from mlx_serving.common.redis.connection import connect, resolve_shared
from mlx_serving.common.signing import Signer
from mlx_serving.common.telemetry import configure_logging
from mlx_serving.worker.claiming.intake import Preparation
from mlx_serving.worker.claiming.placement import Placement
from mlx_serving.worker.delivery.measured_protocol import MeasuredProtocol, QueueWatch
from mlx_serving.worker.delivery.publisher import EngineLink, Publisher, PublisherOptions
from mlx_serving.worker.delivery.sweeper import Sweeper, reap_interval_seconds
from mlx_serving.worker.dispatcher import Dispatcher, DispatcherOptions
from mlx_serving.worker.engine.engine_set import EngineSet
from mlx_serving.worker.engine_thread import Runner, RunnerTimes
from mlx_serving.worker.listener import Listener
from mlx_serving.worker.models.loaded_models import Residents
from mlx_serving.worker.models.loading import (
    LOAD_SLICE_SECONDS,
    EngineSpec,
    batch_size,
    describe,
    load,
    memory_of,
    model_bytes,
    plan_memory,
)
from mlx_serving.worker.models.memory_keeper import MemoryKeeper
from mlx_serving.worker.process.crash import (
    EXIT_CONFIGURATION,
    EXIT_ENGINE,
    EXIT_STALLED,
)
from mlx_serving.worker.process.inflight_file import Manifest
from mlx_serving.worker.process.memory_pressure import AvailableMemory
from mlx_serving.worker.process.recycling import RecycleRules, Recycling
from mlx_serving.worker.status.conditions import Conditions, Rules
from mlx_serving.worker.status.conditions_mac import default_probe
from mlx_serving.worker.status.counters import Measures
from mlx_serving.worker.status.fleet import Fleet
from mlx_serving.worker.status.presence import Presence, machine_facts
from mlx_serving.worker.status.reporter import Reporter, Vitals

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence
    from multiprocessing.connection import Connection

    from mlx_serving.common.settings import Settings
    from mlx_serving.worker.engine.row import Output
    from mlx_serving.worker.models.loading import LoadedModel


def leave(status: int) -> NoReturn:
    """End the process at once, with everything said that was to be said.

    MLX keeps compiled functions by thread. Those of the engine's thread are dropped when it ends,
    after Python counts it as joined, and dropping them takes the interpreter's lock: where the
    interpreter is being torn down by then, the process aborts ("terminate called without an
    active exception"). On CUDA the driver may be gone before MLX's threads are, too. What a
    worker leaves behind is in Redis; a teardown adds nothing to it.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    os._exit(status)


log = structlog.get_logger(__name__)


# The engine's thread gives the interpreter's lock up in each of MLX's calls. It is to have it back
# well before a step is over, and Python's 5 ms are most of one.
SWITCH_SECONDS: Final = 0.0005


WATCH_SECONDS: Final = 0.5


LAST_WRITE_SECONDS: Final = 1.0  # that a stalled worker's publisher gets for what was decoded


READ_SECONDS: Final = 1.0


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """All that the child needs; it crosses the process boundary by pickle, from our own parent."""

    settings: Settings
    model: str
    name: str
    engine: EngineSpec
    manifest: str = ""  # file that shows the parent what the child held; '': nobody looks
    reports: Connection | None = None  # pipe to the parent: how the child is; None: nobody asks
    avoid: tuple[str, ...] = ()  # models over which a child died while it loaded them


class Child:
    """One worker's parts, wired."""

    def __init__(self, spec: ChildSpec) -> None:
        settings = spec.settings
        self._paths = spec.engine.paths(spec.model)
        endpoint = resolve_shared(settings, tuple(self._paths))
        lease_ms = int(settings.worker.lease_seconds * 1000)
        queues = tuple(queue_name(model, lane) for model in self._paths for lane in LANES)
        self.stall_seconds = settings.engine.stall_seconds
        self.measures = Measures()
        self.protocol = MeasuredProtocol(connect(endpoint), endpoint.keys, self.measures)
        self._spec = spec
        self._manifest = Manifest.open(spec.manifest) if spec.manifest else Manifest()
        self._kv_budget: int | None = settings.cache.budget_bytes
        self._description: dict[str, str] = {}
        self.residents = self._residents()
        self.available = AvailableMemory()
        self.keeper = self._keeper()
        self.runner = self._runner()
        self.publisher = Publisher(
            MeasuredProtocol(connect(endpoint), endpoint.keys, self.measures),
            spec.name,
            PublisherOptions(lease_ms, settings.worker.flush_interval_ms / 1000),
            self._engine_link(),
            manifest=self._manifest,
            measures=self.measures,
        )
        self.fleet = Fleet(self.protocol, queues, spec.name)
        self.fleet.resident = self.residents.resident
        self.conditions = Conditions(Rules.of(settings), default_probe())
        sweeper = Sweeper(
            self.protocol, queues, lease_ms=lease_ms,
            reap_seconds=reap_interval_seconds(settings.worker.lease_seconds),
            watch=QueueWatch(self.protocol, queues, self.measures),
        )  # fmt: skip
        self.dispatcher = Dispatcher(
            self._options(lease_ms), self.protocol, self.runner, self.publisher, sweeper,
            self._placement(), self._preparation(),
        )  # fmt: skip
        self.listener = Listener(
            connect(endpoint, block_seconds=READ_SECONDS), endpoint.keys, spec.name, queues,
            self.dispatcher.post,
        )  # fmt: skip
        self.vitals = Vitals(
            self.measures, self.runner, self.publisher,
            draining=lambda: self.dispatcher.draining, info=lambda: self._description,
            paused=lambda: self.conditions.reasons, keeper=self.keeper,
        )  # fmt: skip
        self.vitals.standing = self.residents.standing
        self.fleet.numbers = Presence(self.vitals.snapshot).numbers

    def _engine_link(self) -> EngineLink:
        runner = self.runner
        return EngineLink(runner.abort, lambda: runner.time_left > 0, runner.has)

    def _keeper(self) -> MemoryKeeper:
        return MemoryKeeper(
            self.measures, Recycling(RecycleRules.of(self._spec.settings, self._spec.name)),
            on_due=lambda reason: self.dispatcher.post("recycle", reason),
            steps=lambda: self.runner.steps,
        )  # fmt: skip

    def _residents(self) -> Residents:
        spec = self._spec
        residents = Residents(
            tuple(self._paths), EngineSet(), self._load_model,
            lambda model: model_bytes(spec.engine, self._paths[model]), self._models_changed,
        )  # fmt: skip
        residents.avoid(spec.avoid)
        return residents

    def _runner(self) -> Runner:
        settings = self._spec.settings
        return Runner(
            self._load,
            on_outputs=self._push,
            on_refused=self._refused,
            on_room=lambda: self.dispatcher.post("room"),
            paused=lambda: self.publisher.backlog >= settings.worker.buffer_tokens,
            times=RunnerTimes(settings.engine.stall_seconds, LOAD_SLICE_SECONDS),
            tend=self.keeper.tend,
        )

    def _options(self, lease_ms: int) -> DispatcherOptions:
        settings = self._spec.settings
        return DispatcherOptions(
            self._spec.name, batch_size(settings), lease_ms,
            settings.worker.drain_seconds, settings.jobs.max_bytes, self.conditions,
            lambda: self.keeper.state.refuses, settings.cache.prefix_affinity_ms,
        )  # fmt: skip

    def _placement(self) -> Placement:
        return Placement(
            self.residents, self.protocol, self.fleet, self._spec.name,
            interleave=self.runner.interleave,
            held=lambda: [job.claimed.queue for job in self.publisher.held()],
            patience=self._spec.settings.worker.model_wait_seconds,
        )  # fmt: skip

    def _preparation(self) -> Preparation:
        settings = self._spec.settings
        return Preparation(
            Signer(key.get_secret_value() for key in settings.jobs.signing_keys),
            settings.jobs.max_bytes,
        )  # fmt: skip

    def _load(self) -> EngineSet:
        spec, engines = self._spec, self.residents.engines
        engines.on_prefill = self._manifest.prefill
        budget, self._kv_budget = plan_memory(spec.engine, spec.settings, self._paths)
        self.residents.load_first(budget)
        self.available.start()
        self.keeper.watch(*memory_of(spec.engine, engines, lambda: self.available.value))
        return engines

    def _load_model(self, model: str) -> Generator[None, None, LoadedModel]:
        spec = self._spec
        loading = load(spec.engine, spec.settings, self._paths[model], self._kv_budget)
        while True:
            with self._manifest.loading(model):
                try:
                    next(loading)
                except StopIteration as end:
                    loaded: LoadedModel = end.value
                    break
            yield
        return loaded

    def _models_changed(self, model: str) -> None:
        """Describe what is in memory now, and have the main thread look."""
        loaded = self.residents.get(model)
        self.measures.count("model_loads" if loaded else "model_load_failures", model)
        if loaded is not None:
            self._description = describe(self._spec.engine, loaded.engine)
            pieces = {r.implementation for r in getattr(loaded.engine, "acceleration", ())}
            implementation = ("twin" if "twin" in pieces else "native") if pieces else "none"
            self.vitals.facts = {"revision": self._revisions(), "implementation": implementation}
            self.fleet.facts = {
                "model": ",".join(self._paths), "revision": self._revisions(),
                "batch_rows": str(self._spec.settings.batch.max_rows),
                **machine_facts(), **self._description,
            }  # fmt: skip
        self.dispatcher.post("room")

    def _revisions(self) -> str:
        """Revision of the model in memory; of several, each after its alias."""
        found = {m: self.residents.get(m) for m in self.residents.models}
        revisions = {m: each.engine.model_info.revision for m, each in found.items() if each}
        if len(self._paths) == 1:
            return next(iter(revisions.values()), "")
        return ", ".join(f"{model}={revision}" for model, revision in revisions.items())

    def _push(self, outputs: Sequence[Output]) -> None:
        self.publisher.push(outputs)

    def _refused(self, request_id: str, code: str, message: str) -> None:
        job = next((j for j in self.publisher.held() if j.request_id == request_id), None)
        if job is not None:
            self.publisher.fail(job, code, message)

    def run(self) -> int:
        """Load the engine, then serve; returns the exit status."""
        reporter = Reporter(self.vitals, self._spec.reports)
        reporter.start()
        self.runner.start()
        self.runner.ready.wait()
        if self.runner.engine is None:
            return load_failed(self.runner.failure)
        if not self.residents.several:  # one that could leave must stay in the collector's sight
            keep_for_good()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        self.publisher.start()
        self.listener.start()
        log.info(
            "serving", worker=self._spec.name, model=self._spec.model,
            queues=[queue_name(model, lane) for model in self._paths for lane in LANES],
            **self._description,
        )  # fmt: skip
        self.conditions.start()
        status = self.dispatcher.run()
        self.conditions.stop()
        self.available.stop()
        self.vitals.stop()
        self.publisher.stop()
        self.listener.stop()
        reporter.stop()
        return status

    def _watch(self) -> None:
        """End the process when the engine hangs: a hung one behind a live process helps nobody.

        It is gone within the stall time, so this looks often and acts a little before.
        """
        pause = min(WATCH_SECONDS, 0.05 * self.stall_seconds)
        last_write = min(LAST_WRITE_SECONDS, 0.1 * self.stall_seconds)
        while True:
            before = time.monotonic()
            time.sleep(pause)
            if time.monotonic() - before > 2 * WATCH_SECONDS:
                continue  # the whole process slept: the engine gets its chance to come round
            dead = self.publisher.ident is not None and not self.publisher.is_alive()
            if dead and not self.runner.halted.is_set():
                log.critical("publisher_dead")
                os._exit(EXIT_ENGINE)
            if self.runner.time_left <= pause + last_write:
                log.critical("engine_stalled", seconds=round(self.runner.stalled_for, 1))
                self._write_the_last(last_write)
                os._exit(EXIT_STALLED)

    def _write_the_last(self, timeout: float) -> None:
        """Let the publisher write what was decoded, for at most `timeout` seconds."""
        writing = threading.Thread(target=self.publisher.drain, args=(timeout,), daemon=True)
        writing.start()
        writing.join(timeout)


def keep_for_good() -> None:
    """Spare the garbage collector all that is there now, which lives as long as the process.

    Else each full collection stops every thread while it looks at libraries, tokenizer and model.
    """
    gc.collect()
    gc.freeze()


def load_failed(error: BaseException | None) -> int:
    """Say in one line why nothing was loaded; the status says whether to try again is of use."""
    log.critical("load_failed", error=type(error).__name__, reason=str(error))
    return EXIT_ENGINE if isinstance(error, MemoryError) else EXIT_CONFIGURATION


def _follow_parent(lifeline: Connection, child: Child) -> None:
    """Do as the parent says; hand over when it is gone: nobody would restart or stop us."""
    try:
        while True:
            child.dispatcher.post(lifeline.recv())
    except (EOFError, OSError):
        log.warning("parent_gone")
        child.dispatcher.post("hand_over")


def run_child(spec: ChildSpec, lifeline: Connection) -> None:
    """Entry point of the spawned process; exits with the worker's status."""
    configure_logging(log_format=spec.settings.log.format, level=spec.settings.log.level)
    try:
        child = Child(spec)
    except MlxServingError as error:
        sys.exit(load_failed(error))
    sys.setswitchinterval(SWITCH_SECONDS)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C reaches the parent too
    signal.signal(signal.SIGTERM, lambda *_: child.dispatcher.post("drain"))
    threading.Thread(target=_follow_parent, args=(lifeline, child), daemon=True).start()
    leave(child.run())
