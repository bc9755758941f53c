"""Lanes of one worker: a job of a higher lane gets in, and whoever gave way goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from mlx_serving.common.protocol import calls
from mlx_serving.common.states import TERMINAL
from tests.support.stepped_worker import SteppedWorker, spelled_engine, told, words

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlx_serving import Client
    from mlx_serving.common.redis.local import LocalRedis
    from mlx_serving.producer.handles import JobHandle

ROWS = 3
TEXT = "a row that is not over so soon, héllo 👋 and more"


def new_worker(settled_redis: LocalRedis, name: str = "w", capacity: int = 10_000) -> SteppedWorker:
    engine = spelled_engine(TEXT, room=(ROWS, capacity))
    return SteppedWorker(settled_redis.url, engine, words, name, batch__max_rows=ROWS)


@pytest.fixture
def worker(settled_redis: LocalRedis) -> Iterator[SteppedWorker]:
    with new_worker(settled_redis) as worker:
        yield worker


def submit(client: Client, lane: str, **fields: Any) -> JobHandle:
    given = {"model": "tally", "prompt": "a b c", "max_tokens": 99, "lane": lane}
    return client.submit(**(given | fields))


def full_of_bulk(client: Client, worker: SteppedWorker) -> list[JobHandle]:
    """One more than there are rows; those that run have decoded some tokens."""
    handles = [submit(client, "bulk") for _ in range(ROWS + 1)]
    worker.claim()
    worker.decode(5)
    assert worker.held == ROWS
    return handles


def let_in(client: Client, worker: SteppedWorker) -> JobHandle:
    """Have an interactive job take a row."""
    urgent = submit(client, "interactive")
    worker.child.dispatcher._handle("wake", "tally:interactive")
    worker.claim().claim().step()  # the first takes the reply of a claim made ahead
    assert (worker.engine.parked, worker.engine.running) == (1, ROWS)
    assert worker.held == ROWS + 1
    return urgent


def test_an_interactive_job_gets_in_and_each_stream_is_whole(
    client: Client, worker: SteppedWorker
) -> None:
    bulk = full_of_bulk(client, worker)
    urgent = let_in(client, worker)
    ended = []
    while worker.held:
        worker.decode(1)
        ended += [
            h.id for h in (urgent, *bulk) if h.id not in ended and h.status().state in TERMINAL
        ]
        worker.claim()
    assert len(ended) == ROWS + 2
    for handle in (urgent, *bulk):
        assert told(client, handle)[1] == TEXT


def test_while_a_row_is_parked_no_other_bulk_job_is_claimed(
    client: Client, worker: SteppedWorker
) -> None:
    full_of_bulk(client, worker)
    let_in(client, worker)
    worker.child.dispatcher._handle("wake", "")
    worker.claim().step()
    assert worker.held == ROWS + 1
    worker.finish()


@pytest.mark.parametrize("how", ["kill", "hand over"])
def test_a_parked_row_goes_on_at_another_worker(
    client: Client, worker: SteppedWorker, settled_redis: LocalRedis, how: str
) -> None:
    bulk = full_of_bulk(client, worker)
    urgent = let_in(client, worker)
    worker.decode(2)
    assert worker.engine.parked
    worker.leave(how)
    assert worker.engine.lane_rows.parked == (0, 0, 0)
    with new_worker(settled_redis, "other") as other:
        while not all(handle.status().state in TERMINAL for handle in (urgent, *bulk)):
            other.claim().finish()
    for handle in (urgent, *bulk):
        assert told(client, handle)[1] == TEXT


@pytest.mark.parametrize("reason", ["cancelled", "deadline_exceeded"])
def test_a_parked_row_ends_where_its_job_does(
    client: Client, worker: SteppedWorker, reason: str
) -> None:
    bulk = full_of_bulk(client, worker)
    urgent = let_in(client, worker)
    last = bulk[ROWS - 1]
    worker.child.publisher.cancel(last.id, reason)
    worker.step()
    worker.flush()
    assert worker.engine.parked == 0
    tokens, text, _, state = told(client, last)
    assert TEXT.startswith(text)
    assert tokens
    assert state.value == ("cancelled" if reason == "cancelled" else "expired")
    worker.finish()
    assert told(client, urgent)[1] == TEXT


def test_the_lease_of_a_parked_row_is_renewed(client: Client, worker: SteppedWorker) -> None:
    bulk = full_of_bulk(client, worker)
    let_in(client, worker)
    protocol, publisher = worker.child.protocol, worker.child.publisher
    key, job_id = protocol.keys.leases("tally:bulk"), bulk[ROWS - 1].id
    protocol.redis.zadd(key, {job_id: 1}, xx=True)
    publisher._renewed_at = 0.0
    for job in publisher.held():
        job.committed_at = 0.0
    publisher._renew()
    assert (protocol.redis.zscore(key, job_id) or 0) > 1
    protocol.run(calls.reap(lease_ms=0))
    worker.finish()
    assert told(client, bulk[ROWS - 1])[1] == TEXT


def test_a_bulk_job_that_waits_for_kv_holds_no_interactive_job_up(
    client: Client, settled_redis: LocalRedis
) -> None:
    with new_worker(settled_redis, capacity=250) as worker:
        bulk = [submit(client, "bulk", max_tokens=120) for _ in range(2)]
        worker.claim().step(3)
        waits = submit(client, "bulk", max_tokens=240)
        worker.claim().step(3)
        assert worker.held == 3
        assert worker.child.runner.unadmitted()
        urgent = submit(client, "interactive", max_tokens=60)
        worker.child.dispatcher._handle("wake", "tally:interactive")
        worker.claim().claim().step(2)
        assert worker.engine.lane_rows.active[0] == 1
        while worker.held:
            worker.decode(1)
        for handle in (*bulk, waits, urgent):
            assert told(client, handle)[1] == TEXT
