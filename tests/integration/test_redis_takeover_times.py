"""How long a killed worker's jobs wait (D5): claimable again, and their next token."""

from __future__ import annotations

import signal
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

from mlx_serving.common.redis.local import LocalRedis
from tests.support.helpers import wait_until
from tests.support.redis_trouble import Followers, check_results, check_view
from tests.support.worker_process import InProcessWorker, WorkerProcess, submit

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlx_serving import Client

pytestmark = [pytest.mark.chaos, pytest.mark.slow]

DEFAULTS: dict[str, Any] = {"worker__lease_seconds": 10.0}
SHORT: dict[str, Any] = {"worker__lease_seconds": 1.0}
ROUNDS, VICTIMS = 7, 3
TOKENS = 60


@pytest.fixture
def server() -> Iterator[LocalRedis]:
    with LocalRedis(appendonly="always") as server:
        yield server


def wait_for_uptime(server: LocalRedis, seconds: float) -> None:
    """After a restart of Redis nobody reaps for a lease: let that time pass."""
    with server.client() as connection:
        wait_until(lambda: connection.info("server")["uptime_in_seconds"] > seconds, timeout=20)


def killed_at(followers: Followers, *victims: WorkerProcess) -> tuple[float, int]:
    """Kill parents and children; returns when, and how many tokens there were."""
    for victim in victims:
        victim.signal(signal.SIGKILL)
    time.sleep(0.05)  # what is in a consumer's socket
    return time.monotonic() - 0.05, sum(followers.tokens())


def test_with_the_default_lease(server: LocalRedis, client: Client) -> None:
    with (
        WorkerProcess(server.url, "first", rate=5, **DEFAULTS) as first,
        WorkerProcess(server.url, "second", rate=50, **DEFAULTS) as second,
    ):
        first.serving()
        second.serving()
        wait_for_uptime(server, 12)
        second.signal(signal.SIGSTOP)
        followers = Followers(client, submit(client, 4, TOKENS))
        wait_until(lambda: min(followers.tokens()) > 3, timeout=20)
        second.signal(signal.SIGCONT)
        began, before = killed_at(followers, first)
        ids = list(followers.events)
        wait_until(lambda: all(client.status(i).owner != "first" for i in ids), timeout=20)
        claimable = time.monotonic() - began
        wait_until(lambda: sum(followers.tokens()) > before, timeout=20)
        token = time.monotonic() - began
        followers.finish()
        followers.check(TOKENS)
        check_results(client, ids, TOKENS)
        print(f"claimable after {claimable:.1f} s, next token after {token:.1f} s")  # noqa: T201
        assert claimable <= 12
        assert token <= 15
        with server.client() as connection:
            check_view(connection, ids)


def test_over_many_kills(server: LocalRedis, client: Client) -> None:
    wait_for_uptime(server, SHORT["worker__lease_seconds"] + 2)
    waits: list[float] = []
    done: list[str] = []
    for number in range(ROUNDS):
        with ExitStack() as stack:
            victims = [
                stack.enter_context(
                    WorkerProcess(server.url, f"{number}-{i}", 20, batch__max_rows=1, **SHORT)
                )
                for i in range(VICTIMS)
            ]
            for victim in victims:
                victim.serving()
            followers = Followers(client, submit(client, VICTIMS, TOKENS))
            wait_until(lambda f=followers: min(f.tokens()) > 3, timeout=20)  # type: ignore[misc]
            with InProcessWorker(server.url, f"survivor-{number}", rate=200, **SHORT):
                before = followers.tokens()
                began, _ = killed_at(followers, *victims)
                waits += times_to_next_token(followers, before, began)
                followers.finish()
        followers.check(TOKENS)
        done += followers.events
    check_results(client, done, TOKENS)
    waits.sort()
    p50, p99 = waits[len(waits) // 2], waits[-1]
    print(f"{len(waits)} kills, lease 1 s: next token p50 {p50:.2f} s, p99 (worst) {p99:.2f} s")  # noqa: T201
    # One lease, one reaping interval, one turn of the main loop, and its claim.
    assert p99 < 1.0 + 0.2 + 1.0 + 0.5
    with server.client() as connection:
        check_view(connection, done)


def times_to_next_token(followers: Followers, before: list[int], began: float) -> list[float]:
    """Seconds from the kill to each job's first token of its next attempt."""
    waits: dict[int, float] = {}

    def look() -> bool:
        for index, attempts in enumerate(followers.attempts()):
            if attempts > 1 and followers.tokens()[index] > before[index]:
                waits.setdefault(index, time.monotonic() - began)
        return len(waits) == len(before)

    wait_until(look, timeout=20)
    return list(waits.values())
