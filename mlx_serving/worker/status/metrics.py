"""The worker's status as Prometheus metrics.

A metric that means the same as one of vLLM's has its name: `vllm:x` is `mlx_serving_x` here,
because Prometheus keeps the colon for recording rules. The others have names of their own.
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, Final

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.registry import Collector

from mlx_serving.worker.process.recycling import REASONS as RECYCLE_REASONS
from mlx_serving.worker.status.counters import BUCKETS, COMMIT, E2E, ITL, QUEUE_TIME, TTFT
from mlx_serving.worker.status.health import STATUSES, HealthLimits, assess

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from prometheus_client.metrics_core import Metric

    from mlx_serving.worker.status.status import Snapshot, StatusTracker, WorkerStatus

PREFIX: Final = "mlx_serving_"

COUNTERS: Final[dict[str, tuple[str, str, tuple[str, ...]]]] = {
    "prompt_tokens": ("", "Prompt tokens of attempts that decoded a token.", ()),
    "generation_tokens": ("", "Tokens decoded.", ()),
    "request_success": (
        "finished_reason",
        "Jobs that finished, once Redis has their end.",
        ("stop", "length"),
    ),
    "jobs_ended": (
        "state",
        "Jobs that this worker ended, by the state they ended in.",
        ("finished", "failed", "cancelled", "expired"),
    ),
    "claims": ("attempt", "Jobs claimed: for the first time, or a later one.", ("first", "later")),
    "takeovers": (
        "outcome",
        "Jobs that this worker's reaper took from an expired lease or past their deadline.",
        ("requeued", "cancelled", "expired", "isolated", "dead"),
    ),
    "hand_offs": ("", "Jobs that this worker gave back: drain, no room, too big.", ()),
    "resumes": ("", "Attempts that went on after committed tokens.", ()),
    "resumed_tokens": ("", "Committed tokens that those attempts did not decode again.", ()),
    "fenced_writes": ("", "Writes refused because the job is another worker's by now.", ()),
    "refused_writes": ("status", "Writes refused for another reason.", ("gap", "error")),
    "recycles": (
        "reason",
        "Planned replacements of the engine child that began.",
        RECYCLE_REASONS,
    ),
    "memory_relief": (
        "step",
        "Steps of the memory guard; none: there is memory again.",
        ("none", "trim", "shrink", "refuse"),
    ),
    "memory_errors": ("", "Out-of-memory errors of the device; what was decoded went on.", ()),
    "keys_quarantined": (
        "",
        "Keys of a wrong type that this worker's calls moved out of the way.",
        (),
    ),
    "redis_errors": ("", "Calls to Redis that failed and are sent again.", ()),
    "model_loads": ("model", "Models brought up, those before the first claim too.", ()),
    "model_load_failures": ("model", "Models that could not be brought up.", ()),
}
"""Name → (label or '', help, values of the label that are always shown).

