"""What the engine child counts, in plain numbers; its parent makes Prometheus metrics of them.

Every method may be called from any thread and waits for nothing but a short lock.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections import defaultdict
from typing import TYPE_CHECKING, Final

from mlx_serving.common.states import JobState

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from mlx_serving.common.protocol.calls import ClaimedJob, RowReply
    from mlx_serving.worker.delivery.held import HeldJob
    from mlx_serving.worker.engine.interface import Output

_TO_FIRST_TOKEN: Final = (
    0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1, 2, 5, 10, 20, 40, 80, 160, 640, 2560,
)  # fmt: skip
_BETWEEN_TOKENS: Final = (
    0.001, 0.0025, 0.005, 0.0075, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 10,
)  # fmt: skip
_REQUEST: Final = (
    0.1, 0.25, 0.5, 1, 2, 5, 10, 15, 20, 30, 60, 120, 240, 480, 960, 1920, 7680, 28_800,
)  # fmt: skip
_ROUND_TRIP: Final = (
    0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5,
)  # fmt: skip

TTFT: Final = "time_to_first_token_seconds"
ITL: Final = "inter_token_latency_seconds"
E2E: Final = "e2e_request_latency_seconds"
QUEUE_TIME: Final = "request_queue_time_seconds"
COMMIT: Final = "commit_latency_seconds"

BUCKETS: Final[dict[str, tuple[float, ...]]] = {
    TTFT: _TO_FIRST_TOKEN,
    ITL: _BETWEEN_TOKENS,
    E2E: _REQUEST,
    QUEUE_TIME: _REQUEST,
    COMMIT: _ROUND_TRIP,
}
"""Upper bounds of each histogram's buckets, in seconds; one more bucket has no bound."""

Counts = dict[str, dict[str, float]]
"""Counter → value of its one label ('' if it has none) → count."""

Histograms = dict[str, tuple[list[int], float]]
"""Histogram → (observations in each bucket, not cumulative; sum of what was observed)."""


class _Histogram:
    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds, self.total = bounds, 0.0
        self.counts = [0] * (len(bounds) + 1)

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times


class Counters:
    """Counters and histograms of one child, and what else its threads note for its status.

    Times are in monotonic seconds. `queues` has of each queue its depth, and the age in seconds of
    its oldest open job.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: defaultdict[str, defaultdict[str, float]] = defaultdict(
            lambda: defaultdict(float)
        )
        self._histograms = {name: _Histogram(bounds) for name, bounds in BUCKETS.items()}
        self.queues: dict[str, tuple[int, float]] = {}
        self.draining = False  # whether the main loop takes no more jobs
        self.turned_at = time.monotonic()  # when the main loop came round last
        self.redis_answered_at = self.leased_at = self.turned_at
        self.redis_evicts = False  # whether it deletes keys when it is full
        self.redis_failed = False  # whether the last call to Redis failed

    def read(self) -> tuple[Counts, Histograms]:
        """Copy of all counts since the child began."""
        with self._lock:
            counts = {name: dict(by_label) for name, by_label in self._counts.items()}
            histograms = {n: (h.counts.copy(), h.total) for n, h in self._histograms.items()}
        return counts, histograms

    def count(self, name: str, label: str = "", by: float = 1) -> None:
        """Raise a counter."""
        with self._lock:
            self._counts[name][label] += by

    def total(self, name: str) -> float:
        """Sum of a counter, over its label."""
        with self._lock:
            return sum(self._counts[name].values())

    def observe(self, name: str, seconds: float) -> None:
        """Add to a histogram."""
        with self._lock:
            self._histograms[name].observe(seconds)

    # What happens to jobs

    def stepped(self, progress: Iterable[tuple[HeldJob, Output]], at: float | None = None) -> None:
        """Count the outputs of a step that was done `at` monotonic seconds; None: now.

        Rows that were in the same step before have the same gap, so gaps are counted by the time of
        the step before, not by row.
        """
        now = time.monotonic() if at is None else at
        tokens = 0
        gaps: dict[float, int] = {}
        began: list[HeldJob] = []
        for job, output in progress:
            if not output.token_ids:
                continue
            tokens += len(output.token_ids)
            choice = job.choices[output.choice]
            if choice.token_at:
                gaps[choice.token_at] = gaps.get(choice.token_at, 0) + 1
            elif not job.began:
                job.began = True
                began.append(job)
            choice.token_at = now
        with self._lock:
            self._counts["generation_tokens"][""] += tokens
            for since, rows in gaps.items():
                self._histograms[ITL].observe(now - since, rows)
            for job in began:
                self._began(job)

    def _began(self, job: HeldJob) -> None:
        """Count an attempt with its first token; of a job's first attempt, also the time to it."""
        self._counts["prompt_tokens"][""] += job.prompt_tokens
        claimed = job.claimed
        if not claimed.first_token_ms and claimed.enqueued_ms:
            waited = max(0, job.first_token_ms - claimed.enqueued_ms)
            self._histograms[TTFT].observe(waited / 1000)

    def resumed(self, tokens: int) -> None:
        """Count an attempt that goes on after so many committed tokens; 0: it is no resume."""
        if not tokens:
            return
        with self._lock:
            self._counts["resumes"][""] += 1
            self._counts["resumed_tokens"][""] += tokens

    def ended(self, job: HeldJob, state: JobState) -> None:
        """Count a job whose end Redis has."""
        with self._lock:
            self._counts["jobs_ended"][state.value] += 1
            if state is JobState.FINISHED:
                self._counts["request_success"][job.finish_reason or "stop"] += 1
                self._histograms[E2E].observe(job.age_ms / 1000)

    # What Redis says

    def answered(self) -> None:
        """Note that Redis answered a call."""
        self.redis_answered_at, self.redis_failed = time.monotonic(), False

    def leased(self) -> None:
        """Note that Redis granted or renewed leases."""
        self.leased_at = time.monotonic()

    def claimed(self, jobs: Sequence[ClaimedJob]) -> None:
        """Count claims; of a job's first claim, also how long the job waited in the queue."""
        with self._lock:
            for job in jobs:
                self._counts["claims"]["first" if job.epoch == 1 else "later"] += 1
                if job.epoch == 1 and job.enqueued_ms:
                    waited = max(0, job.started_ms - job.enqueued_ms)
                    self._histograms[QUEUE_TIME].observe(waited / 1000)

    def refused(self, replies: Iterable[RowReply]) -> None:
        """Count rows that Redis refused: of attempts that lost their job, and out of order."""
        statuses = [r.status for r in replies if r.status not in {"OK", "DUP"}]
        for status in statuses:
            self.count("fenced_writes" if status == "FENCED" else "refused_writes", {
                "FENCED": "", "GAP": "gap", "ERROR": "error",
            }[status])  # fmt: skip
