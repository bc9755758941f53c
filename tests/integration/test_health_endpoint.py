"""/healthz of real workers: a dead engine is red in time, an absent Redis is not."""

from __future__ import annotations

import os
import signal
import socket
import time
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest

from mlx_serving.common.errors import InvalidSettings
from mlx_serving.common.redis.local import LocalRedis
from mlx_serving.worker.status.monitor import Monitor
from tests.support.helpers import wait_until
from tests.support.monitoring import Probe
from tests.support.worker_process import (
    Hacks,
    WorkerProcess,
    check_answers,
    submit,
    wait_until_decoded,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlx_serving import Client


SOUND = Hacks()


@pytest.fixture
def server() -> Iterator[LocalRedis]:
    with LocalRedis(appendonly="always") as server:
        yield server


def worker(
    server: LocalRedis, rate: float = 100, hacks: Hacks = SOUND, **settings: Any
) -> WorkerProcess:
    return WorkerProcess(server.url, "w", rate, hacks, metrics__port=0, **settings)


def _hangs(server: LocalRedis, client: Client, stall: float, hacks: Hacks) -> float:
    """Hang an engine; return the seconds from then until the child is gone.

    `/healthz` has to be red from the stall time's 80% on, and may not be well again before the
    next child serves.
    """
    with worker(
        server, 50, hacks, engine__stall_seconds=stall, worker__lease_seconds=60
    ) as process:
        probe = Probe(process).ok()
        pid = process.child_pid
        handles = submit(client, 2, 100)
        age = wait_until(lambda: _stuck_for(probe.health()), timeout=20)
        hung_at = time.monotonic() - age
        red = wait_until(lambda: (h := probe.health())["status"] == "red" and h, timeout=stall)
        assert time.monotonic() - hung_at <= stall
        assert red["http"] == 503
        assert set(red["reasons"]) & {"engine_stalled", "child_silent"}
        wait_until(lambda: not _lives(pid), timeout=stall + 5)
        gone = time.monotonic() - hung_at
        assert probe.status() == "red"
        wait_until(lambda: probe.health()["reasons"] == ["child_restarting"])
        wait_until(lambda: probe.metric("engine_exits_total{stalled}") == 1)
        wait_until(lambda: probe.metric("crash_verdicts_total{requeued}") == 2)
        for handle in handles:
            client.cancel(handle.id)
    return gone


def _stuck_for(health: dict[str, Any]) -> float:
    """Age of the engine's progress, where it is beyond what an idle loop and a report take."""
    age = float(health["engine_progress_age_seconds"] or 0)
    return age if age > 1.2 else 0.0


def _lives(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123 -- /proc
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.quiet
def test_a_stopped_engine_thread_is_red_and_its_process_gone_in_time(
    server: LocalRedis, client: Client
) -> None:
    assert _hangs(server, client, 2.0, Hacks(block_at_step=10)) <= 2.0 + 0.5


@pytest.mark.slow
@pytest.mark.chaos
def test_a_stopped_engine_thread_with_the_default_of_10_s(
    server: LocalRedis, client: Client
) -> None:
    assert _hangs(server, client, 10.0, Hacks(block_at_step=10)) <= 10.0


@pytest.mark.quiet
def test_an_engine_that_hangs_with_the_interpreters_lock(
    server: LocalRedis, client: Client
) -> None:
    """The child's own watchdog can't run then; its parent ends it."""
    # Late enough for a report after the first step, which may take long.
    hacks = Hacks(block_at_step=60, hold_lock=True)
    assert _hangs(server, client, 3.0, hacks) <= 3.0 + 1.5


def test_redis_away_is_degraded_until_the_buffer_is_full(
    server: LocalRedis, client: Client
) -> None:
    with worker(server, rate=100, worker__buffer_tokens=1600) as process:  # 4 s of four rows
        probe = Probe(process).ok()
        handles = submit(client, 4, 2000)
        wait_until_decoded(client, handles)
        server.kill()
        away = time.monotonic()
        health = wait_until(lambda: (h := probe.health())["status"] != "ok" and h, timeout=8)
        assert (health["http"], health["status"]) == (200, "degraded")
        assert health["held_jobs"] == 4
        wait_until(lambda: "redis_unreachable" in probe.health()["reasons"], timeout=8)
        assert probe.health()["redis_failing_seconds"] > 2
        full = wait_until(lambda: (h := probe.health())["status"] == "red" and h, timeout=15)
        assert "buffer_full" in full["reasons"]
        assert full["backlog_tokens"] >= 1600
        assert full["engine_progress_age_seconds"] < 2  # it waits, and is not hung
        assert time.monotonic() - away > 3
        server.start()
        wait_until(lambda: probe.status() == "ok", timeout=15)
        assert probe.metric("redis_errors_total") > 0
        assert probe.metric("redis_failing_seconds") == 0
        for handle in handles:
            client.cancel(handle.id)


def test_a_drain_shows(server: LocalRedis, client: Client) -> None:
    with worker(server, rate=20) as process:
        probe = Probe(process).ok()
        handles = submit(client, 2, 60)
        wait_until_decoded(client, handles)
        process.terminate()
        health = wait_until(lambda: (h := probe.health())["status"] == "draining" and h)
        assert health["http"] == 200
        assert process.exit_status() == 0


def test_a_parent_that_does_not_read_stops_no_job(server: LocalRedis, client: Client) -> None:
    with WorkerProcess(server.url, "w", 200) as process:
        process.serving()
        os.kill(process.process.pid, signal.SIGSTOP)
        try:
            check_answers(client, submit(client, 8, 200), 200)
        finally:
            os.kill(process.process.pid, signal.SIGCONT)


def test_a_port_that_is_taken_names_the_setting(settings: Any) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        given = settings.replace(metrics__port=port)
        with pytest.raises(InvalidSettings, match=rf"metrics\.port: can't listen on .* {port}"):
            Monitor(given, "tally", "w")


def test_nothing_listens_unless_asked(settings: Any) -> None:
    assert Monitor(settings, "tally", "w").port is None


def test_http_as_it_should_be(settings: Any) -> None:
    monitor = Monitor(settings.replace(metrics__port=0), "tally", "w")
    with closing(socket.create_connection(("127.0.0.1", monitor.port or 0), timeout=5)) as peer:
        peer.sendall(b"GET /metrics?x=1 HTTP/1.1\r\nHost: h\r\n\r\n")
        head = peer.recv(65_536).decode()
    assert head.startswith("HTTP/1.0 200")
    assert "text/plain; version=0.0.4" in head
    for request, status in ((b"GET /x", b"404"), (b"POST /metrics", b"501"), (b"junk\r\n", b"")):
        with closing(socket.create_connection(("127.0.0.1", monitor.port or 0), 5)) as peer:
            peer.sendall(request + b" HTTP/1.1\r\n\r\n")
            assert status in peer.recv(65_536)
    monitor.stop()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", monitor.port or 0), timeout=2)
