"""What a hostile hand may have written where a producer reads: an error of ours, never a crash."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from mlx_serving import AsyncClient, Client
from mlx_serving.common import events
from mlx_serving.common.errors import CorruptEvent, CorruptJob, MlxServingError, StreamGap
from tests.support.protocol_driver import Driver
from tests.support.worker_process import quick_settings

if TYPE_CHECKING:
    from collections.abc import Callable

    import redis

    from mlx_serving.common.redis.local import LocalRedis

pytestmark = pytest.mark.may_leak(reason="keys are mangled by hand")
DEEP = 30_000


@pytest.fixture
def driver(redis_client: redis.Redis) -> Driver:
    driver = Driver(redis_client)
    attempt = driver.start("a")
    driver.commit(attempt, attempt.row(), attempt.end())
    return driver


@pytest.fixture
def client(local_redis: LocalRedis, driver: Driver) -> Client:
    del driver
    return Client(settings=quick_settings(local_redis.url))


RESULTS = {
    "not JSON": b"\x80\x04pickle",
    "not UTF-8": b'{"v":1,"id":"\xff"}',
    "30,000 deep": b'{"v":1,"id":"a","state":"finished","choices":' + b"[" * DEEP,
    "another shape": b"[1, 2]",
    "a state that is not known": b'{"v":1,"id":"a","state":"sleeping"}',
    "a text where a number belongs": b'{"v":1,"id":"a","state":"finished","attempts":"many"}',
    "a lone surrogate": b'{"v":1,"id":"\\ud800","state":"finished"}',
    "a megabyte of digits":
        b'{"v":1,"id":"a","state":"finished","attempts":' + b"9" * (1 << 20) + b"}",
}  # fmt: skip


@pytest.mark.parametrize("name", RESULTS)
def test_a_poisoned_result_is_a_corrupt_job(driver: Driver, client: Client, name: str) -> None:
    driver.redis.hset("mlxs:job:a", "res", RESULTS[name])
    with pytest.raises(CorruptJob) as error:
        client.result("a", timeout=5)
    assert len(str(error.value)) < 200


HASHES: dict[str, dict[Any, Any]] = {
    "state is not known": {"st": "sleeping"},
    "state is no text": {"st": b"\xff\xfe"},
    "seq is text": {"seq": "x"},
    "seq is NaN": {"seq": "nan"},
    "seq is infinite": {"seq": "inf"},
    "seq of 5,000 digits": {"seq": "9" * 5000},
}


@pytest.mark.parametrize("name", HASHES)
@pytest.mark.parametrize("call", ["status", "result", "stream"])
def test_a_mangled_control_hash_is_a_corrupt_job(
    driver: Driver, client: Client, name: str, call: str
) -> None:
    driver.redis.hset("mlxs:job:a", mapping=HASHES[name])
    calls: dict[str, Callable[[], Any]] = {
        "status": lambda: client.status("a"),
        "result": lambda: client.result("a", timeout=2),
        "stream": lambda: list(client.stream("a")),
    }
    with pytest.raises((CorruptJob, StreamGap)):
        calls[call]()


def test_submitting_over_a_mangled_control_hash_is_a_corrupt_job(
    driver: Driver, client: Client
) -> None:
    job = client.submit(model="tally", prompt="x", idempotency_key="k", result_ttl=60)
    driver.redis.hset(f"mlxs:job:{job.id}", "st", "sleeping")
    with pytest.raises(CorruptJob):
        client.submit(model="tally", prompt="x", idempotency_key="k", result_ttl=60)


ENTRIES: dict[str, dict[bytes, bytes]] = {
    "another field": {b"other": b"x"},
    "no JSON": {b"e": b"\x80\x04"},
    "not UTF-8": {b"e": b'{"v":1,"attempt":1,"seq":3,"type":"\xff"}'},
    "30,000 deep": {b"e": b'{"v":1,"attempt":1,"seq":3,"type":"tokens","choices":' + b"[" * DEEP},
    "half of ours": {b"a": b"1", b"t": b"{"},
    "an attempt that is no number": {b"a": b"\xff", b"t": b'"text":"x"}]}'},
    "another seq": {b"e": events.encode(events.tokens_event(attempt=1, seq=99, choices=[]))},
}


@pytest.mark.parametrize("name", ENTRIES)
@pytest.mark.parametrize("kind", ["blocking", "async"])
def test_foreign_entries_in_a_stream_are_an_error_of_ours(
    driver: Driver, local_redis: LocalRedis, name: str, kind: str
) -> None:
    driver.redis.delete("mlxs:ev:a")
    driver.redis.xadd("mlxs:ev:a", ENTRIES[name], id="1-0")  # type: ignore[arg-type]
    settings = quick_settings(local_redis.url)

    async def read() -> list[events.Event]:
        async with AsyncClient(settings=settings) as client:
            return [event async for event in client.stream("a")]

    def read_blocking() -> list[events.Event]:
        with Client(settings=settings) as client:
            return list(client.stream("a"))

    with pytest.raises((CorruptEvent, StreamGap)):
        asyncio.run(read()) if kind == "async" else read_blocking()


@pytest.mark.parametrize(
    "job_id", ["", "a b", "x\ny", "\x00", "%s", "a" * 100_000, "é", "../x", "*"]
)
def test_odd_ids_are_not_found(client: Client, job_id: str) -> None:
    for call in (client.status, client.result, client.cancel):
        with pytest.raises(MlxServingError, match="there is no job"):
            call(job_id)
