"""Claiming ahead: the next jobs come while the last ones are read, as far as there is room."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from mlx_serving.common.protocol import calls
from mlx_serving.common.protocol.client import Protocol
from mlx_serving.common.protocol.keys import Keys
from mlx_serving.worker.claiming.claims import ClaimAhead
from mlx_serving.worker.claiming.lane_claims import LaneClaim
from mlx_serving.worker.dispatcher import CLAIM_MOST
from tests.support.protocol_driver import LANES, Driver
from tests.support.stepped_worker import SteppedWorker, spelled_engine, words
from tests.support.worker_process import submit

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlx_serving import Client
    from mlx_serving.common.redis.local import LocalRedis

pytestmark = pytest.mark.usefixtures("settled_redis")

ROWS = CLAIM_MOST + 8
TEXT = "a row that is not over so soon"


@pytest.fixture
def worker(local_redis: LocalRedis) -> Iterator[SteppedWorker]:
    engine = spelled_engine(TEXT)
    with SteppedWorker(local_redis.url, engine, words, batch__max_rows=ROWS) as worker:
        yield worker


def test_it_claims_as_much_as_there_is_room_for(
    client: Client, worker: SteppedWorker, driver: Driver
) -> None:
    handles = submit(client, 100, 99)
    for held in (CLAIM_MOST, ROWS, ROWS):
        worker.claim()
        worker.step(2)
        assert worker.held == held
    assert len(driver.listed()) == 100 - ROWS
    while worker.held:
        worker.finish()
        worker.claim().step(2)
    assert {handle.result(timeout=1).text for handle in handles} == {TEXT}


def test_what_was_claimed_ahead_of_a_drain_goes_back_in_order_uncharged(
    client: Client, worker: SteppedWorker, driver: Driver
) -> None:
    ids = [handle.id for handle in submit(client, ROWS, 99)]
    worker.claim()
    worker.child.messages.post("drain")
    worker.child.dispatcher._listen()
    worker.claim()  # takes the reply, and gives the jobs back
    assert worker.held == CLAIM_MOST
    assert driver.listed() == ids[CLAIM_MOST:]
    assert {driver.record(job_id).attempts for job_id in ids} == {0}
    assert worker.child.dispatcher._room() is None


@pytest.mark.parametrize("engine", ["halted", "failed"])
def test_at_the_end_what_is_under_way_is_held_and_so_handed_over(
    client: Client, worker: SteppedWorker, driver: Driver, engine: str
) -> None:
    ids = [handle.id for handle in submit(client, ROWS, 99)]
    worker.claim()
    runner, inflight = worker.child.runner, worker.child.publisher.inflight
    runner.halted.set()
    if engine == "failed":
        runner.failure = MemoryError()
    worker.child.publisher.start()
    try:
        worker.child.dispatcher._finish()
        if engine == "failed":  # the parent gives them back: the in-flight file lists them
            assert len(inflight._slots) == ROWS
        else:
            assert driver.listed() == ids
    finally:
        worker.child.publisher.stop()
        worker.child.publisher.join(5)


def test_a_claim_ahead_that_fails_raises_where_it_is_taken(driver: Driver) -> None:
    ahead = ClaimAhead(driver.protocol)
    assert ahead.take() is None
    call = calls.claim(
        "w1", LANES, nonce="0f", most=4, lease_ms=1000, protocol=1, capacity_tokens=1,
        max_payload_bytes=1,
    )  # fmt: skip
    asked = LaneClaim(("default",), 4)
    ahead.begin(call, asked)
    claimed = ahead.take()
    assert claimed is not None
    assert not claimed.full
    ahead.begin(calls.Call("commit", ["w1", "", 1, b"\xc1"], call.parse), asked)  # it can't be read
    with pytest.raises(redis.RedisError):
        ahead.take()
    assert ahead.take() is None


def test_a_redis_that_forgot_the_script_is_told_it_again(
    driver: Driver, redis_client: redis.Redis
) -> None:
    redis_client.script_flush()
    assert driver.protocol.send(calls.reap(lease_ms=1000))(None).outcomes == []


def test_a_reply_that_is_late_is_not_waited_for_nor_taken_for_another(
    driver: Driver, redis_client: redis.Redis
) -> None:
    receive = driver.protocol.send(calls.cancel("nobody", "x"))
    assert receive(1.0) is None
    redis_client.client_pause(300)
    late = driver.protocol.send(calls.reap(lease_ms=1000))
    with pytest.raises(redis.TimeoutError):
        late(0.01)
    assert driver.protocol.run(calls.cancel("nobody", "x")) is None


def test_a_call_that_can_not_be_sent_fails_where_its_reply_is_read() -> None:
    away = redis.Redis(port=1, retry=Retry(NoBackoff(), 0))
    receive = Protocol(away, Keys()).send(calls.reap(lease_ms=1000))
    with pytest.raises(redis.ConnectionError):
        receive(None)
