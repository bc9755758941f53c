"""SIGTERM (D9): finish what ends in time, hand the rest over, exit 0; a second one at once."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING

import pytest
from rq.command import send_shutdown_command

from mlx_serving import Client
from tests.support.helpers import wait_until
from tests.support.worker_process import (
    WorkerProcess,
    check_answers,
    decoded,
    job_events,
    quick_settings,
    submit,
    wait_until_decoded,
)

if TYPE_CHECKING:
    import redis

    from mlx_serving.common.redis.local import LocalRedis
    from mlx_serving.producer.handles import JobHandle


pytestmark = pytest.mark.may_leak(
    reason="a worker that is killed at the end leaves its name in RQ's sets"
)


def attempts(client: Client, handles: list[JobHandle]) -> set[int]:
    return {sum(e.type == "attempt" for e in job_events(client, h.id)) for h in handles}


def test_jobs_that_end_within_the_grace_time_finish_and_the_rest_is_handed_over(
    settled_redis: LocalRedis, client: Client
) -> None:
    url = settled_redis.url
    with WorkerProcess(url, "first", rate=50, worker__drain_seconds=2.0) as first:
        first.serving()
        short, long = submit(client, 16, 50), submit(client, 16, 400)
        wait_until_decoded(client, short + long)
        first.terminate()
        late = submit(client, 4, 20)
        assert first.exit_status() == 0
        assert {client.status(h.id).state.value for h in short} == {"finished"}
        assert {client.result(h.id).worker for h in short} == {"first"}
        assert {client.status(h.id).state.value for h in long + late} == {"queued"}
        before = list(decoded(client, long))
        assert min(before) > 60
        with WorkerProcess(url, "second", rate=500) as second:
            second.serving()
            check_answers(client, short, 50)
            check_answers(client, long, 400)
            check_answers(client, late, 20)
        assert (attempts(client, short), attempts(client, long)) == ({1}, {2})
        assert {client.status(h.id).attempts for h in long} == {0}


@pytest.mark.parametrize("how", ["twice", "no grace"])
def test_a_second_signal_or_no_grace_hands_over_at_once(
    settled_redis: LocalRedis, client: Client, how: str
) -> None:
    grace = 60.0 if how == "twice" else 0.0
    with WorkerProcess(settled_redis.url, "first", 50, worker__drain_seconds=grace) as first:
        first.serving()
        handles = submit(client, 8, 1000)
        wait_until_decoded(client, handles)
        first.terminate()
        if how == "twice":
            wait_until(lambda: "draining" in first.log())
            time.sleep(0.2)
            assert first.child_lives()
            first.terminate()
        assert first.exit_status(timeout=3) == 0
        assert {client.status(h.id).state.value for h in handles} == {"queued"}
        # Nothing decoded was dropped: every stream is one run of numbers from 1.
        for handle in handles:
            deltas = [d for e in job_events(client, handle.id) for d in e.choices]
            tokens = [t for d in deltas for t in d.token_ids]
            assert tokens == list(range(1, len(tokens) + 1))
        for handle in handles:
            client.cancel(handle.id)


def test_one_signal_to_the_whole_process_group_is_one_signal(
    settled_redis: LocalRedis, client: Client
) -> None:
    """As systemd (KillMode=control-group) and a terminal's Ctrl-C do it."""
    with WorkerProcess(settled_redis.url, "first", 50, worker__drain_seconds=20) as first:
        first.serving()
        handles = submit(client, 4, 60)
        wait_until_decoded(client, handles)
        os.killpg(first.process.pid, signal.SIGTERM)
        assert first.exit_status() == 0
        assert {client.status(h.id).state.value for h in handles} == {"finished"}


def test_an_idle_worker_leaves_at_once_and_without_a_trace(
    settled_redis: LocalRedis, redis_client: redis.Redis
) -> None:
    with WorkerProcess(settled_redis.url, "idle") as worker:
        worker.serving()
        worker.terminate()
        assert worker.exit_status(timeout=5) == 0
        assert redis_client.smembers("rq:workers") == set()
        assert not redis_client.exists("mlxs:worker:idle")


def test_rqs_shutdown_command_drains(
    settled_redis: LocalRedis, client: Client, redis_client: redis.Redis
) -> None:
    with WorkerProcess(settled_redis.url, "first", 100, worker__drain_seconds=20) as first:
        first.serving()
        handles = submit(client, 4, 60)
        wait_until_decoded(client, handles)
        send_shutdown_command(redis_client, "first")
        assert first.exit_status() == 0
        check_answers(client, handles, 60)


def test_a_drain_does_not_wait_for_a_redis_that_is_away(client: Client) -> None:
    from mlx_serving.common.redis.local import LocalRedis

    del client
    with (
        LocalRedis() as server,
        WorkerProcess(server.url, "first", 50, worker__drain_seconds=0.5) as first,
        Client(settings=quick_settings(server.url)) as other,
    ):
        first.serving()
        handles = submit(other, 4, 500)
        wait_until_decoded(other, handles)
        server.kill()
        first.terminate()
        assert first.exit_status(timeout=15) == 0
