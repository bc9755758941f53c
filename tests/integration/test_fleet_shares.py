"""Who gets the work: by pulling, each worker takes what it has room for of the model it holds."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import pytest

from tests.support.figures import show
from tests.support.helpers import wait_until
from tests.support.worker_process import (
    InProcessWorker,
    WorkerProcess,
    check_answers,
    job_events,
    submit,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    import redis

    from mlx_serving import Client
    from mlx_serving.common.redis.local import LocalRedis
    from mlx_serving.producer.handles import JobHandle

FAST, SLOW = 80.0, 20.0  # tokens a second of a row
TOKENS, JOBS, ROWS = 20, 160, 4
BEFORE, ENDED = 20, 120  # jobs that end before the shares are counted, and until then
TOLERANCE = 0.2


def tokens_by_worker(client: Client, handles: Sequence[JobHandle]) -> Counter[str]:
    """Tokens written so far, by the worker that decoded them."""
    found: Counter[str] = Counter()
    for handle in handles:
        worker = ""
        for event in job_events(client, handle.id):
            worker = event.worker or worker
            found[worker] += sum(len(delta.token_ids) for delta in event.choices)
    return found


@pytest.mark.slow
@pytest.mark.may_leak(reason="workers that are killed at the end leave their names in RQ's sets")
def test_unequal_workers_share_by_speed(
    settled_redis: LocalRedis, redis_client: redis.Redis, client: Client
) -> None:
    url = settled_redis.url

    def left() -> int:
        return int(redis_client.zcard("mlxs:open:tally:default"))

    with (
        WorkerProcess(url, "fast", FAST, batch__max_rows=ROWS) as fast,
        WorkerProcess(url, "slow", SLOW, batch__max_rows=ROWS) as slow,
    ):
        fast.serving()
        slow.serving()
        jobs = submit(client, JOBS, TOKENS)
        wait_until(lambda: left() <= JOBS - BEFORE)
        before = tokens_by_worker(client, jobs)
        wait_until(lambda: left() <= JOBS - ENDED, timeout=30)
        after = tokens_by_worker(client, jobs)
        assert redis_client.llen("rq:queue:tally:default") > 0  # nobody ran out of work
        share = (after["fast"] - before["fast"]) / (after["slow"] - before["slow"])
        show(f"tokens of a worker that is {FAST / SLOW:g} times as fast: {share:.2f} times as many")
        assert FAST / SLOW * (1 - TOLERANCE) <= share <= FAST / SLOW * (1 + TOLERANCE)
        check_answers(client, jobs, TOKENS)


def test_a_worker_takes_only_what_its_model_is_asked_for(
    settled_redis: LocalRedis, redis_client: redis.Redis, client: Client
) -> None:
    """Nothing is loaded for a job: it waits for a worker that has the model."""
    with InProcessWorker(settled_redis.url, "w"):
        (other,) = submit(client, 1, 5, model="other")
        check_answers(client, submit(client, 4, 5), 5)
        assert redis_client.lrange("rq:queue:other:default", 0, -1) == [other.id.encode()]
        assert redis_client.hmget(f"mlxs:job:{other.id}", "st", "ep") == [b"queued", b"0"]
        other.cancel()
