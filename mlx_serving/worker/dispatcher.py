"""The worker's main loop: claims what the batch can hold, keeps the fleet tidy, drains.

Three threads: this one (claims, sweeps, commands), the engine (`EngineThread`), the `Publisher`.
Messages to this one come through a queue: wake-ups and commands from pub/sub, signals, and
"there is room" from the engine.
"""

from __future__ import annotations

import queue
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import redis
import structlog

from mlx_serving.common import defaults, limits
from mlx_serving.common.errors import CorruptEvent, MlxServingError
from mlx_serving.common.protocol import calls
from mlx_serving.common.queues import model_of
from mlx_serving.worker.claiming.adoption import Adoption, NotYetAdopted
from mlx_serving.worker.claiming.claims import Claims, ClaimTerms
from mlx_serving.worker.claiming.intake import JobRefusedError
from mlx_serving.worker.claiming.lane_claims import LaneClaim, LaneNews, LaneRoom
from mlx_serving.worker.claiming.returning import Returning
from mlx_serving.worker.delivery.held import HeldJob
from mlx_serving.worker.delivery.log import JobLog, RedisFailures
from mlx_serving.worker.process.crash import EXIT_ENGINE, EXIT_RECYCLE
from mlx_serving.worker.status.conditions import ANY_TIME, Conditions

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mlx_serving.common.protocol.calls import ClaimedJob
    from mlx_serving.common.protocol.client import Protocol
    from mlx_serving.worker.claiming.intake import Preparation
    from mlx_serving.worker.claiming.placement import Placement
    from mlx_serving.worker.delivery.publisher import Publisher
    from mlx_serving.worker.delivery.sweeper import Sweeper
    from mlx_serving.worker.engine.engine_set import EngineSet
    from mlx_serving.worker.engine.interface import Request
    from mlx_serving.worker.engine.scheduling.limits import BatchSize
    from mlx_serving.worker.engine_thread import EngineThread
    from mlx_serving.worker.messages import Messages
    from mlx_serving.worker.models.loading import LoadedModel

log = structlog.get_logger(__name__)

POLL_SECONDS: Final = 1.0  # pub/sub may lose a wake-up: look without one so often
UNADMITTED_SECONDS: Final = 1.0  # how long a claimed job may wait for room before it goes back
WRITTEN_SECONDS: Final = 1.0  # how long a hand-over of all waits for the publisher
RELEASE_SECONDS: Final = 5.0  # how long a drain waits for Redis
CRASH_SECONDS: Final = 1.0  # the same of a worker whose engine failed
RECYCLE_SECONDS: Final = 5.0  # the most that jobs get to end in before a planned replacement
CLAIM_MOST: Final = 32


@dataclass(frozen=True, slots=True)
class DispatcherOptions:
    """What the loop needs to know of the settings, where its messages come, what may pause it."""

    worker: str
    batch: BatchSize
    messages: Messages
    lease_ms: int = int(defaults.LEASE_SECONDS * 1000)
    drain_seconds: float = defaults.DRAIN_SECONDS
    max_payload_bytes: int = limits.PAYLOAD_BYTES
    conditions: Conditions = ANY_TIME
    memory_short: Callable[[], bool] = bool  # bool(): False
    affinity_ms: int = 0


