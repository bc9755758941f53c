"""A worker that may not work: it claims nothing, says why, and hands over where it is told to."""

from __future__ import annotations

import time
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import pytest

from mlx_serving.common.worker_record import WorkerRecord
from mlx_serving.worker.status.conditions import Conditions, Rules
from tests.support.helpers import wait_until
from tests.support.monitoring import Probe
from tests.support.worker_fakes import FakeProbe
from tests.support.worker_process import (
    InProcessWorker,
    WorkerProcess,
    check_answers,
    job_events,
    submit,
    wait_until_decoded,
)

if TYPE_CHECKING:
    import redis

    from mlx_serving import Client
    from mlx_serving.common.redis.local import LocalRedis


class Backing(InProcessWorker):
    """A worker on a laptop whose plug the test pulls."""

    def __init__(self, url: str, name: str, *, hands_over: bool = False, **settings: Any) -> None:
        super().__init__(url, name, **settings)
        self.probe = FakeProbe(battery=False)
        conditions = self.child.conditions
        rules = Rules(battery=True, hands_over=hands_over)
        vars(conditions).update(vars(Conditions(rules, self.probe, every=0.02)))


def said(raw: redis.Redis, worker: str) -> dict[str, str]:
    hashed: dict[bytes, bytes] = raw.hgetall(f"mlxs:worker:{worker}")  # type: ignore[assignment]
    return {name.decode(): value.decode() for name, value in hashed.items()}


def test_it_claims_nothing_and_says_why(
    settled_redis: LocalRedis, redis_client: redis.Redis, client: Client
) -> None:
    with Backing(settled_redis.url, "laptop") as worker:
        check_answers(client, submit(client, 1, 3), 3)
        worker.probe.battery = True
        wait_until(lambda: said(redis_client, "laptop")["reasons"] == "on_battery")
        assert said(redis_client, "laptop")["state"] == "paused"
        assert redis_client.hget("rq:worker:laptop", "state") == b"suspended"
        (waiting,) = submit(client, 1, 3)
        assert not wait_until_true(lambda: bool(list(job_events(client, waiting.id))), 1.5)
        worker.probe.battery = False
        check_answers(client, [waiting], 3)
        wait_until(lambda: said(redis_client, "laptop")["state"] == "serving")


def wait_until_true(condition: Any, seconds: float) -> bool:
    """Whether it became true in that time."""
    try:
        wait_until(condition, timeout=seconds)
    except AssertionError:
        return False
    return True


def test_it_finishes_what_it_holds(settled_redis: LocalRedis, client: Client) -> None:
    with Backing(settled_redis.url, "laptop", rate=100.0) as worker:
        running = submit(client, 4, 100)
        wait_until_decoded(client, running, 4)
        worker.probe.battery = True
        check_answers(client, running, 100)
        assert {e.attempt for h in running for e in job_events(client, h.id)} == {1}


def test_it_hands_over_where_it_is_told_to(settled_redis: LocalRedis, client: Client) -> None:
    """The other worker goes on where it stopped (D4); nothing is lost, nothing comes twice."""
    url = settled_redis.url
    with Backing(url, "laptop", hands_over=True, rate=50.0) as worker:
        running = submit(client, 8, 200)
        wait_until_decoded(client, running, 4)
        worker.probe.battery = True
        wait_until(lambda: not worker.child.publisher.held())
        assert worker.child.runner.engine is not None
        wait_until(lambda: worker.child.runner.engine.running == 0)  # type: ignore[union-attr]
        with InProcessWorker(url, "studio", rate=500.0):
            check_answers(client, running, 200)
    for handle in running:
        attempts = [e for e in job_events(client, handle.id) if e.type == "attempt"]
        assert [e.worker for e in attempts] == ["laptop", "studio"]


@pytest.mark.slow
@pytest.mark.may_leak(reason="a worker that is killed at the end leaves its name in RQ's sets")
def test_a_whole_worker_keeps_its_hours(
    settled_redis: LocalRedis, redis_client: redis.Redis, client: Client
) -> None:
    """From the setting to /healthz: its hours are twelve hours from now."""
    hour = (time.localtime().tm_hour + 12) % 24
    hours = f"{hour:02}:00-{hour:02}:30"
    (waiting,) = submit(client, 1, 3)
    with WorkerProcess(
        settled_redis.url, "night", metrics__port=0, conditions__hours=hours
    ) as worker:
        probe = Probe(worker.serving())
        wait_until(lambda: probe.status() == "paused")
        health = probe.health()
        assert (health["http"], health["reasons"]) == (200, ["outside_hours"])
        assert probe.metric("health_reason{outside_hours}") == 1
        assert said(redis_client, "night")["reasons"] == "outside_hours"
        assert "worker_paused" in worker.whole_log()
        assert client.status(waiting.id).state.value == "queued"
        worker.terminate()
        assert worker.exit_status() == 0
    waiting.cancel()


def test_a_worker_says_what_it_is(
    settled_redis: LocalRedis, redis_client: redis.Redis, client: Client
) -> None:
    with InProcessWorker(settled_redis.url, "w", rate=50.0):
        submit(client, 3, 100)
        wait_until(lambda: said(redis_client, "w").get("rows") == "3")
        wait_until(lambda: float(said(redis_client, "w")["tokens_per_second"]) > 50)
        told = said(redis_client, "w")
        assert set(told) == {field.name for field in fields(WorkerRecord)} - {"name"}
        assert told["kv_tokens_used"] != "0"
        assert int(told["lease_age_ms"]) < 2000
        assert 0 < redis_client.ttl("mlxs:worker:w") <= 30
        assert settled_redis.url not in str(told)
