"""Writes what the engine decodes to Redis, beside the engine thread, and keeps the leases.

The engine thread hands outputs over and goes on (`push` never waits for Redis). One flush is
under way at a time: all rows in one script call, which is sent again unchanged until Redis answers.
Outputs that arrive meanwhile go into the next flush as one event for each job; `backlog` tells the
engine thread when to pause.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import redis
import structlog

from mlx_serving.common.events import ErrorInfo
from mlx_serving.common.protocol import calls
from mlx_serving.common.protocol.calls import HeldRows
from mlx_serving.common.states import JobState
from mlx_serving.worker.delivery.holdings import Holdings
from mlx_serving.worker.delivery.log import JobLog
from mlx_serving.worker.process.inflight_file import InflightJobs
from mlx_serving.worker.status.counters import Counters

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from mlx_serving.common.protocol.calls import CommitRow, RowReply
    from mlx_serving.common.protocol.client import Protocol
    from mlx_serving.worker.delivery.held import HeldJob
    from mlx_serving.worker.engine.interface import Output


@dataclass(frozen=True, slots=True)
class EngineLink:
    """What a publisher tells the engine, and asks it.

    An attempt goes by its name in the engine (`HeldJob.request_id`). `on_gone(request_id)` is
    called for every attempt that is not to be decoded any further: it failed, was cancelled, or was
    taken over. It is called outside the publisher's lock, and not if all rows ended by themselves,
    which the engine knows. `fresh()`: whether the engine makes progress. `has(request_id)`: whether
    it has an attempt that it was given.
    """

    on_gone: Callable[[str], None]
    fresh: Callable[[], bool]
    has: Callable[[str], bool]


log = structlog.get_logger(__name__)


ROWS_A_CALL: Final = 128  # a longer script would hold up Redis's other clients


WITHOUT_STEP: Final = 1.25  # of the interval: if no step comes, a flush goes by the clock


TRANSIENT: Final = (
    "OOM", "MISCONF", "NOREPLICAS", "LOADING", "MASTERDOWN", "BUSY", "NOPERM",
    "ERR The user executing the script", "The user executing the script",  # Redis 7.0's NOPERM
)  # fmt: skip


BACK_OFF_SECONDS: Final = (0.05, 0.1, 0.2)  # short: what a kill loses piles up meanwhile


@dataclass(frozen=True, slots=True)
class PublisherOptions:
    """Times in seconds; `lease_ms` in milliseconds of Redis TIME."""

    lease_ms: int = 10_000
    flush_seconds: float = 0.01
    idle_seconds: float = 0.1
    rq_results: bool = False  # whether RQ keeps results too


class Publisher(threading.Thread):
    """Owner of the held jobs. Thread-safe.

    Leases are renewed only while the engine makes progress, and of an attempt that was given to it
    only while it has its rows.
    """

    def __init__(
        self,
        protocol: Protocol,
        worker: str,
        options: PublisherOptions,
        engine: EngineLink,
        *,
        inflight: InflightJobs | None = None,
        counters: Counters | None = None,
    ) -> None:
        super().__init__(name="publisher", daemon=True)
        self._protocol, self._worker, self._options = protocol, worker, options
        self._engine, self._on_gone = engine, engine.on_gone
        self._log = JobLog()
        self.inflight = inflight or InflightJobs()
        self.counters = counters or Counters()
        self._changed = threading.Condition()
        self._holdings = Holdings(self.inflight, self.counters, rq_results=options.rq_results)
        self._urgent = self._due = self._draining = self._looking = self._resting = False
        self._idle = threading.Event()
        self._stopping = threading.Event()
        self._flushed_at = self._renewed_at = 0.0
        self._stepped_at = self._paced_at = (
            0.0  # the last step; the last one that a flush went with
        )
        self.fenced = 0  # jobs lost to another worker
        self.failing = False  # whether the last write failed

    @property
    def backlog(self) -> int:
        """Tokens that no flush has taken yet."""
        return self._holdings.backlog

    @property
    def pending(self) -> bool:
        """Whether anything waits to be written."""
        return self._holdings.pending

    # What the main thread calls

    def hold(self, jobs: Iterable[HeldJob]) -> None:
        """Keep the jobs' leases from now on; an older attempt of one is lost by this."""
        replaced = []
        with self._changed:
            for job in jobs:
                older = self._holdings.jobs.get(job.job_id)
                if older is not None:
                    replaced.append(older.request_id)
                    self._holdings.forget(job.job_id)
                self._holdings.hold(job)
        for request_id in replaced:
            self._on_gone(request_id)

    def placed(self, jobs: Iterable[HeldJob]) -> None:
        """Note that the engine has been given the rows of these jobs."""
        with self._changed:
            for job in jobs:
                job.placed = True

    def fail(self, job: HeldJob, code: str, message: str) -> None:
        """End a job with an error of its own."""
        with self._changed:
            job.end(JobState.FAILED, ErrorInfo(code, message))
            self._mark(job, urgent=True)

    def conclude(self, job: HeldJob) -> bool:
        """End a job of which earlier attempts wrote all but the end; False if there is more."""
        with self._changed:
            over = job.conclude()
            if over:
                self._mark(job, urgent=True)
        return over

    def cancel(self, job_id: str, reason: str) -> None:
        """End a held job; unknown ids are ignored."""
        with self._changed:
            job = self._holdings.jobs.get(job_id)
            if job is None or job.ending is not None:
                return
            self._cancel(job, reason)
        self._on_gone(job.request_id)

    def look(self) -> None:
        """Ask Redis now, not at the next renewal, whether a held job should stop."""
        with self._changed:
            self._looking = True
            self._changed.notify()

    def held(self) -> list[HeldJob]:
        """Jobs that are held now, with all that was decoded of them."""
        with self._changed:
            self._give()
            return list(self._holdings.jobs.values())

    def held_rows(self) -> HeldRows:
        """What the batch holds, for the claim's rule on suspects."""
        with self._changed:
            self._give()
            rows = [job for job in self._holdings.jobs.values() if job.ending is None]
            unproven = [
                job.claimed.max_unproven for job in rows
                if job.claimed.runs_alone or not job.proven
            ]  # fmt: skip
        return HeldRows(len(rows), len(unproven), min(filter(None, unproven), default=0))

    def let_go(self, jobs: Iterable[HeldJob]) -> None:
        """Forget jobs that were released: their leases are not renewed any more."""
        with self._changed:
            gone = [job for job in jobs if self._holdings.jobs.get(job.job_id) is job]
            for job in gone:
                self._holdings.forget(job.job_id)
        for job in gone:
            self._log.handed_over(job)

    def drain(self, timeout: float) -> bool:
        """Write all that is pending, bulk rows too; False if that took too long."""
        with self._changed:
            self._draining = True
            self._give()
            for job in self._holdings.jobs.values():
                if job.pending:
                    self._mark(job, urgent=True)
            self._idle.clear()
            self._changed.notify()
        return self._idle.wait(timeout)

    def stop(self) -> None:
        """End the thread; what is pending then stays unwritten."""
        self._stopping.set()
        with self._changed:
            self._changed.notify()

    # What the engine thread calls

    def push(self, outputs: Sequence[Output]) -> None:
        """Take a step's outputs. Rows of jobs that are gone are dropped."""
        now, failed = time.monotonic(), []
        with self._changed:
            self._idle.clear()
            if self._holdings.add(outputs, now):
                failed = self._give()
            self._pace(now)
            if self._urgent or self._due or self._resting:
                self._changed.notify()
        for request_id in failed:
            self._on_gone(request_id)

    def _pace(self, now: float) -> None:
        """Let a flush go with the step that ends nearest to the interval after the last one's.

        It then runs while the engine waits for the device. Counted from step to step: when a flush
        comes to take its rows, the interpreter decides.
        """
        step, self._stepped_at = now - self._stepped_at, now
        if self._urgent or now - self._paced_at + step / 2 >= self._options.flush_seconds:
            self._due, self._paced_at = True, now

    def _give(self) -> list[str]:
        """Give the engine's steps to their jobs; returns attempts of which a row failed."""
        urgent, failed = self._holdings.give()
        self._urgent |= urgent
        return failed

    # The thread

    def run(self) -> None:
        """Flush, renew and expire until stopped."""
        while not self._stopping.is_set():
            self.flush()
            self._renew()
            self._expire()
            with self._changed:
                if not self._holdings.pending:
                    self._idle.set()

    def _mark(self, job: HeldJob, *, urgent: bool) -> None:
        self._idle.clear()
        self._holdings.mark(job)
        if urgent and not self._urgent:
            self._urgent = True
            self._changed.notify()

    def flush(self) -> None:
        """Wait until a flush is due, and write it."""
        rows = self._collect()
        for start in range(0, len(rows), ROWS_A_CALL):
            self._commit(rows[start : start + ROWS_A_CALL])

    def _collect(self) -> list[CommitRow]:
        """Wait until a flush is due; take its rows."""
        options, holdings = self._options, self._holdings
        with self._changed:
            looked = self._looking
            rest = self._flushed_at + WITHOUT_STEP * options.flush_seconds - time.monotonic()
            if rest > 0:
                self._changed.wait_for(self._in_haste, rest)
            if not holdings.pending and self._looking == looked:
                self._resting = True
                self._changed.wait(options.idle_seconds)
                self._resting = False
            self._give()
            with_step, self._urgent, self._due = self._due, False, False
            rows = holdings.rows(self._worker, everything=self._draining)
            if rows:
                self._flushed_at = time.monotonic()
                self._paced_at = self._paced_at if with_step else self._flushed_at
            return rows

    def _in_haste(self) -> bool:
        return self._urgent or self._due or self._looking or self._stopping.is_set()

    def _commit(self, rows: list[CommitRow]) -> None:
        """Send rows until each is settled: the same rows, so that a lost reply does no harm."""
        attempt = 0
        while rows and not self._stopping.is_set():
            try:
                replies = self._protocol.run(
                    calls.commit(self._worker, rows, lease_ms=self._options.lease_ms)
                )
            except redis.RedisError as error:
                self._note_failure(type(error).__name__)
            else:
                rows = self._settle(rows, replies)
                if not rows:
                    break
            self._stopping.wait(BACK_OFF_SECONDS[min(attempt, len(BACK_OFF_SECONDS) - 1)])
            attempt += 1
        self.failing = False

    def _note_failure(self, reason: str) -> None:
        if not self.failing:
            log.warning("redis_write_failed", reason=reason, backlog_tokens=self.backlog)
        self.failing = True

    def _settle(self, rows: list[CommitRow], replies: list[RowReply]) -> list[CommitRow]:
        """Apply the replies; return the rows to send again."""
        again: dict[str, None] = {}
        gone: list[str] = []
        ended: list[tuple[HeldJob, JobState]] = []
        lost: list[tuple[HeldJob, RowReply]] = []
        with self._changed:
            for row, reply in zip(rows, replies, strict=True):
                job_id = row.attempt.job_id
                job = self._holdings.jobs.get(job_id)
                if job is None or job.claimed.attempt != row.attempt or job_id in again:
                    continue
                if reply.status == "ERROR" and reply.reason.lstrip("-").startswith(TRANSIENT):
                    self._note_failure(reply.reason.split(" ", 1)[0])
                    again[job_id] = None
                elif reply.status not in {"OK", "DUP"}:
                    self._holdings.forget(job_id)
                    lost.append((job, reply))
                    gone.append(job.request_id)
                elif row.end is not None:
                    self._holdings.forget(job_id)
                    ended.append((job, row.end.state))
                    gone += to_abort(job, row.end.state)
                elif reply.reason and job.ending is None:
                    self._cancel(job, reply.reason)
                    gone.append(job.request_id)
        for request_id in gone:
            self._on_gone(request_id)
        # Outside the lock, which the engine thread needs: a log may be slow.
        for job, reply in lost:
            self._note_lost(job, reply)
        for job, state in ended:
            self.counters.ended(job, state)
            self._log.ended(job, state)
        return [row for row in rows if row.attempt.job_id in again]

    def _note_lost(self, job: HeldJob, reply: RowReply) -> None:
        self.fenced += 1
        self._log.lost(job, reply)

    def _cancel(self, job: HeldJob, reason: str) -> None:
        self._give()  # what was decoded before is kept
        job.cancel(reason)
        self._mark(job, urgent=True)

    def _renew(self) -> None:
        """Renew each lease four times within its length, if the engine is alive.

        Those that a commit has just renewed are left out. If all are, there is no call that would
        hold up the next flush; what piles up meanwhile is lost by a kill.
        """
        now, turn = time.monotonic(), self._options.lease_ms / 8000
        if not (self._looking or now - self._renewed_at >= turn) or not self._engine.fresh():
            return
        looking, self._looking = self._looking, False
        jobs = [
            job for job in self.held()
            if job.ending is None and (looking or now - job.committed_at >= turn)
            and (not job.placed or self._engine.has(job.request_id))
        ]  # fmt: skip
        self._renewed_at = now
        if not jobs:
            self.failing = False  # nothing waits for Redis, so that a claim may find out
            return
        held = [job.claimed.attempt for job in jobs]
        try:
            replies = self._protocol.run(
                calls.renew(self._worker, held, lease_ms=self._options.lease_ms)
            )
        except redis.RedisError as error:
            self._note_failure(type(error).__name__)
            self._renewed_at, self._looking = 0.0, looking
            return
        self.failing = False
        for job, reply in zip(jobs, replies, strict=True):
            if reply.status == "FENCED":
                with self._changed:
                    mine = self._holdings.jobs.get(job.job_id) is job
                    if mine:
                        self._holdings.forget(job.job_id)
                if mine:
                    self._note_lost(job, reply)
                self._on_gone(job.request_id)
            elif reply.reason:
                self.cancel(job.job_id, reply.reason)

    def _expire(self) -> None:
        with self._changed:
            expired = self._holdings.expired(time.monotonic())
        for job in expired:
            self.cancel(job.job_id, job.expiry_reason)


def to_abort(job: HeldJob, state: JobState) -> list[str]:
    """Return the attempt that the engine is to abort: none if the job finished normally."""
    return [] if state is JobState.FINISHED else [job.request_id]
