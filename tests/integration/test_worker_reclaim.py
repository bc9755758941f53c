"""A worker that claims again what it still decodes: a Mac that slept and was alone.

Its leases ended, somebody (itself, even) reaped them, and its next claim brings the same jobs
with a new epoch, while rows of the old one are in its batch and in its publisher's hands.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from tests.support.worker_process import (
    InProcessWorker,
    check_answers,
    submit,
    wait_until_decoded,
)

if TYPE_CHECKING:
    from mlx_serving import Client
    from mlx_serving.common.redis.local import LocalRedis
    from tests.support.protocol_driver import Driver


def test_jobs_taken_from_a_worker_and_claimed_by_it_again_are_right(
    client: Client, driver: Driver, settled_redis: LocalRedis
) -> None:
    tokens = 100
    with InProcessWorker(settled_redis.url, rate=50):
        handles = submit(client, 6, tokens, max_attempts=100)
        ids = [handle.id for handle in handles]
        wait_until_decoded(client, handles)
        for _ in range(8):
            driver.lapse(*ids)
            driver.reap()
            time.sleep(0.1)
        check_answers(client, handles, tokens)
        assert min(client.status(job_id).epoch for job_id in ids) >= 4


def test_a_worker_without_room_for_what_it_lost_and_got_again(
    client: Client, driver: Driver, settled_redis: LocalRedis
) -> None:
    tokens = 60
    with InProcessWorker(settled_redis.url, rate=50, batch__max_rows=2):
        handles = submit(client, 5, tokens, max_attempts=100)
        for _ in range(8):
            driver.lapse(*(handle.id for handle in handles))
            driver.reap()
            time.sleep(0.1)
        check_answers(client, handles, tokens)


@pytest.mark.parametrize("stream", [True, False])
def test_jobs_that_wait_and_stream_or_not(
    client: Client, settled_redis: LocalRedis, *, stream: bool
) -> None:
    with InProcessWorker(settled_redis.url, rate=200, batch__max_rows=4):
        handles = submit(client, 20, 40, stream=stream)
        check_answers(client, handles, 40)
