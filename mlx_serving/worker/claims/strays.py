"""Finds jobs of a claim whose reply was lost: Redis gave them to us, and we never learned it."""

from __future__ import annotations

import re
import time
from math import inf
from typing import TYPE_CHECKING, Final, cast

import redis
import structlog

from mlx_serving.common import calls

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from mlx_serving.common.protocol import Protocol

log = structlog.get_logger(__name__)

LOOK_SECONDS: Final = 0.5
ATTEMPT: Final = re.compile(r".+:\d{1,9}", re.ASCII)


class Strays:
    """Gives back, uncharged and at once, what this worker owns but does not hold.

    The lease would bring them back too, later. Where to look is RQ's set of a worker's
    executions, a view; whether a job is ours, the release script decides. `held` names the
    attempts (``request_id``) that are held now. For the thread that claims.

    Raises:
        redis.RedisError: from `give_back`; it looks again when next called.

    """

    def __init__(
        self, protocol: Protocol, worker: str, held: Callable[[], Iterable[str]], *, seconds: float
    ) -> None:
        self._protocol, self._worker, self._held, self._seconds = protocol, worker, held, seconds
        self._until = self._looked_at = -inf

    def expect(self) -> None:
        """Look from now on, for as long as a lease: a claim that hangs somewhere may run late."""
        self._until, self._looked_at = time.monotonic() + self._seconds, -inf

    @property
    def expected(self) -> bool:
        """Whether it looks; a claim under way would then look like a stray."""
        return time.monotonic() < self._until

    def give_back(self) -> None:
        """Look, where a claim failed lately."""
        now = time.monotonic()
        if not self.expected or now < self._looked_at + LOOK_SECONDS:
            return
        self._looked_at = now
        strays = self._owned().difference(self._held())
        if strays:
            self._release(sorted(strays))

    def _owned(self) -> set[str]:
        key = self._protocol.keys.rq_worker_executions(self._worker)
        try:
            names = cast("set[bytes]", self._protocol.redis.smembers(key))
        except redis.ResponseError as error:  # a foreign hand was there: the leases bring them back
            log.warning("strays_not_found", reason=str(error).partition(" ")[0])
            return set()
        found = (ATTEMPT.fullmatch(name.decode(errors="replace")) for name in names)
        return {match[0] for match in found if match}

    def _release(self, attempts: list[str]) -> None:
        """Release them last first: each goes to the front of its queue, so their order stays."""
        strays = [
            (job_id, int(epoch)) for job_id, _, epoch in (a.rpartition(":") for a in attempts)
        ]
        with self._protocol.redis.pipeline(transaction=False) as pipe:
            for job_id, _ in strays:
                pipe.hget(self._protocol.keys.job(job_id), "en")
            replies = pipe.execute(raise_on_error=False)
        ages = [int(r) if isinstance(r, bytes) and r.isdigit() else 0 for r in replies]
        rows = [(*stray, 0) for _, stray in sorted(zip(ages, strays, strict=True), reverse=True)]
        outcomes = self._protocol.run(calls.release(self._worker, rows))
        log.info("strays_given_back", jobs=outcomes.count("OK"))
