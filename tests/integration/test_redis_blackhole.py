"""A network that goes silent for 20 s without closing anything (D10, D5)."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest

from mlx_serving.common.redis.local import LocalRedis
from tests.support.helpers import wait_until
from tests.support.redis_trouble import Followers, check_results, check_view
from tests.support.worker_process import InProcessWorker, WorkerProcess, submit

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlx_serving import Client
    from tests.support.lossy_proxy import LossyProxy

pytestmark = pytest.mark.chaos

BUFFER_TOKENS = 1000
ROWS = 16


@pytest.fixture
def server() -> Iterator[LocalRedis]:
    with LocalRedis(appendonly="always") as server:
        yield server


@pytest.mark.slow
def test_decode_goes_on_to_its_bound_and_nothing_is_lost(
    server: LocalRedis, proxy: LossyProxy, client: Client
) -> None:
    """Both workers are cut off for longer than ten leases; each job ends in its first attempt."""
    tokens, seconds = 400, 20
    bounds: dict[str, Any] = {"worker__buffer_tokens": BUFFER_TOKENS, "batch__max_rows": ROWS}
    with (
        WorkerProcess(proxy.url, "first", 25, **bounds) as a,
        WorkerProcess(proxy.url, "second", 25, **bounds) as b,
    ):
        a.serving()
        b.serving()
        handles = submit(client, 2 * ROWS, tokens)
        followers = Followers(client, handles)
        wait_until(lambda: min(followers.tokens()) > 5, timeout=20)
        with proxy.blackhole():
            before = sum(followers.tokens())
            time.sleep(seconds)
            assert sum(followers.tokens()) - before < 2 * ROWS * 5  # it was silent
        # Freely decoding they would have come to 2 x 16 x 25 x 20 = 16,000.
        time.sleep(7)  # a read that hangs is given up after 5 s, then back-off
        decoded = sum(followers.tokens()) - before
        print(f"decoded in the blackhole and 7 s after it: {decoded}")  # noqa: T201 -- a figure
        assert decoded >= 2 * BUFFER_TOKENS
        assert decoded <= 2 * (BUFFER_TOKENS + ROWS * 25 * 8)
        assert (a.process.poll(), b.process.poll()) == (None, None)
        followers.finish()
        followers.check(tokens)
        check_results(client, followers.events, tokens)
        print(f"takeovers: {sum(followers.attempts()) - 2 * ROWS}")  # noqa: T201 -- a figure
        assert followers.attempts() == [1] * 2 * ROWS
        with server.client() as connection:
            check_view(connection, followers.events)


def test_what_is_in_flight_is_bounded(proxy: LossyProxy, client: Client) -> None:
    """The engine decodes to the bound, then pauses, which is no stall; it goes on after."""
    tokens, bound = 300, 200
    with InProcessWorker(proxy.url, rate=100, worker__buffer_tokens=bound) as worker:
        handles = submit(client, 8, tokens)
        followers = Followers(client, handles)
        wait_until(lambda: min(followers.tokens()) > 5)
        publisher, runner = worker.child.publisher, worker.child.runner
        with proxy.blackhole():
            wait_until(lambda: publisher.backlog >= bound, what="the bound")
            paused_at = publisher.backlog
            assert paused_at <= bound + 8  # one step of the batch
            deadline = time.monotonic() + 2
            while time.monotonic() < deadline:
                assert publisher.backlog == paused_at
                assert runner.stalled_for < 1
                time.sleep(0.02)
        followers.finish()
        followers.check(tokens)
        assert publisher.backlog == 0
