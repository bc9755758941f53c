"""Reaper, reconciler and audit: what dead workers held comes back, and what fell between.

Any worker may sweep. The scripts check everything again, so several sweepers at once do no harm.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import redis
import structlog

from mlx_serving.common.machine import machine_id
from mlx_serving.common.protocol import calls, quarantine

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlx_serving.common.protocol.client import Protocol

    Page = tuple[str, list[bytes | str]]
    from collections.abc import Sequence

    from mlx_serving.worker.delivery.measured_protocol import QueueWatch

log = structlog.get_logger(__name__)


PAGE_JOBS: Final = 256
REAP_INTERVAL_SECONDS: Final = 2.0
REAPS_A_LEASE: Final = 5
"""A lease that ran out is seen soon, measured by the lease itself."""


def reap_interval_seconds(lease_seconds: float) -> float:
    """Return the time between two looks for leases that ran out."""
    return min(REAP_INTERVAL_SECONDS, lease_seconds / REAPS_A_LEASE)


class TenantAudit:
    """Goes round all tenants, one page of one set a look.

    The scripts keep the sets right in the same step as the jobs. If one is wrong, a foreign hand
    wrote to it.

    Raises:
        redis.RedisError: from `look`, if Redis is away; the next look begins anew.

    """

    def __init__(self, protocol: Protocol) -> None:
        self._protocol = protocol
        self._pages: Iterator[Page] = iter(())

    def look(self) -> list[tuple[str, str]]:
        """Check the next page; returns what was wrong, and what it is now."""
        page = next(self._pages, None)
        if page is None:
            self._pages = self._read()
            page = next(self._pages, None)
        if page is None:
            return []
        outcomes = self._protocol.run(calls.audit(*page))
        for job_id, outcome in outcomes:
            log.warning("tenant_audited", job_id=job_id, outcome=outcome)
        return outcomes

    def _read(self) -> Iterator[Page]:
        keys = self._protocol.keys
        types = {keys.tenants(): "set"}
        read = partial(self._protocol.redis.smembers, keys.tenants())
        tenants = quarantine.mended(self._protocol.run, types, read)
        for raw in sorted(tenants):
            tenant = raw.decode(errors="replace") if isinstance(raw, bytes) else raw
            yield tenant, []  # whether it has any jobs, and whether its sets are sets
            for key in (keys.tenant_queued(tenant), keys.tenant_running(tenant)):
                yield from ((tenant, ids) for ids in self._pages_of(key))

    def _pages_of(self, key: str) -> Iterator[list[bytes | str]]:
        cursor = -1
        while cursor:
            scan = partial(self._protocol.redis.sscan, key, max(cursor, 0), count=PAGE_JOBS)
            cursor, ids = quarantine.mended(self._protocol.run, {key: "set"}, scan)
            if ids:
                yield [*ids]


REAPED_AT_ONCE: Final = 32  # jobs of each kind and queue in one call, which holds Redis meanwhile
REAP_CALLS: Final = 8  # in a row, while each ends or takes over as many jobs as it may
RECONCILE_SECONDS: Final = 5.0


LONG_SECONDS: Final = 2.0  # a main loop that was only busy comes round within it


PAGE: Final = 1000


class Sweeper:
    """Runs both at their intervals; called from the worker's main loop.

    Raises:
        redis.RedisError: from `sweep`; nothing is lost by trying again later.

    """

    def __init__(
        self,
        protocol: Protocol,
        queues: Sequence[str],
        *,
        lease_ms: int,
        reap_seconds: float,
        watch: QueueWatch | None = None,
    ) -> None:
        self._protocol, self._queues, self._lease_ms = protocol, queues, lease_ms
        self._reap_seconds, self._watch = reap_seconds, watch
        self._reaped_at = self._reconciled_at = self._hold_until = 0.0
        self._answered_at: float | None = None  # when Redis last answered a sweep
        self._audit = TenantAudit(protocol)
        self._suspicious: set[str] = set()  # queues whose counts did not add up last time

    def sweep(self) -> None:
        """Do what is due."""
        if self._watch is not None:
            self._watch.look()
        now = time.monotonic()
        if now - self._reaped_at >= self._reap_seconds:
            self._reaped_at = now
            self._reap_or_wait(now)
            self._answered_at = time.monotonic()
        if now - self._reconciled_at >= RECONCILE_SECONDS:
            self._reconciled_at = now
            for queue in self._queues:
                self.reconcile(queue)
            self._audit.look()

    def _reap_or_wait(self, now: float) -> None:
        """Reap, but not while an old lease proves nothing, since nobody could have renewed it.

        That is so for one lease after we were cut off from Redis, or slept, or were refused
        writes: others may have been, with us. A worker that has just started does not know, so it
        waits too. The script itself waits after a restart of Redis, and can't see a network, a
        failover or a full memory.
        """
        if self._answered_at is None:
            self.hold("just started")
        silent = now - (self._answered_at or now)
        if silent > max(self._lease_ms / 2000, LONG_SECONDS) + self._reap_seconds:
            self.hold(f"no answer for {silent:.1f} s")
        if now < self._hold_until:
            self._protocol.redis.ping()
            return
        try:
            self.reap()
        except redis.ResponseError as error:
            self.hold(type(error).__name__)
            raise

    def hold(self, reason: str) -> None:
        """Take no lease over for the length of one: nobody may have been able to renew it."""
        log.info("reaping_waits", reason=reason)
        self._hold_until = time.monotonic() + self._lease_ms / 1000

    def reap(self) -> list[tuple[str, str]]:
        """Take over expired leases, expire queued jobs past their deadline: a few calls' worth."""
        call = calls.reap(
            lease_ms=self._lease_ms,
            most=REAPED_AT_ONCE,
            queues=self._queues,
            machine=machine_id(),
        )
        outcomes: list[tuple[str, str]] = []
        for _ in range(REAP_CALLS):
            swept = self._protocol.run(call).outcomes
            outcomes += swept
            if len(swept) < REAPED_AT_ONCE:
                break
        for job_id, outcome in outcomes:
            log.warning("job_reaped", job_id=job_id, outcome=outcome)
            if outcome == "isolated":
                log.error("job_isolated", job_id=job_id)
        return outcomes

    def reconcile(self, queue: str) -> list[tuple[str, str]]:
        """Compare a queue's index with its list and leases; repair what is in neither.

        Counting is cheap and nearly always enough. Only a count that is off twice running
        (once may be a job on its way) makes it read the ids.
        """
        indexed, *held = self._read(queue, "ZCARD", "LLEN")
        if indexed == sum(held):
            self._suspicious.discard(queue)
            return []
        if queue not in self._suspicious:
            self._suspicious.add(queue)
            return []
        return self._repair(queue)

    def _read(self, queue: str, of_zset: str, of_list: str, *span: int) -> list[Any]:
        """Run a command each on the queue's index, list, leases and isolated jobs, in one step."""
        keys, types = self._protocol.keys, ("zset", "list", "zset", "zset")
        commands = (of_zset, of_list, of_zset, of_zset)
        names = (
            keys.open(queue), keys.rq_queue(queue), keys.leases(queue), keys.isolated(queue),
        )  # fmt: skip

        def read() -> list[Any]:
            pipe: Any  # redis-py's `execute_command` has no types
            with self._protocol.redis.pipeline(transaction=True) as pipe:
                for command, name in zip(commands, names, strict=True):
                    pipe.execute_command(command, name, *span)
                return list(pipe.execute())

        return quarantine.mended(self._protocol.run, dict(zip(names, types, strict=True)), read)

    def _repair(self, queue: str) -> list[tuple[str, str]]:
        indexed, *held = self._read(queue, "ZRANGE", "LRANGE", 0, -1)
        lost = sorted(set(indexed).difference(*held))  # bytes: not every id is text
        outcomes: list[tuple[str, str]] = []
        for start in range(0, len(lost), PAGE):
            call = calls.reconcile(queue, lost[start : start + PAGE], lease_ms=self._lease_ms)
            outcomes += self._protocol.run(call).outcomes
        for job_id, outcome in outcomes:
            log.warning("job_reconciled", job_id=job_id, outcome=outcome)
        return outcomes
