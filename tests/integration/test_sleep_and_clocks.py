"""What Macs do to a worker: sleep past its leases, and wall clocks that jump (D3, D5, D8)."""

from __future__ import annotations

import calendar
import os
import signal
import time
from typing import TYPE_CHECKING

import pytest

from mlx_serving import Client, JobState
from mlx_serving.common.redis.local import LocalRedis
from tests.support.helpers import wait_until
from tests.support.redis_trouble import Followers, check_results, check_view
from tests.support.worker_process import (
    LEASE_SECONDS,
    Hacks,
    WorkerProcess,
    job_events,
    submit,
)
from tests.support.wrong_clock import WrongClock

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import redis

pytestmark = pytest.mark.chaos

HOUR = 3600


@pytest.fixture
def server() -> Iterator[LocalRedis]:
    with LocalRedis(appendonly="always") as server:
        yield server


@pytest.fixture
def connection(server: LocalRedis) -> Iterator[redis.Redis]:
    with server.client() as connection:
        yield connection


def workers_of(client: Client, job_id: str) -> list[str | None]:
    return [event.worker for event in job_events(client, job_id) if event.type == "attempt"]


def test_a_worker_that_slept_past_its_leases_is_fenced_and_claims_again(
    server: LocalRedis, client: Client, connection: redis.Redis
) -> None:
    tokens = 150
    with (
        WorkerProcess(server.url, "sleeper", rate=50, batch__max_rows=8) as sleeper,
        WorkerProcess(server.url, "other", rate=30, batch__max_rows=8) as other,
    ):
        sleeper.serving()
        other.serving()
        other.signal(signal.SIGSTOP)
        followers = Followers(client, submit(client, 8, tokens))
        wait_until(lambda: min(followers.tokens()) > 5, timeout=20)
        sleeper.signal(signal.SIGSTOP)
        other.signal(signal.SIGCONT)
        wait_until(lambda: followers.attempts() == [2] * 8, timeout=20)
        sleeper.signal(signal.SIGCONT)
        # The other one's batch is full: what comes now is the woken one's.
        more = [handle.id for handle in submit(client, 8, 30)]
        check_results(client, more, 30)
        assert {worker for i in more for worker in workers_of(client, i)} == {"sleeper"}
        followers.finish()
        followers.check(tokens)
        check_results(client, followers.events, tokens)
        assert {client.result(i).worker for i in followers.events} == {"other"}
        assert sleeper.whole_log().count("job_lost") == 8
        check_view(connection, [*followers.events, *more])


def test_a_worker_that_slept_alone_goes_on_with_what_it_holds(
    server: LocalRedis, client: Client, connection: redis.Redis
) -> None:
    """Nobody took its jobs, so it does not take them from itself: no prompt is computed again."""
    tokens = 120
    with WorkerProcess(server.url, "only", rate=40, engine__stall_seconds=60) as only:
        only.serving()
        followers = Followers(client, submit(client, 8, tokens))
        wait_until(lambda: min(followers.tokens()) > 5, timeout=20)
        for _ in range(3):
            only.signal(signal.SIGSTOP)
            time.sleep(LEASE_SECONDS + 1)
            only.signal(signal.SIGCONT)
            time.sleep(0.3)
        followers.finish()
        followers.check(tokens)
        assert followers.attempts() == [1] * 8
        check_view(connection, followers.events)


def test_a_deadline_that_passes_in_sleep_ends_the_job_on_waking(
    server: LocalRedis, client: Client
) -> None:
    with WorkerProcess(server.url, "only", rate=20, engine__stall_seconds=60) as only:
        only.serving()
        handle = submit(client, 1, 1000, deadline=2.0)[0]
        wait_until(lambda: client.status(handle.id).seq > 3, timeout=20)
        only.signal(signal.SIGSTOP)
        time.sleep(LEASE_SECONDS + 1)
        woken = time.monotonic()
        only.signal(signal.SIGCONT)
        result = client.result(handle.id, timeout=10)
        assert time.monotonic() - woken < 1
        assert result.state is JobState.EXPIRED
        assert result.text.startswith("1 2 3")


def heartbeat_error(connection: redis.Redis, worker: str) -> float:
    """By how much a worker's wall clock is wrong, as its heartbeat in RQ's view shows it."""
    text = connection.hget(f"rq:worker:{worker}", "last_heartbeat")
    assert isinstance(text, bytes)
    shown = calendar.timegm(time.strptime(text[:19].decode(), "%Y-%m-%dT%H:%M:%S"))
    return shown - time.time()


