"""Planned replacement of the engine child: jobs in hand go on, nobody is charged, no alarm."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.helpers import wait_until
from tests.support.monitoring import Probe
from tests.support.worker_process import WorkerProcess, check_answers, job_events, submit

if TYPE_CHECKING:
    from mlx_serving import Client
    from mlx_serving.common.redis.local import LocalRedis

pytestmark = pytest.mark.may_leak(
    reason="a worker that is killed at the end leaves its name in RQ's sets"
)


def test_a_child_that_decoded_enough_is_replaced_and_its_jobs_go_on(
    settled_redis: LocalRedis, client: Client
) -> None:
    tokens = 240  # 0.9 s from the limit to the last token, and age is looked at twice a second
    with WorkerProcess(
        settled_redis.url, "w", rate=100, metrics__port=0, engine__recycle_after_tokens=1000,
        worker__drain_seconds=0.2,
    ) as worker:  # fmt: skip
        first = worker.serving().child_pid
        probe = Probe(worker)
        handles = submit(client, 8, tokens)
        assert worker.next_child() != first
        check_answers(client, handles, tokens)
        attempts = [
            sum(event.type == "attempt" for event in job_events(client, handle.id))
            for handle in handles
        ]
        assert attempts == [2] * 8, "they were in hand, and went on"
        assert {client.status(handle.id).attempts for handle in handles} == {0}  # not charged
        wait_until(lambda: probe.status() == "ok")
        found = probe.metrics()
        assert found["recycles_total{tokens}"] == 1
        assert found["engine_exits_total{recycled}"] == 1
        assert found["hand_offs_total"] == 8
        log = worker.whole_log()
        assert "child_recycled" in log
        assert "child_died" not in log
        worker.terminate()
        assert worker.exit_status() == 0


def test_who_asks_for_the_end_meanwhile_gets_it(settled_redis: LocalRedis, client: Client) -> None:
    with WorkerProcess(
        settled_redis.url, "w", rate=50, engine__recycle_after_tokens=20, worker__drain_seconds=3
    ) as worker:
        worker.serving()
        submit(client, 1, 100)
        wait_until(lambda: "recycled_for" in worker.whole_log(), what="it drains")
        worker.terminate()
        assert worker.exit_status() == 0
        assert "child_recycled" not in worker.whole_log()
