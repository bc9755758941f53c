"""Redis forgets claims that workers live by (a snapshot restored, a lost tail of the log): D1, D3.

The worker's jobs are queued again, and it claims them under the same epochs. Each must end, and
its stream must hold each token once.
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

import pytest

from mlx_serving.common.redis.local import LocalRedis
from tests.support.helpers import wait_until
from tests.support.protocol_driver import Driver
from tests.support.worker_process import InProcessWorker, WorkerProcess, check_answers, submit

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlx_serving import Client

JOBS, TOKENS = 40, 4
# Long, so that the worker claims again before it looks at what it holds.
LEASE_SECONDS = 10.0


@pytest.fixture
def server() -> Iterator[LocalRedis]:
    """Redis that keeps what it was told to save, and nothing else."""
    with LocalRedis() as server:
        yield server


def test_a_worker_claims_its_own_job_again_and_ends_it(server: LocalRedis, client: Client) -> None:
    """A step takes longer than Redis is away: the lost attempt's row is still in the engine."""
    tokens = 4
    with server.client() as connection:
        (handle,) = submit(client, 1, tokens)
        connection.save()
        with InProcessWorker(server.url, rate=1.0, worker__lease_seconds=LEASE_SECONDS) as worker:
            wait_until(lambda: client.status(handle.id).state.value == "running")
            server.restart()
            check_answers(client, [handle], tokens)
            assert worker.child.runner.in_line() == []


def test_a_snapshot_from_before_the_claims_is_restored(server: LocalRedis, client: Client) -> None:
    """By public means alone: stop the worker, submit, save, go on, kill Redis, start it again."""
    settings: dict[str, Any] = {"worker__lease_seconds": LEASE_SECONDS, "batch__max_rows": 16}
    with WorkerProcess(server.url, "w", rate=1.0, **settings) as worker:
        worker.serving().signal(signal.SIGSTOP)
        handles = submit(client, JOBS, TOKENS)
        with server.client() as connection:
            connection.save()
            worker.signal(signal.SIGCONT)
            driver = Driver(connection)
            wait_until(lambda: len(driver.leased()) == 16)
        server.restart()
        check_answers(client, handles, TOKENS)
        assert {client.result(handle.id).attempts for handle in handles} == {1}
        assert worker.process.poll() is None