class Dispatcher:
    """Runs until drained; other threads and signal handlers leave it messages."""

    def __init__(
        self,
        options: DispatcherOptions,
        protocol: Protocol,
        runner: EngineThread,
        publisher: Publisher,
        sweeper: Sweeper,
        placement: Placement,
        preparation: Preparation,
    ) -> None:
        self._options, self._protocol = options, protocol
        self._runner, self._publisher, self._sweeper = runner, publisher, sweeper
        self._fleet, self._placement, self._preparation = placement.fleet, placement, preparation
        self._counters = publisher.counters
        self._log = JobLog()
        self._messages = options.messages
        self._claim_limit = CLAIM_MOST
        self._claimed = False  # whether anything was since room was last looked at
        self._unadmitted: tuple[str, float] | None = None  # who waits for room, since when
        self._drain_until: float | None = None
        self._status = 0  # to end with
        self._failures = RedisFailures(protocol.redis)
        self._returning = Returning(protocol, options.worker, publisher, self._failures, runner.has)
        self._adoption = Adoption(
            protocol, options.worker, publisher, self._returning, self._failures
        )
        terms = ClaimTerms(
            options.worker, options.batch.max_rows, options.lease_ms, options.max_payload_bytes,
            options.affinity_ms,
        )  # fmt: skip
        self._news = LaneNews(POLL_SECONDS)
        self._claims = Claims(
            terms, protocol, placement, publisher.held_rows, self._news, runner.shortage
        )

    @property
    def draining(self) -> bool:
        """Whether it takes no more jobs."""
        return self._drain_until is not None

    def run(self) -> int:
        """Serve until drained or until the engine fails; returns the exit status."""
        while not self._done():
            try:
                self._chores()
                claimed = self._claim()
                self._failures.note_quiet()
            except redis.RedisError as error:
                self._failures.note(error)
                claimed = False
            if not claimed:
                self._listen()
        return self._finish()

    # One turn

    def _done(self) -> bool:
        if self._runner.failure is not None:
            return True
        if self._drain_until is None:
            return False
        return time.monotonic() >= self._drain_until or not self._publisher.held()

    def _chores(self) -> None:
        idle = self._claims.suspended or bool(self._options.conditions.reasons)
        try:
            self._fleet.beat(held=len(self._publisher.held()), suspended=idle)
        except redis.ResponseError as error:  # no worker can renew its leases either
            self._sweeper.hold(type(error).__name__)
            raise
        self._sweeper.sweep()
        self._returning.release()
        self._settle_unadmitted()
        self._returning.look()
        if not self._claims.unanswered:
            claiming = not (idle or self.draining or self._publisher.failing)
            self._placement.settle(claiming=claiming)
        if self._options.conditions.hands_over:
            self._hand_over()

    def _listen(self) -> None:
        """Wait for a message, then take all that are there."""
        wait = 0.05 if self._unadmitted is not None else POLL_SECONDS
        wait = min(wait, self._news.due_in())
        if self._drain_until is not None:
            wait = min(wait, max(0.0, self._drain_until - time.monotonic()), 0.05)
        try:
            self._handle(*self._messages.get(timeout=wait))
            while True:
                self._handle(*self._messages.get_nowait())
        except queue.Empty:
            return

    def _handle(self, what: str, argument: str) -> None:
        if what == "wake":
            self._news.note(argument)
        elif what == "cancel":
            self._publisher.look()  # a hint: the control hash says whether, and why
        elif what == "stop_job":
            self._stop_job(argument)
        elif what == "hand_over":
            self._status, self._drain_until = 0, time.monotonic()
            self._counters.draining = True
        elif what == "drain":
            self._drain(self._options.drain_seconds)
        elif what == "recycle" and not self.draining and not self._publisher.failing:
            self._counters.count("recycles", argument)
            self._drain(min(RECYCLE_SECONDS, self._options.drain_seconds), argument)

    def _drain(self, grace: float, recycled_for: str = "") -> None:
        self._status = EXIT_RECYCLE if recycled_for else 0  # 0 also if both are asked for
        if self._drain_until is None:
            held = len(self._publisher.held())
            log.info("draining", held=held, grace_seconds=grace, recycled_for=recycled_for)
            self._drain_until = time.monotonic() + grace
            self._counters.draining = True

    def _stop_job(self, job_id: str) -> None:
        """RQ's stop-job: through the control hash, so that it holds for any worker of the job."""
        try:
            self._protocol.run(calls.cancel(job_id, "stopped"))
        except redis.RedisError as error:
            self._failures.note(error)

    # Claiming

    @property
    def _engine(self) -> EngineSet:
        engine = self._runner.engine
        assert engine is not None  # noqa: S101 -- run() starts after `ready`
        return engine

    def _room(self, in_hand: Sequence[HeldJob] = ()) -> LaneClaim | None:
        """What to claim now, beside jobs in hand that the engine does not know yet."""
        short = self._publisher.failing or self._options.memory_short()
        if self.draining or short or self._options.conditions.reasons:
            return None
        in_line = [request.lane for request in self._runner.in_line() for _ in request.choices]
        lanes = [job.lane for job in in_hand]
        if self._claim_limit == CLAIM_MOST and self._runner.unadmitted() is None:
            # On their way: the engine has not looked yet, and had room for all the last time.
            lanes, in_line = lanes + in_line, []
        claim = LaneRoom(self._options.batch).next_claim(self._engine.lane_rows, lanes, in_line)
        return self._news.worth(claim and claim.up_to(self._claim_limit))

    def _claim(self) -> bool:
        """Claim up to the room there is; True if there may be more."""
        try:
            claimed = self._claims.take(self._room)
        except redis.RedisError:
            self._news.note()
            raise
        if claimed is None:
            return False
        if claimed.full or claimed.others:
            self._news.found_more(claimed.asked, claimed.last_lane)
        if not claimed.reply.jobs:
            return False
        self._take(claimed.reply.jobs, more=claimed.full)
        return claimed.full or claimed.others

    def _take(self, claims: Sequence[ClaimedJob], *, more: bool = False) -> None:
        held = [HeldJob(claimed) for claimed in claims]
        self._publisher.hold(held)
        self._claimed = True
        if self.draining or self._options.conditions.reasons:  # claimed ahead of that
            self._returning.release({job: job.returned() for job in reversed(held)})
            return
        self._claim_ahead(held, more=more)
        ready: list[tuple[HeldJob, Request]] = []
        for job in held:
            model = self._placement.loaded_models.get(model_of(job.claimed.queue))
            if model is None:
                self._returning.add(job)  # the reply to its claim came late
                continue
            try:
                with self._publisher.inflight.entering(job.request_id):
                    request = self._prepare(job, model)
            except NotYetAdopted as found:
                self._adoption.add(job, found.terms)
            except (JobRefusedError, MlxServingError) as error:
                log.warning("job_refused", **job.names(), code=error.code)
                self._publisher.fail(job, error.code, error.message)
            except redis.RedisError as error:
                if str(error).startswith("WRONGTYPE"):
                    self._publisher.fail(job, CorruptEvent.code, "the job's stream is no stream")
                    continue
                self._failures.note(error)
                self._returning.add(job)
            else:
                self._counters.resumed(job.kept_tokens)
                self._log.started(job)
                if not (job.claimed.seq and self._publisher.conclude(job)):
                    ready.append((job, request))
        self._adoption.run()
        self._claim_ahead(held, more=more)  # rows may have ended meanwhile
        self._place(ready)

    def _claim_ahead(self, in_hand: Sequence[HeldJob], *, more: bool) -> None:
        if more and self._claim_limit == CLAIM_MOST:
            self._claims.ahead(lambda: self._room(in_hand))

    def _prepare(self, held: HeldJob, model: LoadedModel) -> Request:
        claimed, payloads = held.claimed, []
        if claimed.seq:
            payloads = self._protocol.read_events(claimed.job_id, count=claimed.seq + 1)
        return self._preparation.request(held, payloads, model)

    def _place(self, ready: Sequence[tuple[HeldJob, Request]]) -> None:
        """Hand what can ever fit to the engine; leave the rest for a bigger worker, or fail it."""
        too_big = [(job, request) for job, request in ready if not self._engine.fits(request)]
        fitting = [pair for pair in ready if pair not in too_big]
        self._runner.submit([request for _, request in fitting])
        self._publisher.placed(job for job, _ in fitting)
        if not too_big:
            return
        held = set(self._publisher.held())
        for job, request in too_big:
            if job in held:
                self._leave(job, request)

    def _leave(self, job: HeldJob, request: Request) -> None:
        """Give a job that is too big for this worker to another one, or fail it."""
        rows, kv_tokens = len(request.choices), _kv_tokens(request)
        if self._someone_holds(model_of(job.claimed.queue), kv_tokens, rows):
            self._returning.release({job: job.returned(kv_tokens, rows if rows > 1 else 0)})
            return
        field = "n" if rows > self._options.batch.max_rows else "max_tokens"
        needed = f"{rows} rows and {kv_tokens} KV tokens"
        message = f"{field}: the job needs {needed}; no live worker has them"
        self._publisher.fail(job, "job_too_large", message)

    def _someone_holds(self, model: str, kv_tokens: int, rows: int) -> bool:
        try:
            return self._fleet.someone_holds(model, kv_tokens, rows)
        except redis.RedisError as error:
            self._failures.note(error)
            return True  # not known: the worker that claims the job next looks again

    def _settle_unadmitted(self) -> None:
        """At most one claimed job waits for room, and not for long; others go back at once.

        Once it went back, nothing of its lane is claimed before there is room for it.
        """
        waiting = self._runner.unadmitted()
        if waiting is None:
            return
        if not waiting:
            self._unadmitted = None
            if self._claimed:  # and all that was claimed had room
                self._claim_limit = min(CLAIM_MOST, self._claim_limit * 2)
            self._claimed = False
            return
        self._claim_limit, self._claimed = 1, False
        now, first = time.monotonic(), waiting[0].id
        if self._unadmitted is None or self._unadmitted[0] != first:
            self._unadmitted = first, now
        overdue = now - self._unadmitted[1] >= UNADMITTED_SECONDS
        self._hand_back(waiting if overdue else waiting[1:])

    def _hand_back(self, waiting: Sequence[Request]) -> None:
        """Release jobs that there is no room for; nothing more of theirs is claimed before."""
        caught = self._runner.withdraw({request.id for request in waiting})
        held = {job.request_id: job for job in self._publisher.held()}
        jobs = {}
        # Last first: each goes to the front of its queue, so their order stays.
        for request in reversed(waiting):
            job = held.get(request.id)
            if job is not None and request.id in caught:
                self._runner.shortage.note(request)
                jobs[job] = job.returned(_kv_tokens(request))
        self._returning.release(jobs)

    def _hand_over(self) -> None:
        """Give all that is held to other workers, and go on without: this machine is not ours now.

        Tokens that Redis does not have within a second are decoded again by the next worker.
        """
        held = [
            job
            for job in self._publisher.held()
            if job.ending is None and job not in self._returning
        ]
        ids = {job.request_id for job in held}
        for request_id in ids - self._runner.withdraw(ids):
            self._runner.abort(request_id)
        deadline = time.monotonic() + WRITTEN_SECONDS
        while held and self._publisher.backlog and time.monotonic() < deadline:
            time.sleep(0.01)
        self._returning.release(
            {job: job.returned() for job in reversed(held) if job.ending is None}
        )

    # The end

    def _finish(self) -> int:
        """Hand over what is left: commit every decoded token, then release."""
        with suppress(redis.RedisError):
            if claimed := self._claims.last(CRASH_SECONDS):
                self._publisher.hold(map(HeldJob, claimed.reply.jobs))
        if self._runner.failure is not None:
            self._publisher.drain(CRASH_SECONDS)  # what was decoded need not be again
            return EXIT_ENGINE
        self._runner.halt()
        self._runner.halted.wait(RELEASE_SECONDS)
        written = self._publisher.drain(RELEASE_SECONDS)
        left = self._publisher.held()
        try:
            rows = [job.returned() for job in reversed(left)]
            if rows and written:
                self._protocol.run(calls.release(self._options.worker, rows))
            self._publisher.let_go(left)
            self._fleet.leave()
        except redis.RedisError as error:
            self._failures.note(error)
        log.info("drained", handed_over=len(left), all_written=written)
        return self._status


def _kv_tokens(request: Request) -> int:
    """KV tokens that a job's rows need, each as long as the longest may become."""
    return len(request.choices) * max(request.kv_tokens)
