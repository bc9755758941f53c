"""Writes to Redis what a crash means for each job, and retries while Redis is away."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Final

import redis
import structlog

from mlx_serving.common.protocol import calls
from mlx_serving.common.protocol.client import Protocol
from mlx_serving.common.redis.connection import connect, resolve

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mlx_serving.common.protocol.calls import Blame
    from mlx_serving.common.settings import Settings

log = structlog.get_logger(__name__)

RETRY_SECONDS: Final = 0.5
GIVE_UP_SECONDS: Final = 120.0  # long before, leases have expired and brought the jobs back


class VerdictWriter:
    """Writes verdicts in threads of its own, so that the parent can restart its child meanwhile.

    `on_outcomes` is told how many jobs had each outcome. It connects when there is something to
    write.
    """

    def __init__(
        self,
        settings: Settings,
        model: str,
        worker: str,
        on_outcomes: Callable[[dict[str, int]], None] = lambda _: None,
    ) -> None:
        self._settings, self._model, self._worker = settings, model, worker
        self._on_outcomes = on_outcomes
        self._threads: list[threading.Thread] = []

    def write(self, blamed: Sequence[Blame]) -> None:
        """Hand the jobs back, and charge the suspects; returns at once."""
        if not blamed:
            return
        thread = threading.Thread(target=self._write, args=(blamed,), name="verdict", daemon=True)
        self._threads = [t for t in self._threads if t.is_alive()] + [thread]
        thread.start()

    def finish(self, timeout: float) -> bool:
        """Wait until all is written; False if that took longer than `timeout` seconds."""
        until = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _write(self, blamed: Sequence[Blame]) -> None:
        endpoint = resolve(self._settings, self._model)
        until = time.monotonic() + GIVE_UP_SECONDS
        with connect(endpoint) as connection:
            protocol = Protocol(connection, endpoint.keys)
            while time.monotonic() < until:
                try:
                    outcomes = protocol.run(calls.crash(self._worker, blamed))
                except redis.RedisError as error:
                    log.warning("verdict_waits", reason=type(error).__name__, jobs=len(blamed))
                    time.sleep(RETRY_SECONDS)
                else:
                    self._on_outcomes(_report(outcomes))
                    return
        log.error("verdict_given_up", jobs=len(blamed))


def _report(outcomes: list[tuple[str, str]]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for job_id, outcome in outcomes:
        counts[outcome] = counts.get(outcome, 0) + 1
        if outcome == "dead":
            log.error("job_dead", job_id=job_id, code="poison")
    log.warning("verdict", **counts)
    return counts
