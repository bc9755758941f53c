"""The engine child: builds the worker's parts, runs them, and never outlives a dead engine."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import structlog

from mlx_serving.common.connection import connect, resolve
from mlx_serving.common.errors import MlxServingError
from mlx_serving.common.jobs import LANES, queue_name
from mlx_serving.common.signing import Signer
from mlx_serving.common.telemetry import configure_logging
from mlx_serving.worker.conditions import Conditions, Rules
from mlx_serving.worker.conditions_mac import default_probe
from mlx_serving.worker.crash import EXIT_CONFIGURATION, EXIT_ENGINE
from mlx_serving.worker.dispatcher import Dispatcher, DispatcherOptions
from mlx_serving.worker.engine.limits import least_rows
from mlx_serving.worker.fleet import Fleet
from mlx_serving.worker.listener import Listener
from mlx_serving.worker.loading import EngineSpec, describe, load, memory_of, planner_of, speller_of
from mlx_serving.worker.manifest import Manifest
from mlx_serving.worker.measured_protocol import MeasuredProtocol, QueueWatch
from mlx_serving.worker.measures import Measures
from mlx_serving.worker.memory_keeper import MemoryKeeper
from mlx_serving.worker.memory_pressure import AvailableMemory
from mlx_serving.worker.preparation import Preparation
from mlx_serving.worker.presence import Presence, machine_facts
from mlx_serving.worker.process_end import leave
from mlx_serving.worker.publisher import Publisher, PublisherOptions
from mlx_serving.worker.recycling import RecycleRules, Recycling
from mlx_serving.worker.runner import Runner
from mlx_serving.worker.sweeper import Sweeper
from mlx_serving.worker.vitals import Reporter, Vitals

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from multiprocessing.connection import Connection

    from mlx_serving.common.jobs import GenerationJob
    from mlx_serving.common.settings import Settings
    from mlx_serving.worker.engine.sequence import InferenceEngine, Output, Request
    from mlx_serving.worker.intake import Plan

log = structlog.get_logger(__name__)

WATCH_SECONDS: Final = 0.5
HUNG: Final = 0.9  # of the stall time, within which a hung engine's process is to be gone
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


class Child:
    """One worker's parts, wired."""

    def __init__(self, spec: ChildSpec) -> None:
        settings = spec.settings
        endpoint = resolve(settings, spec.model)
        lease_ms = int(settings.lease_seconds * 1000)
        queues = tuple(queue_name(spec.model, lane) for lane in LANES)
        self.stall_seconds = settings.engine_stall_seconds
        self.measures = Measures()
        self.protocol = MeasuredProtocol(connect(endpoint), endpoint.keys, self.measures)
        self._spec = spec
        self._manifest = Manifest.open(spec.manifest) if spec.manifest else Manifest()
        self._encode: Callable[[GenerationJob], tuple[int, ...]] | None = None
        self._plan: Plan | None = None
        self._description: dict[str, str] = {}
        self.available = AvailableMemory()
        self.keeper = self._keeper()
        self.runner = self._runner()
        self.publisher = Publisher(
            MeasuredProtocol(connect(endpoint), endpoint.keys, self.measures),
            spec.name,
            PublisherOptions(lease_ms, settings.flush_interval_ms / 1000),
            on_gone=self._gone,
            fresh=lambda: self.runner.stalled_for < self.stall_seconds,
            manifest=self._manifest,
            measures=self.measures,
        )
        self.fleet = Fleet(self.protocol, queues, spec.name)
        self.conditions = Conditions(Rules.of(settings), default_probe())
        sweeper = Sweeper(
            self.protocol, queues, lease_ms=lease_ms, reap_seconds=settings.reap_interval_seconds,
            watch=QueueWatch(self.protocol, queues, self.measures),
        )  # fmt: skip
        self.dispatcher = Dispatcher(
            self._options(queues, lease_ms), self.protocol, self.runner, self.publisher,
            sweeper, self.fleet, self._preparation(),
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
        self.fleet.numbers = Presence(self.vitals.snapshot).numbers

    def _keeper(self) -> MemoryKeeper:
        return MemoryKeeper(
            self.measures, Recycling(RecycleRules.of(self._spec.settings, self._spec.name)),
            on_due=lambda reason: self.dispatcher.post("recycle", reason),
            steps=lambda: self.runner.steps,
        )  # fmt: skip

    def _runner(self) -> Runner:
        settings = self._spec.settings
        return Runner(
            self._load,
            on_outputs=self._push,
            on_refused=self._refused,
            on_room=lambda: self.dispatcher.post("room"),
            paused=lambda: self.publisher.backlog >= settings.buffer_tokens,
            tend=self.keeper.tend,
        )

    def _options(self, queues: tuple[str, ...], lease_ms: int) -> DispatcherOptions:
        spec, settings = self._spec, self._spec.settings
        return DispatcherOptions(
            spec.name, spec.model, queues, settings.max_batch_rows,
            least_rows(settings.max_batch_rows, settings.lane_min_share), lease_ms,
            settings.drain_grace_seconds, settings.max_payload_bytes, self.conditions,
            lambda: self.keeper.state.refuses,
        )  # fmt: skip

    def _preparation(self) -> Preparation:
        settings = self._spec.settings
        return Preparation(
            self._encode_prompt, self._plan_output,
            Signer(key.get_secret_value() for key in settings.signing_keys),
            settings.max_payload_bytes,
        )  # fmt: skip

    def _load(self) -> InferenceEngine:
        engine, self._encode = load(self._spec.engine, self._spec.settings)
        self._plan = planner_of(self._spec.engine, engine)
        self.publisher.spell = speller_of(self._spec.engine, engine)
        self._description = describe(self._spec.engine, engine)
        pieces = {report.implementation for report in getattr(engine, "acceleration", ())}
        self.vitals.facts = {
            "revision": engine.model_info.revision,
            "implementation": ("twin" if "twin" in pieces else "native") if pieces else "none",
        }
        engine.on_prefill = self._manifest.prefill
        self.available.start()
        self.keeper.watch(*memory_of(self._spec.engine, engine, lambda: self.available.value))
        return engine

    def _encode_prompt(self, job: GenerationJob) -> tuple[int, ...]:
        assert self._encode is not None  # noqa: S101 -- the engine was ready before any claim
        return self._encode(job)

    def _plan_output(self, job: GenerationJob, requests: Sequence[Request]) -> list[Request]:
        assert self._plan is not None  # noqa: S101 -- see above
        return self._plan(job, requests)

    def _push(self, outputs: Sequence[Output]) -> None:
        self.publisher.push(outputs)

    def _gone(self, request_id: str) -> None:
        self.runner.abort(request_id)

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
        engine = self.runner.engine
        if engine is None:
            return load_failed(self.runner.failure)
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        self.fleet.facts = {
            "model": self._spec.model, "revision": engine.model_info.revision,
            "kv_tokens_capacity": str(engine.kv_tokens_capacity),
            "batch_rows": str(self._spec.settings.max_batch_rows),
            **machine_facts(), **self._description,
        }  # fmt: skip
        self.publisher.start()
        self.listener.start()
        log.info(
            "serving", worker=self._spec.name, model=self._spec.model,
            queues=[queue_name(self._spec.model, lane) for lane in LANES], **self._description,
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
        while True:
            before = time.monotonic()
            time.sleep(min(WATCH_SECONDS, 0.05 * self.stall_seconds))
            if time.monotonic() - before > 2 * WATCH_SECONDS:
                continue  # the whole process slept: the engine gets its chance to come round
            dead = self.publisher.ident is not None and not self.publisher.is_alive()
            if dead and not self.runner.halted.is_set():
                log.critical("publisher_dead")
                os._exit(EXIT_ENGINE)
            if self.runner.stalled_for >= HUNG * self.stall_seconds:
                log.critical("engine_stalled", seconds=round(self.runner.stalled_for, 1))
                os._exit(EXIT_ENGINE)


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
    configure_logging(log_format=spec.settings.log_format, level=spec.settings.log_level)
    try:
        child = Child(spec)
    except MlxServingError as error:
        sys.exit(load_failed(error))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C reaches the parent too
    signal.signal(signal.SIGTERM, lambda *_: child.dispatcher.post("drain"))
    threading.Thread(target=_follow_parent, args=(lifeline, child), daemon=True).start()
    leave(child.run())