Of the label `model`, all models that the worker serves are shown.
"""

HISTOGRAMS: Final[dict[str, str]] = {
    TTFT: "From enqueue to a job's first token, waiting in the queue included; first attempts.",
    ITL: "Between two outputs of a row that hold tokens, as the engine gives them.",
    E2E: "From enqueue to the end, of finished jobs.",
    QUEUE_TIME: "From enqueue to the first claim.",
    COMMIT: "One flush: round trip of the commit script for all of its rows.",
}

GAUGES: Final[dict[str, tuple[str, Callable[[Snapshot], float]]]] = {
    "num_requests_running": ("Rows in the decode batch.", lambda s: s.running),
    "num_requests_waiting": ("Rows claimed, and not in the decode batch yet.", lambda s: s.waiting),
    "num_requests_parked": (
        "Rows that gave way to a higher lane's.",
        lambda s: s.parked,
    ),
    "kv_cache_usage_perc": (
        "KV tokens reserved over those there are; 1 is full.",
        lambda s: s.kv_used / s.kv_capacity if s.kv_capacity else 0.0,
    ),
    "leases_held": ("Jobs that this worker holds a lease of.", lambda s: s.held),
    "memory_active_bytes": ("Bytes in the engine's arrays.", lambda s: s.memory_active),
    "memory_cached_bytes": ("Freed buffers that MLX keeps.", lambda s: s.memory_cached),
    "memory_limit_bytes": (
        "What may be active now; less than the device's if others took the memory.",
        lambda s: s.memory_limit,
    ),
    "memory_short": (
        "1 while no request is admitted for lack of memory.",
        lambda s: float(s.memory_short),
    ),
    "backlog_tokens": ("Tokens decoded and not taken into a flush yet.", lambda s: s.backlog),
    "redis_failing_seconds": (
        "How long calls to Redis have failed; 0: the last one did not.",
        lambda s: s.redis_failing,
    ),
}

AGES: Final[dict[str, tuple[str, Callable[[Snapshot], float]]]] = {
    "engine_progress_age_seconds": ("Since the engine loop came round.", lambda s: s.engine_age),
    "redis_answer_age_seconds": ("Since Redis answered a call.", lambda s: s.redis_age),
}
"""Ages that grow while the child sends nothing."""


class WorkerCollector(Collector):
    """Collects from a `StatusTracker` at each scrape; every sample names the worker's models."""

    def __init__(
        self, tracker: StatusTracker, limits: HealthLimits, model: str, worker: str
    ) -> None:
        self._tracker, self._limits = tracker, limits
        self._model, self._worker = model, worker

    def collect(self) -> Iterable[Metric]:
        """All metrics, from one status."""
        worker = self._tracker.status()
        yield from self._counters(worker)
        yield from self._histograms(worker)
        yield from self._gauges(worker)
        yield from self._queues(worker)
        yield from self._parent(worker)

    def _gauge(self, name: str, text: str, *labels: str) -> GaugeMetricFamily:
        return GaugeMetricFamily(PREFIX + name, text, labels=["model_name", *labels])

    def _counter(self, name: str, text: str, *labels: str) -> CounterMetricFamily:
        return CounterMetricFamily(PREFIX + name, text, labels=["model_name", *labels])

    def _counters(self, worker: WorkerStatus) -> Iterator[Metric]:
        for name, (label, text, values) in COUNTERS.items():
            counts = worker.counts.get(name, {})
            family = self._counter(name, text, *([label] if label else []))
            shown = self._model.split(",") if label == "model" else values
            for value in sorted({*shown, *counts} if label else {""}):
                labels = [self._model, *([value] if label else [])]
                family.add_metric(labels, counts.get(value, 0))
            yield family

    def _histograms(self, worker: WorkerStatus) -> Iterator[Metric]:
        for name, text in HISTOGRAMS.items():
            counts, total = worker.histograms[name]
            bounds = [*(str(float(bound)) for bound in BUCKETS[name]), "+Inf"]
            family = HistogramMetricFamily(PREFIX + name, text, labels=["model_name"])
            buckets = list(zip(bounds, map(float, accumulate(counts)), strict=True))
            family.add_metric([self._model], buckets, total)
            yield family

    def _gauges(self, worker: WorkerStatus) -> Iterator[Metric]:
        silent = worker.silent_for if worker.child == "up" else 0.0
        for table, late in ((GAUGES, 0.0), (AGES, silent)):
            for name, (text, read) in table.items():
                family = self._gauge(name, text)
                family.add_metric([self._model], read(worker.snapshot) + late)
                yield family

    def _queues(self, worker: WorkerStatus) -> Iterator[Metric]:
        depth = self._gauge("queue_depth", "Jobs waiting, in all of the queue.", "queue")
        age = self._gauge(
            "queue_oldest_age_seconds",
            "Since the enqueue of the queue's oldest job that has not ended, waiting or running.",
            "queue",
        )
        for queue, (jobs, seconds) in worker.snapshot.queues.items():
            depth.add_metric([self._model, queue], jobs)
            age.add_metric([self._model, queue], seconds)
        yield from (depth, age)

    def _parent(self, worker: WorkerStatus) -> Iterator[Metric]:
        health = assess(worker, self._limits)
        status = self._gauge("health_status", "1 for what /healthz says now.", "status")
        for name in STATUSES:
            status.add_metric([self._model, name], name == health.status)
        yield status
        reasons = self._gauge("health_reason", "1 for each reason that /healthz gives.", "reason")
        for reason in health.reasons:
            reasons.add_metric([self._model, reason], 1)
        yield reasons
        restarts = self._counter("engine_restarts", "Engine children started after the first.")
        restarts.add_metric([self._model], worker.restarts)
        yield restarts
        exits = self._counter("engine_exits", "Ends of engine children, by verdict.", "verdict")
        for how, count in sorted(worker.exits.items()):
            exits.add_metric([self._model, how], count)
        yield exits
        verdicts = self._counter(
            "crash_verdicts", "Jobs that a dead child held, by what became of them.", "outcome"
        )
        for outcome in sorted({"requeued", "charged", "dead", *worker.verdicts}):
            verdicts.add_metric([self._model, outcome], worker.verdicts.get(outcome, 0))
        yield verdicts
        info = InfoMetricFamily(PREFIX + "engine", "What the engine runs on.")
        info.add_metric([], {"model_name": self._model, "worker": self._worker}
                        | worker.snapshot.info)  # fmt: skip
        yield info
