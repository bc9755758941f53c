"""/healthz and /metrics of real workers: what was done is what is counted; a dead engine is red."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest

from mlx_serving import Client
from mlx_serving.common.errors import InvalidSettings
from mlx_serving.common.local_redis import LocalRedis
from mlx_serving.worker.monitor import Monitor
from tests.helpers import wait_until
from tests.monitoring import Probe
from tests.worker_process import (
    Hacks,
    WorkerProcess,
    check_answers,
    decoded,
    quick_settings,
    submit,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlx_serving.producer.handles import JobHandle

pytestmark = pytest.mark.chaos
SOUND = Hacks()
REPORTED = 3.0  # seconds for a count to show; reports come every 0.5 s


@pytest.fixture
def server() -> Iterator[LocalRedis]:
    with LocalRedis(appendonly="always") as server:
        yield server


@pytest.fixture
def client(server: LocalRedis) -> Iterator[Client]:
    with Client(settings=quick_settings(server.url)) as client:
        yield client


def worker(server: LocalRedis, rate: float = 100, hacks: Hacks = SOUND, **settings: Any) -> Any:
    return WorkerProcess(server.url, "w", rate, hacks, metrics_port=0, **settings)


def begun(client: Client, handles: list[JobHandle], tokens: int = 3) -> bool:
    return min(decoded(client, handles)) >= tokens


def test_what_is_counted_is_what_was_done(server: LocalRedis, client: Client) -> None:
    with worker(server) as process:
        probe = Probe(process)
        assert probe.health()["http"] in {200, 503}  # answers before the engine is up
        process.serving()
        wait_until(lambda: probe.status() == "ok")
        handles = submit(client, 6, 150) + submit(client, 2, 150, stop=[" 40"])
        wait_until(lambda: begun(client, handles))
        during = wait_until(lambda: (m := probe.metrics())["leases_held"] == 8 and m)
        assert during["num_requests_running"] == 8
        assert 0 < during["kv_cache_usage_perc"] <= 1
        assert 0 < during["generation_tokens_total"] < 8 * 150
        assert during["queue_oldest_age_seconds{tally:default}"] >= 0
        check_answers(client, handles[:6], 150)
        stopped = [client.result(h.id, timeout=10) for h in handles[6:]]
        wait_until(lambda: probe.metric("jobs_ended_total{finished}") == 8, timeout=REPORTED)
        samples = probe.metrics()
        tokens = 6 * 150 + sum(len(r.token_ids) for r in stopped)
        assert samples["generation_tokens_total"] == tokens
        assert samples["prompt_tokens_total"] == 8
        assert samples["request_success_total{length}"] == 6
        assert samples["request_success_total{stop}"] == 2
        assert samples["claims_total{first}"] == 8
        for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time"):
            assert samples[f"{name}_seconds_count"] == 8
        assert samples["inter_token_latency_seconds_count"] == tokens - 8
        # A token every 10 ms, whatever else this machine does.
        assert samples["inter_token_latency_seconds_sum"] >= 0.01 * (150 - 1) * 6
        assert samples["commit_latency_seconds_count"] > 8
        assert samples["leases_held"] == samples["num_requests_running"] == 0
        assert samples["engine_info{none,simulated,none,simulated,w}"] == 1


def test_the_depth_and_age_of_a_queue_that_nobody_serves(
    server: LocalRedis, client: Client
) -> None:
    with worker(server, rate=5, max_batch_rows=1) as process:
        probe = Probe(process).ok()
        handles = submit(client, 1, 200)
        wait_until(lambda: begun(client, handles))
        handles += submit(client, 5, 200, lane="bulk")
        samples = wait_until(
            lambda: (m := probe.metrics()).get("queue_depth{tally:bulk}") == 5 and m, timeout=12
        )
        assert samples["queue_depth{tally:default}"] == 0
        assert samples["queue_oldest_age_seconds{tally:default}"] > 0  # it runs
        assert samples["queue_oldest_age_seconds{tally:interactive}"] == 0
        for handle in handles:
            client.cancel(handle.id)


def _hangs(server: LocalRedis, client: Client, stall: float, hacks: Hacks) -> float:
    """Hang an engine; return the seconds from then until the child is gone.

    `/healthz` has to be red from the stall time's 80% on, and may not be well again before the
    next child serves.
    """
    with worker(server, 50, hacks, engine_stall_seconds=stall, lease_seconds=60) as process:
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
        wait_until(lambda: probe.metric("engine_exits_total{crashed}") == 1)
        wait_until(lambda: probe.metric("crash_verdicts_total{charged}") == 2)
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


def test_a_stopped_engine_thread_is_red_and_its_process_gone_in_time(
    server: LocalRedis, client: Client
) -> None:
    assert _hangs(server, client, 2.0, Hacks(block_at_step=10)) <= 2.0 + 0.5


@pytest.mark.slow
def test_a_stopped_engine_thread_with_the_default_of_10_s(
    server: LocalRedis, client: Client
) -> None:
    assert _hangs(server, client, 10.0, Hacks(block_at_step=10)) <= 10.0


def test_an_engine_that_hangs_with_the_interpreters_lock(
    server: LocalRedis, client: Client
) -> None:
    """The child's own watchdog can't run then; its parent ends it."""
    hacks = Hacks(block_at_step=10, hold_lock=True)
    assert _hangs(server, client, 3.0, hacks) <= 3.0 + 1.5


def test_counters_survive_a_child_and_what_it_took_over_shows(
    server: LocalRedis, client: Client
) -> None:
    with worker(server, rate=50) as process:
        probe = Probe(process).ok()
        handles = submit(client, 4, 200)
        wait_until(lambda: probe.metric("generation_tokens_total") >= 40, timeout=20)
        before = probe.metrics()
        os.kill(process.child_pid, signal.SIGKILL)
        wait_until(lambda: probe.status() == "red", timeout=2)
        wait_until(lambda: probe.status() == "ok", timeout=20)
        check_answers(client, handles, 200)
        wait_until(lambda: probe.metric("jobs_ended_total{finished}") == 4, timeout=REPORTED)
        after = probe.metrics()
    assert after["generation_tokens_total"] >= before["generation_tokens_total"]
    assert after["engine_restarts_total"] == after["engine_exits_total{killed}"] == 1
    assert after["claims_total{first}"] == after["claims_total{later}"] == 4
    assert after["resumes_total"] == after["time_to_first_token_seconds_count"] == 4
    # What was committed was not decoded again; a report and a flush may be missing.
    assert after["resumed_tokens_total"] >= before["generation_tokens_total"] - 4 * 10
    assert after["crash_verdicts_total{charged}"] == 0
    assert after["crash_verdicts_total{requeued}"] == 4


def test_redis_away_is_degraded_until_the_buffer_is_full(
    server: LocalRedis, client: Client
) -> None:
    with worker(server, rate=100, buffer_tokens=3000) as process:
        probe = Probe(process).ok()
        handles = submit(client, 4, 2000)
        wait_until(lambda: begun(client, handles))
        server.kill()
        away = time.monotonic()
        health = wait_until(lambda: (h := probe.health())["status"] != "ok" and h, timeout=8)
        assert (health["http"], health["status"]) == (200, "degraded")
        assert health["held_jobs"] == 4
        wait_until(lambda: "redis_unreachable" in probe.health()["reasons"], timeout=8)
        assert probe.health()["redis_failing_seconds"] > 2
        full = wait_until(lambda: (h := probe.health())["status"] == "red" and h, timeout=15)
        assert "buffer_full" in full["reasons"]
        assert full["backlog_tokens"] >= 3000
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
        wait_until(lambda: begun(client, handles))
        process.terminate()
        health = wait_until(lambda: (h := probe.health())["status"] == "draining" and h)
        assert health["http"] == 200
        assert process.exit_status() == 0


def test_a_fenced_write_and_a_takeover_are_counted(server: LocalRedis, client: Client) -> None:
    with worker(server, rate=50) as process:
        probe = Probe(process).ok()
        handles = submit(client, 2, 150)
        wait_until(lambda: begun(client, handles))
        process.signal(signal.SIGSTOP)
        with WorkerProcess(server.url, "other", 100, metrics_port=0) as other:
            its = Probe(other).ok()
            wait_until(lambda: its.metric("claims_total{later}") == 2, timeout=20)
            assert its.metric("takeovers_total{requeued}") == 2
            process.signal(signal.SIGCONT)
            check_answers(client, handles, 150)
            wait_until(lambda: probe.metric("fenced_writes_total") >= 2, timeout=10)


def test_a_parent_that_does_not_read_stops_no_job(server: LocalRedis, client: Client) -> None:
    with WorkerProcess(server.url, "w", 200) as process:
        process.serving()
        os.kill(process.process.pid, signal.SIGSTOP)
        try:
            check_answers(client, submit(client, 8, 200), 200)
        finally:
            os.kill(process.process.pid, signal.SIGCONT)


def test_every_record_on_a_job_names_job_attempt_and_trace(
    server: LocalRedis, client: Client
) -> None:
    trace = f"00-{'a' * 32}-{'b' * 16}-01"
    with worker(server, rate=100) as process:
        process.serving()
        traced = submit(client, 1, 50, traceparent=trace)
        plain = submit(client, 1, 50, prompt="hush-hush")
        check_answers(client, traced + plain, 50)
        wait_until(lambda: process.whole_log().count('"job_ended"') == 2, timeout=REPORTED)
        text = process.whole_log()
    records = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    about = {
        (r["event"], r["job_id"]): r for r in records if r["event"] in {"job_started", "job_ended"}
    }
    assert len(about) == 4
    assert {r["attempt"] for r in about.values()} == {1}
    started, ended = (about[event, traced[0].id] for event in ("job_started", "job_ended"))
    assert started["trace_id"] == ended["trace_id"] == "a" * 32
    assert "trace_id" not in about["job_ended", plain[0].id]
    assert (started["prompt_tokens"], started["resumed_tokens"]) == (1, 0)
    assert (ended["state"], ended["finish_reason"]) == ("finished", "length")
    assert (ended["prompt_tokens"], ended["completion_tokens"]) == (1, 50)
    assert 0 <= ended["started_after_ms"] <= ended["first_token_after_ms"]
    assert ended["first_token_after_ms"] + 400 <= ended["ended_after_ms"]
    assert "hush" not in text
    assert not [r for r in records if "job" in r]  # one name for one thing


def test_a_port_that_is_taken_names_the_setting(settings: Any) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        given = settings.model_copy(update={"metrics_port": port})
        with pytest.raises(InvalidSettings, match=f"metrics_port: can't listen on .* {port}"):
            Monitor(given, "tally", "w")


def test_nothing_listens_unless_asked(settings: Any) -> None:
    assert Monitor(settings, "tally", "w").port is None


def test_http_as_it_should_be(settings: Any) -> None:
    monitor = Monitor(settings.model_copy(update={"metrics_port": 0}), "tally", "w")
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
