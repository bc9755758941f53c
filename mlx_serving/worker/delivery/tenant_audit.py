"""Checks tenants' sets of jobs against the jobs, a page at a time: limits are counted by them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import redis
import structlog

from mlx_serving.common.protocol import calls

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlx_serving.common.protocol.client import Protocol

    Page = tuple[str, list[bytes | str]]

log = structlog.get_logger(__name__)

PAGE_JOBS: Final = 256


class TenantAudit:
    """Goes round all tenants, one page of one set a look.

    The scripts keep the sets right in the same step as the jobs; what is off is a foreign hand's,
    or an older worker's, whose scripts know no tenants.

    Raises:
        redis.RedisError: from `look`, where Redis is away; the next look begins anew.

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
        try:
            tenants = self._protocol.redis.smembers(keys.tenants())
        except redis.ResponseError as error:
            log.warning("tenants_unreadable", error=type(error).__name__)
            return
        for raw in sorted(tenants):
            tenant = raw.decode(errors="replace") if isinstance(raw, bytes) else raw
            yield tenant, []  # whether it has any jobs, and whether its sets are sets
            for key in (keys.tenant_queued(tenant), keys.tenant_running(tenant)):
                yield from ((tenant, ids) for ids in self._pages_of(key))

    def _pages_of(self, key: str) -> Iterator[list[bytes | str]]:
        cursor = -1
        while cursor:
            cursor, ids = self._protocol.redis.sscan(key, max(cursor, 0), count=PAGE_JOBS)
            if ids:
                yield [*ids]
