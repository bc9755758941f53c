"""Tenants' limits, turns and sets under any order of messages, zombies' among them."""

from __future__ import annotations

from collections import Counter
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

from mlx_serving.common.protocol import calls
from mlx_serving.common.protocol.fields import JobField
from tests.support.protocol_driver import QUEUE, Attempt, Driver

if TYPE_CHECKING:
    import redis


pytestmark = pytest.mark.may_leak(reason="jobs stay queued or running at the end of a test")

EXAMPLES = 30
TENANTS = ("", "a", "b", "c")
CLIENT: list[redis.Redis] = []  # hypothesis builds the machine itself
picks = st.integers(0, 1 << 16)


class TenantMachine(RuleBasedStateMachine):
    """Each rule is one message; the invariant compares every key with the control hashes."""

    def __init__(self) -> None:
        super().__init__()
        self.driver = Driver(CLIENT[0])
        self.driver.redis.flushall()
        self.tenant_of: dict[str, str] = {}
        self.rows_of: dict[str, int] = {}
        self.limits: dict[str, int] = {}
        self.attempts: list[Attempt] = []

    def _texts(self, raw: object) -> list[str]:
        assert isinstance(raw, list | set)
        return [i.decode() for i in raw]

    def _line(self, tenant: str) -> list[str]:
        return self._texts(self.driver.redis.lrange(self.driver.keys.line(QUEUE, tenant), 0, -1))

    def _ids(self, state: str, tenant: str) -> set[str]:
        own = (i for i, t in self.tenant_of.items() if t == tenant)
        return {i for i in own if self.driver.state(i) == state}

    def _running_rows(self, tenant: str) -> int:
        return sum(self.rows_of[i] for i in self._ids("running", tenant))

    def _may_start(self, tenant: str, running: int, job_id: str) -> bool:
        """Whether a job of a tenant that runs so many rows is within its limit."""
        limit = self.limits.get(f"running:{tenant}")
        if limit is None:
            return True
        return running + self.rows_of[job_id] <= limit or (running == 0 < limit)

    def _refused(self, tenant: str, rows: int) -> str | None:
        if not tenant:
            return None
        if rows > 1 and 0 < self.limits.get(f"running:{tenant}", 0) < rows:
            return "running"
        limit = self.limits.get(f"queued:{tenant}")
        full = limit is not None and len(self._ids("queued", tenant)) >= limit
        return "queued" if full else None

    @rule(tenant=st.sampled_from(TENANTS), rows=st.lists(st.integers(1, 3), min_size=1, max_size=3))
    def enqueue(self, tenant: str, rows: list[int]) -> None:
        for count in rows:
            job_id = f"j{len(self.tenant_of)}"
            expected = self._refused(tenant, count)
            reply = self.driver.enqueue(job_id, tenant=tenant, rows=count)
            assert (reply.refusal.reason if reply.refusal else None) == expected
            if reply.created:
                self.tenant_of[job_id], self.rows_of[job_id] = tenant, count

    @rule(kind=st.sampled_from(["queued", "running"]), tenant=st.sampled_from(TENANTS[1:]),
          limit=st.sampled_from([None, 0, 1, 2, 4]))  # fmt: skip
    def limit(self, kind: str, tenant: str, limit: int | None) -> None:
        name = f"{kind}:{tenant}"
        if limit is None:
            self.limits.pop(name, None)
            self.driver.redis.hdel(self.driver.keys.limits(), name)
        else:
            self.limits[name] = limit
            self.driver.redis.hset(self.driver.keys.limits(), name, limit)

    @rule(worker=st.sampled_from(["w1", "w2"]), most=st.integers(1, 5))
    def claim(self, worker: str, most: int) -> None:
        lines = {tenant: self._line(tenant) for tenant in TENANTS[1:]}
        lines[""] = [i for i in self.driver.listed() if not self.tenant_of[i]]
        running = {t: self._running_rows(t) for t in TENANTS}
        taken = self.driver.claim(worker, most=most).jobs
        self.attempts += [Attempt(job, worker) for job in taken]
        counts = Counter(self.tenant_of[job.job_id] for job in taken)
        for tenant, line in lines.items():
            own = [j.job_id for j in taken if self.tenant_of[j.job_id] == tenant]
            assert own == line[: len(own)]  # each tenant's in their order
            for job_id in own:
                assert self._may_start(tenant, running[tenant], job_id)
                running[tenant] += self.rows_of[job_id]
        left = {t: lines[t][counts[t] :] for t in TENANTS}
        hungry = {t for t in TENANTS if left[t] and self._may_start(t, running[t], left[t][0])}
        if hungry:
            assert len(taken) == most  # nobody who could run waits
        for tenant in hungry - {""}:
            assert all(counts[t] <= counts[tenant] + 1 for t in TENANTS[1:])

    @precondition(lambda self: self.attempts)
    @rule(pick=picks, message=st.sampled_from(["end", "release", "renew", "crash", "cancel"]))
    def send(self, pick: int, message: str) -> None:
        """Send for any attempt there ever was: most are zombies."""
        attempt = self.attempts[pick % len(self.attempts)]
        if message == "end":
            self.driver.commit(attempt, attempt.end())
        elif message == "release":
            self.driver.release(attempt)
        elif message == "renew":
            self.driver.renew(attempt)
        elif message == "crash":
            blame = calls.Blame(attempt.job.attempt)
            self.driver.protocol.run(calls.crash(attempt.worker, [blame]))
        else:
            self.driver.cancel(attempt.job.job_id)

    @precondition(lambda self: self.tenant_of)
    @rule(pick=picks)
    def cancel(self, pick: int) -> None:
        self.driver.cancel(list(self.tenant_of)[pick % len(self.tenant_of)])

    @precondition(lambda self: self.attempts)
    @rule(picked=st.sets(picks, min_size=1, max_size=3))
    def time_passes(self, picked: set[int]) -> None:
        lost = [self.attempts[p % len(self.attempts)].job.job_id for p in picked]
        self.driver.lapse(*lost)
        self.driver.reap()
        for job_id in lost:  # its worker comes back: which machines were lost is others' subject
            self.driver.redis.hdel(self.driver.keys.job(job_id), JobField.LOSSES)

    @precondition(lambda self: self.tenant_of)
    @rule(pick=picks)
    def stock_cancel(self, pick: int) -> None:
        job_id = list(self.tenant_of)[pick % len(self.tenant_of)]
        if self.driver.state(job_id) != "queued":
            return
        self.driver.redis.lrem(self.driver.keys.rq_queue(QUEUE), 1, job_id)
        self.driver.redis.delete(f"rq:job:{job_id}")
        self.driver.protocol.run(calls.reconcile(QUEUE, [job_id], lease_ms=60_000))

    @invariant()
    def the_keys_say_what_the_jobs_are(self) -> None:
        redis, keys = self.driver.redis, self.driver.keys
        listed = self.driver.listed()
        waiting = {t: self._ids("queued", t) for t in TENANTS}
        assert sorted(listed) == sorted(set().union(*waiting.values()))
        busy = set()
        for tenant in TENANTS[1:]:
            queued, running = waiting[tenant], self._ids("running", tenant)
            assert set(self._texts(redis.smembers(keys.tenant_queued(tenant)))) == queued
            rows = self._texts(redis.smembers(keys.tenant_running(tenant)))
            assert Counter(row.partition(":")[0] for row in rows) == {
                i: self.rows_of[i] for i in running
            }
            assert sorted(self._line(tenant)) == sorted(queued)
            busy |= {tenant} if queued | running else set()
        turns = self._texts(redis.lrange(keys.turns(QUEUE), 0, -1))
        assert sorted(turns) == [t for t in TENANTS[1:] if waiting[t]]
        assert set(self._texts(redis.smembers(keys.tenants()))) == busy


@pytest.mark.usefixtures("settled_redis")
def test_tenants_in_any_order(redis_client: redis.Redis) -> None:
    CLIENT[:] = [redis_client]
    run_state_machine_as_test(
        TenantMachine,
        settings=settings(
            max_examples=EXAMPLES, stateful_step_count=30, deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip
