"""The whole protocol against a model in Python, in any order that hypothesis thinks of.

Workers keep every attempt they ever had, so most of what they send comes from zombies.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from mlx_serving.common.protocol import calls, ended_calls
from mlx_serving.common.states import TERMINAL, JobState, can_move
from tests.support.protocol_driver import QUEUE, Attempt, Driver, payload

if TYPE_CHECKING:
    import redis

    from mlx_serving.common.protocol.calls import CommitRow
    from mlx_serving.common.redis.local import LocalRedis

pytestmark = pytest.mark.may_leak(reason="jobs stay queued or running at the end of a test")

ANY = 1 << 31
SHORT_EXAMPLES = 100
IDS = ("a", "b", "c", "d")
CLIENT: list[redis.Redis] = []  # hypothesis builds the machine itself
ends = st.sampled_from([None, None, None, JobState.FINISHED, JobState.FAILED, JobState.CANCELLED])
picks = st.integers(0, 1 << 16)


@dataclass
class Model:
    """What a job is, as the messages so far imply."""

    max_attempts: int
    state: JobState = JobState.QUEUED
    owner: Attempt | None = None
    last: Attempt | None = None  # of this life of the id
    seq: int = 0
    charged: int = 0
    charged_epoch: int = 0
    epoch: int = 0
    max_unproven: int = 0  # the most rows that a claim may take together with it; 0: any
    flagged: bool = False
    payloads: list[bytes] = field(default_factory=list)


class ProtocolMachine(RuleBasedStateMachine):
    """Each rule is one message; each compares the reply with the model's."""

    def __init__(self) -> None:
        super().__init__()
        self.driver = Driver(CLIENT[0])
        self.driver.redis.flushall()
        self.jobs: dict[str, Model] = {}
        self.list: list[str] = []
        self.attempts: list[Attempt] = []
        self.flushes: list[tuple[Attempt, list[CommitRow]]] = []
        self.seen: dict[str, JobState] = {}

    @rule(job_id=st.sampled_from(IDS), max_attempts=st.sampled_from([1, 2, 5]))
    def enqueue(self, job_id: str, max_attempts: int) -> None:
        reply = self.driver.enqueue(job_id, max_attempts=max_attempts)
        if job_id in self.jobs:
            assert (reply.created, reply.state) == (False, self.jobs[job_id].state)
            return
        assert reply.created
        self.jobs[job_id] = Model(max_attempts)
        self.list.append(job_id)

    @rule(worker=st.sampled_from(["w1", "w2"]), most=st.integers(1, 3))
    def claim(self, worker: str, most: int) -> None:
        expected = self._claimable(most)
        self.list = [job_id for job_id in self.list if job_id not in expected]
        reply = self.driver.claim(worker, most=most)
        assert [job.job_id for job in reply.jobs] == expected
        for job in reply.jobs:
            model = self.jobs[job.job_id]
            assert job.seq == model.seq
            assert (job.epoch, job.max_unproven) == (model.epoch + 1, model.max_unproven)
            model.state, model.owner = JobState.RUNNING, Attempt(job, worker)
            model.epoch, model.last = job.epoch, model.owner
            self.attempts.append(model.owner)

    def _claimable(self, most: int) -> list[str]:
        """What an empty worker gets: suspects of a crash only in small max_unproven."""
        taken: list[str] = []
        max_unproven = ANY
        for job_id in self.list:
            if len(taken) >= most or len(taken) >= max_unproven:
                break
            own = self.jobs[job_id].max_unproven or ANY
            if taken and (own == 1 or len(taken) >= min(max_unproven, own)):
                continue
            taken.append(job_id)
            max_unproven = min(max_unproven, own)
        return taken

    def _owns(self, attempt: Attempt) -> Model | None:
        model = self.jobs.get(attempt.job.job_id)
        return model if model and model.owner is attempt else None

    @precondition(lambda self: self.attempts)
    @rule(pick=picks, tokens=st.integers(0, 2), end=ends)
    def commit(self, pick: int, tokens: int, end: JobState | None) -> None:
        attempt = self.attempts[pick % len(self.attempts)]
        rows = [attempt.row(text=f"{pick}") for _ in range(tokens)]
        rows += [attempt.end(end)] if end else []
        model = self._owns(attempt)
        statuses = self.driver.commit(attempt, *rows)
        assert statuses == ["OK" if model else "FENCED"] * len(rows)
        self.flushes.append((attempt, rows))
        if model:
            model.seq += len(rows)
            model.payloads += [payload(row) for row in rows]
            if end:
                model.state, model.owner = end, None

    @precondition(lambda self: self.flushes)
    @rule(pick=picks)
    def resend(self, pick: int) -> None:
        """Send again what was answered: nothing changes, and nobody is told that it was written."""
        attempt, rows = self.flushes[pick % len(self.flushes)]
        statuses = self.driver.commit(attempt, *rows)
        assert set(statuses) <= {"DUP", "FENCED"}
        if self._owns(attempt):
            assert set(statuses) <= {"DUP"}

    @precondition(lambda self: self.attempts)
    @rule(pick=picks)
    def renew(self, pick: int) -> None:
        attempt = self.attempts[pick % len(self.attempts)]
        model, reply = self._owns(attempt), self.driver.renew(attempt)
        assert reply.status == ("OK" if model else "FENCED")
        assert bool(reply.reason) == (model is not None and model.flagged)

    @precondition(lambda self: self.attempts)
    @rule(pick=picks)
    def release(self, pick: int) -> None:
        attempt = self.attempts[pick % len(self.attempts)]
        model = self._owns(attempt)
        (status,) = self.driver.release(attempt)
        if model is None:
            assert status in {"DUP", "FENCED"}
        elif model.flagged:
            self._ended_by_script(attempt.job.job_id, JobState.CANCELLED)
        else:
            self._back(attempt.job.job_id)

    def _back(self, job_id: str) -> None:
        model = self.jobs[job_id]
        model.state, model.owner = JobState.QUEUED, None
        self.list.insert(0, job_id)

    def _ended_by_script(self, job_id: str, state: JobState) -> None:
        model = self.jobs[job_id]
        model.state, model.owner = state, None
        model.seq += 1
        model.payloads.append(self.driver.protocol.read_events(job_id)[-1])

    @precondition(lambda self: self.jobs)
    @rule(pick=picks)
    def cancel(self, pick: int) -> None:
        job_id = list(self.jobs)[pick % len(self.jobs)]
        model = self.jobs[job_id]
        state = self.driver.cancel(job_id)
        if model.state is JobState.QUEUED:
            self.list.remove(job_id)
            self._ended_by_script(job_id, JobState.CANCELLED)
        model.flagged = model.flagged or model.state is JobState.RUNNING
        assert state is model.state

    @precondition(lambda self: self.jobs)
    @rule(pick=picks)
    def forget(self, pick: int) -> None:
        """Only a job that ended; workers still send for it, and its id may live again."""
        job_id = list(self.jobs)[pick % len(self.jobs)]
        state = self.jobs[job_id].state
        (kept,) = self.driver.protocol.run(ended_calls.forget([job_id]))
        assert kept is (None if state in TERMINAL else state)
        if state in TERMINAL:
            del self.jobs[job_id]
            self.seen.pop(job_id, None)

    @precondition(lambda self: self.jobs)
    @rule(pick=picks)
    def requeue(self, pick: int) -> None:
        """Only a job that ended without finishing: it begins anew, and stays a suspect."""
        job_id = list(self.jobs)[pick % len(self.jobs)]
        model = self.jobs[job_id]
        again = model.state in TERMINAL - {JobState.FINISHED}
        reply = self.driver.protocol.run(ended_calls.requeue(job_id))
        assert reply is not None
        assert (reply.created, reply.state) == (again, JobState.QUEUED if again else model.state)
        if again:
            self.jobs[job_id] = Model(
                model.max_attempts, epoch=model.epoch, max_unproven=model.max_unproven
            )
            self.seen[job_id] = JobState.QUEUED
            self.list.append(job_id)

    @precondition(lambda self: self.jobs)
    @rule(pick=picks)
    def nobody_takes(self, pick: int) -> None:
        """A job's `queued_ttl` is over, and somebody reaps; it ends only if it waits."""
        job_id = list(self.jobs)[pick % len(self.jobs)]
        waits = self.jobs[job_id].state is JobState.QUEUED
        self.driver.redis.zadd("mlxs:deadlines", {job_id: 1})
        assert self.driver.reap().outcomes == ([(job_id, "expired")] if waits else [])
        if waits:
            self.list.remove(job_id)
            self._ended_by_script(job_id, JobState.EXPIRED)

    @rule(lapsed=st.sets(st.sampled_from(IDS), min_size=1))
    def time_passes(self, lapsed: set[str]) -> None:
        """The leases of some end, and somebody reaps."""
        running = {i for i in lapsed if i in self.jobs and self.jobs[i].owner}
        if running:
            self.driver.lapse(*running)
        swept = self.driver.reap()
        assert not swept.waiting
        assert {job_id for job_id, _ in swept.outcomes} == running
        for job_id, outcome in swept.outcomes:
            if self.jobs[job_id].flagged:
                assert outcome == "cancelled"
                self._ended_by_script(job_id, JobState.CANCELLED)
            else:
                assert outcome == "requeued"  # and nobody is charged
                self._back(job_id)

    @precondition(lambda self: self.attempts)
    @rule(
        worker=st.sampled_from(["w1", "w2"]),
        max_unproven=st.integers(0, 3),
        alone=st.booleans(),
        stale=picks,
    )
    def crash(self, worker: str, max_unproven: int, alone: bool, stale: int) -> None:  # noqa: FBT001
        """A parent's verdict on all that its child held, and, too late, on something else."""
        held = [a for a in self.attempts if a.worker == worker and self._owns(a)]
        extra = self.attempts[stale % len(self.attempts)]
        blamed = held if extra in held else [*held, extra]
        blames = [calls.Blame(a.job.attempt, max_unproven, alone) for a in blamed]
        outcomes = self.driver.protocol.run(calls.crash(worker, blames))
        assert [job_id for job_id, _ in outcomes] == [a.job.job_id for a in reversed(blamed)]
        for attempt, (_, outcome) in zip(reversed(blamed), outcomes, strict=True):
            assert outcome == self._settle(attempt, max_unproven, mine=attempt in held, alone=alone)

    def _settle(self, attempt: Attempt, max_unproven: int, *, mine: bool, alone: bool) -> str:
        job_id, epoch = attempt.job.job_id, attempt.job.epoch
        model = self.jobs.get(job_id)
        if model is None or model.last is not attempt:
            return "gone"
        reaped = model.state is JobState.QUEUED and max_unproven and model.charged_epoch != epoch
        if not (mine or reaped):
            return "gone"
        if mine and model.flagged:
            self._ended_by_script(job_id, JobState.CANCELLED)
            return "cancelled"
        if max_unproven:
            model.charged, model.charged_epoch = model.charged + 1, epoch
            model.max_unproven = min(model.max_unproven or ANY, max_unproven)
        if mine and max_unproven and alone and model.charged >= model.max_attempts:
            self._ended_by_script(job_id, JobState.DEAD)
            return "dead"
        if mine:
            self._back(job_id)
        return "charged" if max_unproven else "requeued"

    @precondition(lambda self: self.list)
    @rule()
    def the_list_is_lost(self) -> None:
        """A stock BLPOP, a deleted key: the reconciler puts them back, in whatever order."""
        self.driver.redis.delete(self.driver.keys.rq_queue(QUEUE))
        # Sorted: the index is in order of milliseconds, which no replay of an example repeats.
        call = calls.reconcile(QUEUE, sorted(self.driver.indexed()), lease_ms=60_000)
        assert {i for i, _ in self.driver.protocol.run(call).outcomes} == set(self.list)
        self.list = self.driver.listed()

    @invariant()
    def every_job_is_as_the_model_says(self) -> None:
        for job_id, model in self.jobs.items():
            record = self.driver.record(job_id)
            assert (record.state, record.seq, record.attempts) == (
                model.state, model.seq, model.charged,
            )  # fmt: skip
            assert record.owner == (model.owner.worker if model.owner else record.owner)
            if model.state is JobState.QUEUED:
                assert record.owner == ""
            before = self.seen.get(job_id, JobState.QUEUED)
            assert before is record.state or can_move(before, record.state)
            self.seen[job_id] = record.state

    @invariant()
    def every_stream_is_without_gap_or_repeat(self) -> None:
        for job_id, model in self.jobs.items():
            assert self.driver.protocol.read_events(job_id) == model.payloads
            events = self.driver.events(job_id)
            assert [e.seq for e in events] == list(range(1, model.seq + 1))
            finals = [e.seq for e in events if e.type == "end"]
            assert finals == ([model.seq] if model.state in TERMINAL else [])

    @invariant()
    def every_id_is_in_exactly_one_place(self) -> None:
        running = {i for i, m in self.jobs.items() if m.state is JobState.RUNNING}
        assert self.driver.listed() == self.list
        assert set(self.driver.leased()) == running
        assert set(self.driver.indexed()) == running | set(self.list)
        assert not running & set(self.list)


@pytest.mark.parametrize(
    ("examples", "steps"),
    [
        (SHORT_EXAMPLES, 30),
        pytest.param(
            300, 40, marks=[pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(900)]
        ),
    ],
)
def test_the_protocol_keeps_to_the_model(
    redis_client: redis.Redis,
    settled_redis: LocalRedis,
    examples: int,
    steps: int,
) -> None:
    del settled_redis
    CLIENT[:] = [redis_client]
    run_state_machine_as_test(
        ProtocolMachine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
