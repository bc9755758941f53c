"""A worker without room for a job claims it once, and again when there is room."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from mlx_serving.worker import dispatcher
from mlx_serving.worker.claiming import shortage
from tests.support.stepped_worker import SteppedWorker, spelled_engine, words
from tests.support.worker_process import submit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mlx_serving import Client
    from mlx_serving.common.redis.local import LocalRedis
    from tests.support.protocol_driver import Driver

ROOM = (8, 200)  # rows and KV tokens; a row counts as the widest one does
WAITS_SECONDS = 0.05  # for room, before a job goes back; 1 s where it is not shortened


@pytest.fixture
def worker(settled_redis: LocalRedis, monkeypatch: pytest.MonkeyPatch) -> Iterator[SteppedWorker]:
    monkeypatch.setattr(dispatcher, "UNADMITTED_SECONDS", WAITS_SECONDS)
    with SteppedWorker(settled_redis.url, spelled_engine("x" * 500, room=ROOM), words) as worker:
        yield worker
        worker.child.fleet.leave()


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes seconds takes parts of one."""
    monkeypatch.setattr(shortage, "CLOSED_SECONDS", 0.4)
    monkeypatch.setattr(shortage, "PASSED_SECONDS", 0.4)


def turn(worker: SteppedWorker, *, steps: int = 0) -> None:
    """Do one turn of the main loop, and so many of the engine with work."""
    worker.child.dispatcher._chores()
    worker.child.dispatcher._claim()
    worker.child.runner._paused = lambda: steps == 0
    worker.step(max(steps, 1))
    worker.child.runner._paused = lambda: False
    if worker.child.publisher.pending:
        worker.flush()


def turns(worker: SteppedWorker, waits: int) -> None:
    """Turn for as long as a job would have gone back so many times; nothing is decoded."""
    until = time.monotonic() + waits * WAITS_SECONDS
    while time.monotonic() < until:
        turn(worker)


def turn_until(worker: SteppedWorker, condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        turn(worker, steps=1)


def test_a_job_too_large_for_what_is_free_is_claimed_twice_and_not_overtaken(
    client: Client, worker: SteppedWorker, driver: Driver
) -> None:
    (runs,) = submit(client, 1, 90)
    turn(worker, steps=3)
    (large,) = submit(client, 1, 150)
    small = submit(client, 3, 20)
    turns(worker, waits=20)
    assert driver.record(large.id).epoch == 1
    assert driver.listed() == [large.id, *(job.id for job in small)]
    assert worker.held == 1
    turn_until(worker, lambda: client.status(large.id).state.value == "finished")
    assert client.result(runs.id, timeout=1).attempts == 1
    assert client.result(large.id, timeout=1).attempts == 2
    turn_until(worker, lambda: not driver.listed())
    worker.finish()
    # Claimed with the large one, then alone beside it, then when there was room.
    assert max(client.result(job.id, timeout=1).attempts for job in small) <= 3


def test_higher_lanes_are_served_meanwhile_and_lower_ones_are_not(
    client: Client, worker: SteppedWorker, driver: Driver
) -> None:
    (runs,) = submit(client, 1, 90)
    turn(worker, steps=3)
    (large,) = submit(client, 1, 150)
    turns(worker, waits=4)
    assert worker.child.runner.shortage
    (urgent,) = submit(client, 1, 20, lane="interactive")
    (bulk,) = submit(client, 1, 20, lane="bulk")
    turns(worker, waits=10)
    assert {job.job_id for job in worker.child.publisher.held()} == {runs.id, urgent.id}
    assert driver.record(large.id).epoch == 1
    assert driver.record(bulk.id).epoch == 0
    for job in (runs, large, urgent, bulk):
        client.cancel(job.id)
    turn_until(worker, lambda: not worker.held)


def test_another_worker_with_room_takes_it(
    client: Client, worker: SteppedWorker, settled_redis: LocalRedis
) -> None:
    (runs,) = submit(client, 1, 90)
    turn(worker, steps=3)
    (large,) = submit(client, 1, 150)
    turns(worker, waits=4)
    roomy = SteppedWorker(settled_redis.url, spelled_engine("x" * 500), words, "roomy")
    with roomy as other:
        other.claim()
        other.finish()
    assert client.result(large.id, timeout=1).attempts == 2
    worker.finish()
    assert client.result(runs.id, timeout=1).attempts == 1


@pytest.mark.parametrize("how", ["cancelled", "run elsewhere"])
def test_a_job_that_waits_no_more_holds_nobody_up(
    client: Client,
    worker: SteppedWorker,
    settled_redis: LocalRedis,
    short: None,
    how: str,
) -> None:
    del short
    (runs,) = submit(client, 1, 90)
    turn(worker, steps=3)
    (large,) = submit(client, 1, 150)
    turns(worker, waits=2)
    if how == "cancelled":
        client.cancel(large.id)
    else:
        with SteppedWorker(settled_redis.url, spelled_engine("x" * 500), words, "roomy") as other:
            other.claim()
            other.finish()
    (small,) = submit(client, 1, 20)
    until = time.monotonic() + 5
    while client.status(small.id).state.value == "queued" and time.monotonic() < until:
        turn(worker)
    assert client.status(small.id).state.value == "running"
    assert client.status(runs.id).state.value == "running"
    worker.finish()


def test_others_go_on_behind_a_job_that_a_higher_lane_leaves_no_room(
    client: Client, worker: SteppedWorker, driver: Driver, short: None
) -> None:
    """Interactive jobs follow each other without a gap; the small default ones are not starved."""
    del short
    submit(client, 1, 90, lane="interactive")
    turn(worker, steps=3)
    (large,) = submit(client, 1, 150)
    small = submit(client, 3, 20)
    until = time.monotonic() + 20
    while any(client.status(job.id).state.value != "finished" for job in small):
        assert time.monotonic() < until, [driver.record(job.id) for job in small]
        urgent = [job for job in worker.child.publisher.held() if job.lane == "interactive"]
        waits = driver.listed("tally:interactive")
        if not waits and all(job.completion_tokens > 60 for job in urgent):
            submit(client, 1, 90, lane="interactive")
        turn(worker, steps=1)
    assert client.status(large.id).state.value in {"queued", "running"}
    client.cancel(large.id)
    turn_until(worker, lambda: not driver.listed())
    worker.finish()