def test_clocks_that_jump_change_nothing(
    server: LocalRedis, client: Client, connection: redis.Redis, tmp_path: Path
) -> None:
    """Producer, consumer and two workers, each with another wall clock that steps by hours."""
    tokens = 200
    fast, slow, ours = (tmp_path / name for name in ("fast", "slow", "ours"))
    fast.write_text(str(HOUR))
    slow.write_text(str(-HOUR))
    ours.write_text("0")
    clock = WrongClock(ours)
    with (
        WorkerProcess(server.url, "fast", 30, Hacks(clock_file=str(fast)), batch__max_rows=8) as a,
        WorkerProcess(server.url, "slow", 30, Hacks(clock_file=str(slow)), batch__max_rows=8) as b,
    ):
        a.serving()
        b.serving()
        assert heartbeat_error(connection, "fast") > HOUR - 60
        assert heartbeat_error(connection, "slow") < 60 - HOUR
        clock.start()
        try:
            followers = Followers(client, submit(client, 16, tokens))
            wait_until(lambda: min(followers.tokens()) > 5, timeout=20)
            for step in (HOUR, -HOUR, 0):
                ours.write_text(str(step))
                fast.write_text(str(-step))
                slow.write_text(str(10 * step))
                time.sleep(1.5)
            followers.finish()
        finally:
            clock.stop()
        followers.check(tokens)
        assert followers.attempts() == [1] * 16
        check_results(client, followers.events, tokens)
        check_view(connection, followers.events)


@pytest.mark.parametrize("field", ["deadline", "timeout"])
def test_times_are_exact_whatever_the_clocks_say(
    server: LocalRedis, client: Client, connection: redis.Redis, tmp_path: Path, field: str
) -> None:
    """A job ends within 0.3 s after its time, by Redis's clock, running or queued."""
    worker_clock, ours = tmp_path / "worker", tmp_path / "ours"
    worker_clock.write_text(str(HOUR))
    ours.write_text(str(-HOUR))
    clock = WrongClock(ours)
    hacks = Hacks(clock_file=str(worker_clock))
    with WorkerProcess(server.url, "only", 20, hacks, batch__max_rows=4) as worker:
        worker.serving()
        clock.start()
        try:
            running = [h.id for h in submit(client, 4, 1000, **{field: 2.0})]
            wait_until(lambda: min(client.status(i).seq for i in running) > 2, timeout=20)
            worker_clock.write_text(str(-HOUR))
            ours.write_text(str(HOUR))
            queued = [h.id for h in submit(client, 4, 1000, deadline=1.0)]
            results = [client.result(i, timeout=10) for i in running + queued]
        finally:
            clock.stop()
        assert {result.state for result in results} == {JobState.EXPIRED}
        for job_id in running + queued:
            record = client.status(job_id)
            begins = record.started_ms if field == "timeout" else record.enqueued_ms
            due = record.enqueued_ms + 1000 if job_id in queued else begins + 2000
            late = record.finished_ms - due
            print(f"{field}: {late} ms late")  # noqa: T201 -- a figure
            # A queued one is looked for every reaping interval, 0.3 s here, in a loop of 1 s.
            assert 0 <= late < (1500 if job_id in queued else 300)
        assert connection.zcard("mlxs:deadlines") == 0


def test_nothing_of_a_worker_depends_on_when_it_was_stopped(
    server: LocalRedis, client: Client, connection: redis.Redis
) -> None:
    """Stops shorter and longer than a lease, on two workers in turn, all through the work."""
    tokens = 100
    with (
        WorkerProcess(server.url, "first", rate=40, engine__stall_seconds=60) as first,
        WorkerProcess(server.url, "second", rate=40, engine__stall_seconds=60) as second,
    ):
        pids = [worker.serving().child_pid for worker in (first, second)]
        followers = Followers(client, submit(client, 48, tokens))
        wait_until(lambda: max(followers.tokens()) > 2, timeout=20)
        for number, seconds in enumerate((0.3, 1.0, LEASE_SECONDS + 1, 0.5, LEASE_SECONDS + 1)):
            os.kill(pids[number % 2], signal.SIGSTOP)
            time.sleep(seconds)
            os.kill(pids[number % 2], signal.SIGCONT)
            time.sleep(0.1)
        followers.finish()
        followers.check(tokens)
        check_results(client, followers.events, tokens)
        check_view(connection, followers.events)
