"""Several choices of one job: one stream, one result, and everything else that holds for a job."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from mlx_serving.common.worker_record import WorkerRecord
from mlx_serving.worker.rq_worker import BatchWorker
from tests.support.helpers import wait_until
from tests.support.stepped_worker import (
    SteppedWorker,
    spelled_engine,
    told_by_choice,
    whole_stream,
    words,
)
from tests.support.worker_process import InProcessWorker, counted, job_events

if TYPE_CHECKING:
    from collections.abc import Iterator

    import redis

    from mlx_serving import Client
    from mlx_serving.common.redis.local import LocalRedis
    from mlx_serving.producer.handles import JobHandle

pytestmark = pytest.mark.usefixtures("settled_redis")

TEXT = "né 👋🏽 世界!"
STEP = 3
CHOICES = 3
LENGTHS = [len(TEXT.encode()) - STEP * n for n in range(CHOICES)]


@pytest.fixture
def worker(local_redis: LocalRedis) -> Iterator[SteppedWorker]:
    engine = spelled_engine(TEXT, uneven=STEP)
    with SteppedWorker(local_redis.url, engine, words) as worker:
        yield worker


def submit(client: Client, **fields: Any) -> JobHandle:
    given = {"model": "tally", "prompt": "x y", "max_tokens": 64, "result_ttl": 60, "n": CHOICES}
    return client.submit(given | fields)


def test_every_choice_is_told_and_counted(client: Client, worker: SteppedWorker) -> None:
    handle = submit(client)
    worker.claim().finish()
    choices = told_by_choice(client, handle)
    assert [len(token_ids) for token_ids, _, _ in choices] == [n + 1 for n in LENGTHS]
    assert [reason for *_, reason in choices] == ["stop"] * CHOICES
    assert choices[0][1] == TEXT
    result = handle.result()
    assert result.usage is not None
    assert (result.usage.prompt_tokens, result.text) == (2, TEXT)
    assert "".join(handle.text()) == TEXT


@pytest.mark.parametrize("how", ["kill", "hand over"])
def test_a_cut_after_any_step_leaves_no_seam_in_any_choice(
    client: Client, worker: SteppedWorker, how: str
) -> None:
    handle = submit(client)
    worker.claim().finish()
    expected = told_by_choice(client, handle)
    for cut in range(max(LENGTHS) + 1):
        handle = submit(client)
        worker.claim()
        for _ in range(cut + 1):
            worker.step()
            if worker.child.publisher.pending:
                worker.flush()
        if worker.held:
            worker.leave(how)
            worker.claim().finish()
        assert told_by_choice(client, handle) == expected, f"cut after {cut} steps"


def test_an_attempt_a_step_leaves_no_seam_either(client: Client, worker: SteppedWorker) -> None:
    handle = submit(client)
    worker.claim().finish()
    expected = told_by_choice(client, handle)
    handle = submit(client)
    for count in range(3 * max(LENGTHS)):
        worker.claim()
        for _ in range(2):
            worker.step()
            if worker.child.publisher.pending:
                worker.flush()
        if not worker.held:
            break
        worker.leave(["kill", "hand over"][count % 2])
    assert told_by_choice(client, handle) == expected
    assert [e.type for e in job_events(client, handle.id)].count("attempt") > 5


def test_choices_that_ended_are_not_asked_for_again(client: Client, worker: SteppedWorker) -> None:
    handle = submit(client)
    worker.claim().decode(3)
    while worker.engine.running == CHOICES:
        worker.step()
    worker.flush()
    worker.die()
    worker.claim().step()
    rows = worker.engine.running + worker.engine.waiting
    assert rows == CHOICES - 1
    worker.finish()
    told_by_choice(client, handle)


def test_a_reset_takes_every_choice_back(client: Client, worker: SteppedWorker) -> None:
    handle = submit(client, on_model_change="reset")
    worker.claim().decode(4)
    worker.die()
    worker.use(spelled_engine("new", revision="r2"))
    worker.claim().finish()
    assert [text for _, text, _ in told_by_choice(client, handle)] == ["new"] * CHOICES


def test_a_cancel_stops_every_choice(client: Client, worker: SteppedWorker) -> None:
    handle = submit(client)
    worker.claim().decode(6)
    handle.cancel()
    worker.step()
    worker.flush()  # the reply brings the flag
    worker.flush()
    assert (worker.held, handle.result(timeout=1).state.value) == (0, "cancelled")
    worker.step()
    assert not worker.engine.has_work
    assert [reason for *_, reason in told_by_choice(client, handle)] == [None] * CHOICES


def test_choices_that_no_worker_has_rows_for_fail_by_the_fields_name(
    client: Client, worker: SteppedWorker
) -> None:
    handle = submit(client, n=65)  # the engine holds 64 rows
    narrow = submit(client)
    worker.claim().finish()
    error = handle.result(timeout=1).error
    assert error is not None
    assert (error.code, error.message.partition(":")[0]) == ("job_too_large", "n")
    told_by_choice(client, narrow)


@pytest.mark.parametrize("rows", [64, 65])
def test_they_wait_for_a_worker_that_has_the_rows(
    client: Client, worker: SteppedWorker, redis_client: redis.Redis, rows: int
) -> None:
    peer = BatchWorker(["tally:default"], "peer", redis_client)
    peer.enter()
    key = client.keys.worker("peer")
    record = WorkerRecord(
        name="peer", model="tally", capacities={"tally": 1 << 30}, batch_rows=rows
    )
    redis_client.hset(key, mapping=dict[Any, Any](record.to_hash()))
    try:
        handle = submit(client, n=65)
        worker.claim()
        assert worker.held == (rows < 65)  # else it failed, and its end is not written yet
        if rows == 65:
            assert client.status(handle.id).state.value == "queued"
            worker.claim()
            assert worker.held == 0
        else:
            worker.finish()
    finally:
        peer.leave()
        redis_client.delete(key)
        handle.cancel()


@pytest.mark.slow
def test_a_whole_worker_runs_choices_of_many_jobs(local_redis: LocalRedis, client: Client) -> None:
    """More jobs than the batch has rows for; streamed and in bulk; one is abandoned by its time."""
    with InProcessWorker(local_redis.url, rate=400.0, batch__max_rows=8):
        bulk = [submit(client, n=3, max_tokens=40, stream=False, lane="bulk") for _ in range(6)]
        live = [submit(client, n=4, max_tokens=40) for _ in range(6)]
        late = submit(client, n=2, max_tokens=5000, timeout=1.0)
        for handle in [*live, *bulk]:
            assert handle.result(timeout=30).state.value == "finished"
            expected = [(list(range(1, 41)), counted(40), "length")]
            assert told_by_choice(client, handle) == expected * (3 if handle in bulk else 4)
        assert handle.result(timeout=30).state.value == "finished"
        wait_until(lambda: late.status().state.value == "expired", timeout=20)
        told_by_choice(client, late)
        assert len(whole_stream(client, bulk[0])) < 12  # 16 tokens a choice and event
