"""What anybody may have put into a job's hash: it fails with a code, the worker goes on."""

from __future__ import annotations

import json
import resource
import zlib
from typing import TYPE_CHECKING, Any

import pytest

from mlx_serving import Client
from mlx_serving.common.job.schema import JOB_FUNCTION
from mlx_serving.common.protocol.fields import JobField
from mlx_serving.common.queues import PROTOCOL
from tests.support.helpers import wait_until
from tests.support.protocol_driver import Driver, rq_fields
from tests.support.worker_process import (
    Hacks,
    InProcessWorker,
    WorkerProcess,
    check_answers,
    quick_settings,
    submit,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlx_serving.common.redis.local import LocalRedis

NEWER = PROTOCOL + 1
GOOD = {"v": 1, "min_protocol": 1, "model": "tally", "prompt": "x", "max_tokens": 3, "seed": 1}


@pytest.fixture
def worker(settled_redis: LocalRedis) -> Iterator[InProcessWorker]:
    with InProcessWorker(settled_redis.url, rate=1000, jobs__max_bytes=100_000) as worker:
        yield worker


def packed(call: Any) -> bytes:
    return zlib.compress(json.dumps(call).encode())


def call(wire: Any, function: str = JOB_FUNCTION) -> bytes:
    return packed([function, None, [wire], {}])


DEEP = json.loads("[" * 90 + "]" * 90)
PAYLOADS: dict[str, tuple[bytes, str]] = {
    "not zlib": (b"\x80\x04 not zlib", "corrupt_job"),
    "cut short": (call(GOOD)[:-9], "corrupt_job"),
    "not JSON": (zlib.compress(b"\x80\x04pickle"), "corrupt_job"),
    "not UTF-8": (zlib.compress(b'["\xff"]'), "corrupt_job"),
    "not a list": (packed({"a": 1}), "corrupt_job"),
    "three parts": (packed([JOB_FUNCTION, None, [GOOD]]), "corrupt_job"),
    "no argument": (packed([JOB_FUNCTION, None, [], {}]), "corrupt_job"),
    "two arguments": (packed([JOB_FUNCTION, None, [GOOD, GOOD], {}]), "corrupt_job"),
    "the argument is no object": (call("run"), "corrupt_job"),
    "deeply nested": (zlib.compress(b"[" * 50_000 + b"]" * 50_000), "corrupt_job"),
    "nested in a field": (call(GOOD | {"response_format": DEEP}), "invalid_job"),
    "os.system": (call("touch /tmp/owned", "os.system"), "foreign_function"),
    "function is no text": (packed([["x"], None, [GOOD], {}]), "foreign_function"),
    "keyword arguments": (packed([JOB_FUNCTION, None, [GOOD], {"a": 1}]), "foreign_function"),
    "an instance": (packed([JOB_FUNCTION, "x", [GOOD], {}]), "foreign_function"),
    "a wrong field": (call(GOOD | {"temperature": "hot"}), "invalid_job"),
    "an unknown field": (call(GOOD | {"surprise": 1}), "invalid_job"),
    "NaN": (call(GOOD | {"temperature": float("nan")}), "corrupt_job"),
    "a huge number": (zlib.compress(b'["x",null,[' + b"9" * 5000 + b"],{}]"), "corrupt_job"),
    "too large packed": (bytes(100_001), "payload_too_large"),
    "too large unpacked": (call(GOOD | {"prompt": "x" * 100_001}), "payload_too_large"),
    "a zlib bomb": (zlib.compress(bytes(50_000_000), 9), "payload_too_large"),
    "a newer protocol inside": (call(GOOD | {"min_protocol": NEWER}), "invalid_job"),
}  # fmt: skip


@pytest.mark.usefixtures("worker")
class TestRefused:
    def test_each_bad_payload_fails_with_its_code_and_good_jobs_run(
        self, driver: Driver, client: Client
    ) -> None:
        handles = []
        for number, (data, _) in enumerate(PAYLOADS.values()):
            driver.enqueue(f"bad{number}", rq_fields=rq_fields() | {"data": data})
            handles += submit(client, 1, 5)
        check_answers(client, handles, 5)
        codes = {}
        for number, name in enumerate(PAYLOADS):
            record = client.result(f"bad{number}", timeout=10)
            codes[name] = record.error.code if record.error else record.state.value
            assert driver.state(f"bad{number}") == "failed", name
            assert driver.rq_status(f"bad{number}") == "failed"
        assert codes == {name: code for name, (_, code) in PAYLOADS.items()}

    @pytest.mark.parametrize(
        "field", ["success_callback_name", "failure_callback_name", "webhooks", "repeats_left"]
    )
    def test_callbacks_and_webhooks_are_refused(
        self, driver: Driver, client: Client, field: str
    ) -> None:
        fields = rq_fields() | {"data": call(GOOD), field: "os.system"}
        driver.enqueue("bad", rq_fields=fields)
        result = client.result("bad", timeout=10)
        assert result.error is not None
        assert (result.error.code, field in result.error.message) == ("forbidden_field", True)
        check_answers(client, submit(client, 2, 5), 5)

    def test_nothing_of_a_payload_is_in_the_error(self, driver: Driver, client: Client) -> None:
        wire = GOOD | {"temperature": "my secret", "prompt": "another secret"}
        driver.enqueue("bad", rq_fields=rq_fields() | {"data": call(wire)})
        result = client.result("bad", timeout=10)
        assert result.error is not None
        assert "secret" not in result.error.message

    @pytest.mark.parametrize("oddity", ["missing", "not an event", "another seq", "wrong type"])
    def test_a_stream_that_cannot_be_continued_fails_that_job_alone(
        self, driver: Driver, client: Client, worker: InProcessWorker, oddity: str
    ) -> None:
        """A handed-over job whose committed events are gone or mangled."""
        driver.redis.set("rq:suspended", 1)
        wait_until(lambda: driver.redis.hget("rq:worker:local", "state") == b"suspended")
        driver.enqueue("odd", max_attempts=1, rq_fields=rq_fields() | {"data": call(GOOD)})
        driver.redis.hset("mlxs:job:odd", JobField.SEQ, 2)
        if oddity == "not an event":
            driver.redis.xadd("mlxs:ev:odd", {"e": "no JSON"}, id="1-0")
        elif oddity == "another seq":
            driver.redis.xadd("mlxs:ev:odd", {"other": "field"}, id="1-0")
        elif oddity == "wrong type":
            driver.redis.set("mlxs:ev:odd", "x")
        driver.redis.delete("rq:suspended")
        wait_until(lambda: driver.state("odd") in {"failed", "dead"}, timeout=15)
        check_answers(client, submit(client, 2, 5), 5)
        assert worker.child.dispatcher is not None


def test_a_zlib_bomb_costs_bounded_memory(settled_redis: LocalRedis, driver: Driver) -> None:
    bomb = zlib.compress(bytes(1_000_000_000), 9)
    assert len(bomb) < 1_000_000
    with (
        InProcessWorker(settled_redis.url, rate=1000),
        Client(settings=quick_settings(settled_redis.url)) as client,
    ):
        check_answers(client, submit(client, 2, 5), 5)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        driver.enqueue("bomb", rq_fields=rq_fields() | {"data": bomb})
        result = client.result("bomb", timeout=10)
        assert result.error is not None
        assert result.error.code == "payload_too_large"
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 60 * 1024  # KiB


@pytest.mark.may_leak(reason="a worker that is killed at the end leaves its name in RQ's sets")
def test_a_newer_protocol_stays_queued_until_a_worker_that_speaks_it(
    settled_redis: LocalRedis, driver: Driver, client: Client
) -> None:
    with InProcessWorker(settled_redis.url, rate=1000):
        newer = GOOD | {"min_protocol": NEWER}
        fields = rq_fields() | {"data": call(newer)}
        driver.enqueue("newer", min_protocol=NEWER, rq_fields=fields)
        check_answers(client, submit(client, 40, 5), 5)
        assert driver.listed() == ["newer"]
        assert driver.record("newer").epoch == 0
        assert driver.rq_status("newer") == "queued"
        with WorkerProcess(settled_redis.url, "knows", 100, Hacks(protocol=NEWER)) as knows:
            knows.serving()
            assert client.result("newer", timeout=10).text == "1 2 3"
            assert client.result("newer").worker == "knows"
