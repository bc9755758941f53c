"""The engine child: builds a worker's parts, runs them, and ends the process."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import threading
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, NoReturn

import structlog

from mlx_serving.common.errors import MlxServingError
from mlx_serving.common.queues import LANES, queue_name
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
from mlx_serving.worker.engine_thread import EngineThread, LoopTimes
from mlx_serving.worker.listener import READ_SECONDS, Listener
from mlx_serving.worker.messages import Messages
from mlx_serving.worker.models.loaded_models import LoadedModels
from mlx_serving.worker.models.loading import (
    LOAD_SLICE_SECONDS,
    EngineSpec,
    batch_size,
    load,
    memory_of,
    model_bytes,
    plan_memory,
)
from mlx_serving.worker.models.memory_keeper import MemoryKeeper
from mlx_serving.worker.process.crash import EXIT_CONFIGURATION, EXIT_ENGINE
from mlx_serving.worker.process.inflight_file import InflightJobs
from mlx_serving.worker.process.memory_pressure import AvailableMemory
from mlx_serving.worker.process.recycling import RecycleRules, Recycling
from mlx_serving.worker.process.watchdog import Watchdog
from mlx_serving.worker.status.conditions import Conditions, Rules
from mlx_serving.worker.status.conditions_mac import default_probe
from mlx_serving.worker.status.counters import Counters
from mlx_serving.worker.status.fleet import Fleet
from mlx_serving.worker.status.presence import Presence
from mlx_serving.worker.status.reporter import Reporter, Snapshotter

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence
    from multiprocessing.connection import Connection

    from mlx_serving.common.redis.connection import Endpoint
    from mlx_serving.common.settings import Settings
    from mlx_serving.worker.engine.interface import Output
    from mlx_serving.worker.models.loading import LoadedModel

log = structlog.get_logger(__name__)

# How long a thread may keep the interpreter's lock while another waits. The engine thread gives it
# up in each of MLX's calls and must have it back well before a step is over; Python's default of
# 5 ms is most of a step.
SWITCH_SECONDS: Final = 0.0005


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """All that the child needs; it crosses the process boundary by pickle, from our own parent."""

    settings: Settings
    model: str
    name: str
    engine: EngineSpec
    inflight_path: str = ""  # the in-flight file; "": no parent reads what the child held
    reports: Connection | None = None  # pipe to the parent for snapshots; None: nobody reads them
    avoid: tuple[str, ...] = ()  # models over which a child died while it loaded them


class Child:
    """One worker's parts.

    Each part is built after those that it needs. The engine thread and the publisher need each
    other, so the engine thread is given methods of this class, which pass its news on. It calls
    them only while it runs.
    """

    def __init__(self, spec: ChildSpec) -> None:
        settings = spec.settings
        self._spec = spec
        self._paths = spec.engine.paths(spec.model)
        self._kv_budget_bytes = settings.cache.budget_bytes  # of each model, once that is planned
        self.queues = tuple(queue_name(model, lane) for model in self._paths for lane in LANES)
        endpoint = resolve_shared(settings, tuple(self._paths))
        # Parts that need no other.
        self.counters, self.messages = Counters(), Messages()
        self.conditions = Conditions(Rules.of(settings), default_probe())
        self.available = AvailableMemory()
        self.inflight = (
            InflightJobs.open(spec.inflight_path) if spec.inflight_path else InflightJobs()
        )
        self.protocol = MeasuredProtocol(connect(endpoint), endpoint.keys, self.counters)
        # The engine, and what is written of its tokens.
        self.loaded_models = self._build_models()
        self.keeper = MemoryKeeper(
            self.counters, Recycling(RecycleRules.of(settings, spec.name)),
            on_due=partial(self.messages.post, "recycle"),
        )  # fmt: skip
        self.runner = self._build_runner()
        self.publisher = self._build_publisher(endpoint)
        # What the worker says of itself.
        self.snapshotter = Snapshotter(
            self.counters, self.runner, self.publisher, self.keeper, self.loaded_models,
            paused=lambda: self.conditions.reasons,
        )  # fmt: skip
        self.reporter = Reporter(self.snapshotter.snapshot, spec.reports)
        self.watchdog = Watchdog(self.runner, self.publisher, settings.engine.stall_seconds)
        # What claims jobs.
        self.fleet = self._build_fleet()
        self.dispatcher = self._build_dispatcher()
        self.listener = Listener(
            connect(endpoint, block_seconds=READ_SECONDS), endpoint.keys, spec.name, self.queues,
            self.messages.post,
        )  # fmt: skip

    # Building the parts

    def _build_models(self) -> LoadedModels:
        spec, paths = self._spec, self._paths
        loaded_models = LoadedModels(
            tuple(paths), EngineSet(self.inflight.prefill), self._load_model,
            lambda model: model_bytes(spec.engine, paths[model]), self._models_changed,
        )  # fmt: skip
        loaded_models.avoid(spec.avoid)
        return loaded_models

    def _build_runner(self) -> EngineThread:
        settings = self._spec.settings
        return EngineThread(
            self._load,
            on_outputs=self._publish,
            on_refused=self._refused,
            on_room=partial(self.messages.post, "room"),
            paused=self._buffer_is_full,
            times=LoopTimes(settings.engine.stall_seconds, LOAD_SLICE_SECONDS),
            tend=self.keeper.tend,
        )

    def _build_publisher(self, endpoint: Endpoint) -> Publisher:
        runner, settings = self.runner, self._spec.settings
        return Publisher(
            MeasuredProtocol(connect(endpoint), endpoint.keys, self.counters),
            self._spec.name,
            PublisherOptions(
                self._lease_ms,
                settings.worker.flush_interval_ms / 1000,
                rq_results=settings.worker.rq_results,
            ),
            EngineLink(runner.abort, lambda: runner.time_left > 0, runner.has),
            inflight=self.inflight,
            counters=self.counters,
        )

    def _build_fleet(self) -> Fleet:
        spec = self._spec
        presence = Presence(
            spec.name, tuple(self._paths), spec.settings.batch.max_rows, self.snapshotter.snapshot
        )
        return Fleet(self.protocol, self.queues, presence, self.loaded_models.resident)

    def _build_dispatcher(self) -> Dispatcher:
        settings, name, lease_ms = self._spec.settings, self._spec.name, self._lease_ms
        keeper, publisher = self.keeper, self.publisher
        options = DispatcherOptions(
            name, batch_size(settings), self.messages, lease_ms, settings.worker.drain_seconds,
            settings.jobs.max_bytes, self.conditions, lambda: keeper.state.refuses,
            settings.cache.prefix_affinity_ms,
        )  # fmt: skip
        sweeper = Sweeper(
            self.protocol, self.queues, lease_ms=lease_ms,
            reap_seconds=reap_interval_seconds(settings.worker.lease_seconds),
            watch=QueueWatch(self.protocol, self.queues, self.counters),
        )  # fmt: skip
        placement = Placement(
            self.loaded_models, self.protocol, self.fleet, name, interleave=self.runner.interleave,
            held=lambda: [job.claimed.queue for job in publisher.held()],
            patience=settings.worker.model_wait_seconds,
        )  # fmt: skip
        signer = Signer(key.get_secret_value() for key in settings.jobs.signing_keys)
        return Dispatcher(
            options, self.protocol, self.runner, publisher, sweeper, placement,
            Preparation(signer, settings.jobs.max_bytes),
        )  # fmt: skip

    @property
    def _lease_ms(self) -> int:
        return int(self._spec.settings.worker.lease_seconds * 1000)

    # What the engine thread calls

    def _load(self) -> EngineSet:
        """Load the first models."""
        spec, engines = self._spec, self.loaded_models.engines
        budget, self._kv_budget_bytes = plan_memory(spec.engine, spec.settings, self._paths)
        self.loaded_models.load_first(budget)
        self.available.start()
        self.keeper.watch(*memory_of(spec.engine, engines, lambda: self.available.value))
        return engines

    def _load_model(self, model: str) -> Generator[None, None, LoadedModel]:
        """Load one model; the in-flight file names it while a slice of its load runs."""
        spec = self._spec
        loading = load(spec.engine, spec.settings, self._paths[model], self._kv_budget_bytes)
        while True:
            with self.inflight.loading(model):
                try:
                    next(loading)
                except StopIteration as end:
                    loaded: LoadedModel = end.value
                    break
            yield
        return loaded

    def _models_changed(self, model: str) -> None:
        """Count a load, and have the main loop look for jobs."""
        loaded = self.loaded_models.get(model) is not None
        self.counters.count("model_loads" if loaded else "model_load_failures", model)
        self.messages.post("room")

    def _publish(self, outputs: Sequence[Output]) -> None:
        self.publisher.push(outputs)

    def _refused(self, request_id: str, code: str, message: str) -> None:
        job = next((j for j in self.publisher.held() if j.request_id == request_id), None)
        if job is not None:
            self.publisher.fail(job, code, message)

    def _buffer_is_full(self) -> bool:
        return self.publisher.backlog >= self._spec.settings.worker.buffer_tokens

    # Running

    def run(self) -> int:
        """Load the engine, then serve; returns the exit status."""
        self.reporter.start()
        self.runner.start()
        self.runner.ready.wait()
        if self.runner.engine is None:
            return load_failed(self.runner.failure)
        if not self.loaded_models.several:  # the collector must see a model that may leave
            keep_for_good()
        self.watchdog.start()
        self.publisher.start()
        self.listener.start()
        info = self.loaded_models.status().info
        log.info(
            "serving", worker=self._spec.name, model=self._spec.model, queues=list(self.queues),
            device=info.get("device", ""), acceleration=info.get("acceleration", ""),
        )  # fmt: skip
        self.conditions.start()
        status = self.dispatcher.run()
        self.conditions.stop()
        self.available.stop()
        self.snapshotter.stop()
        self.publisher.stop()
        self.listener.stop()
        self.reporter.stop()
        return status


def keep_for_good() -> None:
    """Spare the garbage collector all that is there now, which lives as long as the process.

    Otherwise each full collection stops every thread while it looks at libraries, tokenizer and
    model.
    """
    gc.collect()
    gc.freeze()


def load_failed(error: BaseException | None) -> int:
    """Log in one line why nothing was loaded; the status says whether another try is of use."""
    log.critical("load_failed", error=type(error).__name__, reason=str(error))
    return EXIT_ENGINE if isinstance(error, MemoryError) else EXIT_CONFIGURATION


def leave(status: int) -> NoReturn:
    """Flush the logs and end the process at once, without tearing the interpreter down.

    MLX keeps compiled functions by thread. Those of the engine thread are dropped when it ends,
    after Python counts it as joined, and dropping them takes the interpreter's lock. If the
    interpreter is being torn down by then, the process aborts ("terminate called without an active
    exception"). On CUDA the driver may also be gone before MLX's threads are. All that a worker
    leaves behind is in Redis, so that a teardown would add nothing.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    os._exit(status)


def _follow_parent(lifeline: Connection, messages: Messages) -> None:
    """Pass on what the parent says; hand over when it is gone, since nobody would restart us."""
    try:
        while True:
            messages.post(lifeline.recv())
    except (EOFError, OSError):
        log.warning("parent_gone")
        messages.post("hand_over")


def run_child(spec: ChildSpec, lifeline: Connection) -> None:
    """Entry point of the spawned process; exits with the worker's status."""
    configure_logging(log_format=spec.settings.log.format, level=spec.settings.log.level)
    try:
        child = Child(spec)
    except MlxServingError as error:
        sys.exit(load_failed(error))
    sys.setswitchinterval(SWITCH_SECONDS)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C reaches the parent too
    signal.signal(signal.SIGTERM, lambda *_: child.messages.post("drain"))
    threading.Thread(target=_follow_parent, args=(lifeline, child.messages), daemon=True).start()
    leave(child.run())
