"""/metrics and logs of real workers: what was done is what is counted."""

from __future__ import annotations

import json
import os
import signal
from typing import TYPE_CHECKING, Any

import pytest

from mlx_serving import Client
from mlx_serving.common.protocol.client import Protocol
from mlx_serving.common.protocol.keys import Keys
from mlx_serving.common.redis.local import LocalRedis
from mlx_serving.worker.delivery import measured_protocol
from mlx_serving.worker.delivery.measured_protocol import QueueWatch
from mlx_serving.worker.status.counters import Counters
from tests.support.helpers import wait_until
from tests.support.monitoring import Probe
from tests.support.worker_process import (
    WorkerProcess,
    check_answers,
    submit,
    wait_until_decoded,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    import redis

    from mlx_serving.common.settings import Settings

REPORTED = 3.0  # seconds for a count to show; reports come every 0.5 s


@pytest.fixture
def server() -> Iterator[LocalRedis]:
    with LocalRedis(appendonly="always") as server:
        yield server


def worker(server: LocalRedis, rate: float = 100, **settings: Any) -> WorkerProcess:
    return WorkerProcess(server.url, "w", rate, metrics__port=0, **settings)


def test_what_is_counted_is_what_was_done(server: LocalRedis, client: Client) -> None:
    with worker(server) as process:
        probe = Probe(process)
        assert probe.health()["http"] in {200, 503}  # answers before the engine is up
        process.serving()
        wait_until(lambda: probe.status() == "ok")
        handles = submit(client, 6, 300) + submit(client, 2, 300, stop=[" 200"])
        wait_until_decoded(client, handles)
        during = wait_until(lambda: (m := probe.metrics())["num_requests_running"] == 8 and m)
        assert during["leases_held"] == 8
        assert 0 < during["kv_cache_usage_perc"] <= 1
        assert 0 < during["generation_tokens_total"] < 8 * 300
        assert during["queue_oldest_age_seconds{tally:default}"] >= 0
        check_answers(client, handles[:6], 300)
        stopped = [client.result(h.id, timeout=10) for h in handles[6:]]
        wait_until(lambda: probe.metric("jobs_ended_total{finished}") == 8, timeout=REPORTED)
        samples = probe.metrics()
        tokens = 6 * 300 + sum(len(r.token_ids) for r in stopped)
        assert samples["generation_tokens_total"] == tokens
        assert samples["prompt_tokens_total"] == 8
        assert samples["request_success_total{length}"] == 6
        assert samples["request_success_total{stop}"] == 2
        assert samples["claims_total{first}"] == 8
        for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time"):
            assert samples[f"{name}_seconds_count"] == 8
        assert samples["inter_token_latency_seconds_count"] == tokens - 8
        # A token every 10 ms, whatever else this machine does.
        assert samples["inter_token_latency_seconds_sum"] >= 0.01 * (300 - 1) * 6
        assert samples["commit_latency_seconds_count"] > 8
        assert samples["leases_held"] == samples["num_requests_running"] == 0
        assert samples["engine_info{none,simulated,none,simulated,w}"] == 1


def test_the_depth_and_age_of_a_queue_that_nobody_serves(
    server: LocalRedis, client: Client
) -> None:
    with worker(server, rate=5, batch__max_rows=1) as process:
        probe = Probe(process).ok()
        handles = submit(client, 1, 200)
        wait_until_decoded(client, handles)
        handles += submit(client, 5, 200, lane="bulk")
        samples = wait_until(
            lambda: (m := probe.metrics()).get("queue_depth{tally:bulk}") == 5 and m, timeout=12
        )
        assert samples["queue_depth{tally:default}"] == 0
        assert samples["queue_oldest_age_seconds{tally:default}"] > 0  # it runs
        assert samples["queue_oldest_age_seconds{tally:interactive}"] == 0
        for handle in handles:
            client.cancel(handle.id)


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


def test_a_fenced_write_and_a_takeover_are_counted(server: LocalRedis, client: Client) -> None:
    with worker(server, rate=50) as process:
        probe = Probe(process).ok()
        handles = submit(client, 2, 150)
        wait_until_decoded(client, handles)
        process.signal(signal.SIGSTOP)
        with WorkerProcess(server.url, "other", 100, metrics__port=0) as other:
            its = Probe(other).ok()
            wait_until(lambda: its.metric("claims_total{later}") == 2, timeout=20)
            assert its.metric("takeovers_total{requeued}") == 2
            process.signal(signal.SIGCONT)
            check_answers(client, handles, 150)
            wait_until(lambda: probe.metric("fenced_writes_total") >= 2, timeout=10)


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


def test_a_policy_that_is_changed_under_a_worker_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured_protocol, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(measured_protocol, "POLICY_SECONDS", 0.0)
    with LocalRedis(options={"maxmemory": "50mb"}) as server, server.client() as admin:
        counters = Counters()
        watch = QueueWatch(Protocol(admin, Keys()), ["tally:default"], counters)
        seen = []
        for policy in ("noeviction", "allkeys-lru", "noeviction"):
            admin.config_set("maxmemory-policy", policy)
            watch.look()
            seen.append(counters.redis_evicts)
        assert seen == [False, True, False]


def test_a_queue_of_a_foreign_type_hides_no_other(
    settings: Settings, redis_client: redis.Redis
) -> None:
    keys, counters = Keys(), Counters()
    redis_client.set(keys.rq_queue("tally:bulk"), "odd", ex=60)
    with Client(settings=settings) as client:
        (handle,) = submit(client, 1, 5)
    queues = ["tally:bulk", "tally:default"]
    watch = QueueWatch(Protocol(redis_client, keys), queues, counters)
    watch.look()
    assert list(counters.queues) == ["tally:default"]
    depth, age = counters.queues["tally:default"]
    assert depth == 1
    assert 0 <= age < 30
    redis_client.delete(keys.rq_queue("tally:default"))
    watch.look()  # not due yet
    assert counters.queues["tally:default"] == (depth, age)
    assert handle.id
