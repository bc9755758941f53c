"""A claim that ran and whose reply was lost: its jobs are asked for, and run (D1)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import redis

from mlx_serving.worker.engine.simulated import SimulatedEngine
from tests.integration.test_several_models import TOKENS, ModelsWorker
from tests.support.helpers import wait_until
from tests.support.worker_process import InProcessWorker, check_answers, submit

if TYPE_CHECKING:
    from mlx_serving import Client
    from mlx_serving.common.redis.local import LocalRedis
    from tests.support.protocol_driver import Driver


class LostReply:
    """Lets the next claim that takes jobs run, and raises; then Redis is away for some calls."""

    def __init__(self, worker: InProcessWorker, away: int = 0) -> None:
        self._dispatcher, self._away = worker.child.dispatcher, away
        self.lost: list[str] = []
        self.armed = False
        self._run, self._chores = worker.child.protocol.run, self._dispatcher._chores
        worker.child.protocol.run = self._lossy  # type: ignore[method-assign]
        self._dispatcher._chores = self._cut_off  # type: ignore[method-assign]

    def _lossy(self, call: Any) -> Any:
        reply = self._run(call)
        if self.armed and call.script == "claim" and reply.jobs and not self.lost:
            self.lost = [job.job_id for job in reply.jobs]
            raise redis.ConnectionError("the reply was lost")
        return reply

    def _cut_off(self) -> None:
        if self.lost and self._away:
            self._away -= 1
            raise redis.ConnectionError("away")
        self._chores()


@pytest.mark.parametrize("away", [0, 2])
def test_its_jobs_run_at_once(client: Client, settled_redis: LocalRedis, away: int) -> None:
    with InProcessWorker(settled_redis.url, worker__lease_seconds=30.0) as worker:
        lost = LostReply(worker, away)
        lost.armed = True
        jobs = submit(client, 3, TOKENS)
        check_answers(client, jobs, TOKENS)  # well within the lease
        assert lost.lost
        assert {client.result(job.id).attempts for job in jobs} == {1}


def test_its_model_does_not_leave_meanwhile(client: Client, settled_redis: LocalRedis) -> None:
    """A job waits for the other model, and nothing but the lost claim keeps this one."""
    worker = ModelsWorker(settled_redis.url, "w1", "big", worker__lease_seconds=30.0)
    lost = LostReply(worker, away=1)
    with worker:
        wait_until(lambda: worker.resident == ("tally",))
        lost.armed = True
        jobs = submit(client, 1, TOKENS, model="big") + submit(client, 1, TOKENS)
        check_answers(client, jobs, TOKENS)
    assert lost.lost
    assert {client.result(job.id).attempts for job in jobs} == {1}


def test_a_drain_hands_them_back(client: Client, settled_redis: LocalRedis, driver: Driver) -> None:
    with InProcessWorker(settled_redis.url, worker__lease_seconds=30.0) as worker:
        assert worker.child.runner.ready.wait(10)
        lost = LostReply(worker)
        lost.armed = True
        jobs = submit(client, 3, TOKENS)
        wait_until(lambda: lost.lost)
        worker.drain()
    left = [job.id for job in jobs if driver.state(job.id) == "running"]
    assert left == []
    for job in jobs:
        client.cancel(job.id)


def test_a_job_that_the_engine_lost_is_given_back(
    client: Client, settled_redis: LocalRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its row vanishes from the engine without an output; the job runs again, uncharged."""
    lost: list[str] = []
    add = SimulatedEngine.add

    def forgetful(engine: SimulatedEngine, request: Any) -> None:
        add(engine, request)
        if not lost:
            lost.append(request.id)
            engine.abort(request.id)

    monkeypatch.setattr(SimulatedEngine, "add", forgetful)
    with InProcessWorker(settled_redis.url, worker__lease_seconds=30.0):
        jobs = submit(client, 2, TOKENS)
        check_answers(client, jobs, TOKENS)
    attempts = {job.id: client.result(job.id).attempts for job in jobs}
    assert sorted(attempts.values()) == [1, 2]
    assert attempts[lost[0].partition(":")[0]] == 2
