"""A worker's whole debug log after everything went wrong: no prompt, output or secret."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mlx_serving import Client
from mlx_serving.common.job.schema import JOB_FUNCTION
from tests.support.helpers import wait_until
from tests.support.protocol_driver import QUEUE, Driver, rq_fields
from tests.support.worker_process import WorkerProcess, quick_settings

if TYPE_CHECKING:
    from mlx_serving.common.redis.local import LocalRedis

MARK = "MARKzx81"
KEY = f"{MARK}-signing-key-of-32-characters"
GOOD: dict[str, Any] = {
    "v": 1,
    "model": "tally",
    "prompt": f"{MARK} words",
    "max_tokens": 3,
    "seed": 1,
}
ANSWER = "1 2 3"


def payload(wire: Any, function: str = JOB_FUNCTION) -> bytes:
    return zlib.compress(json.dumps([function, None, [wire], {}]).encode())


HOSTILE = [
    payload(GOOD),
    payload(GOOD | {"temperature": MARK}),
    payload(GOOD | {MARK: 1}),
    payload(GOOD | {"stop": [MARK, ""]}),
    payload(GOOD | {"messages": [{"role": MARK, "content": MARK}]}),
    payload(GOOD | {"tools": [{"type": "function", "function": {"name": f"{MARK} !"}}]}),
    payload(GOOD | {"response_format": {"type": MARK}}),
    payload(GOOD | {"metadata": {MARK: [MARK]}}),
    payload(GOOD | {"prompt": f"{MARK} " * 2_000_000}),
    payload(GOOD, function=f"os.{MARK}"),
    payload(MARK),
    zlib.compress(f'["{MARK}'.encode()),
    zlib.compress(MARK.encode() + b"\xff"),
    MARK.encode(),
    payload({"messages": [{"role": "user", "content": MARK}], "model": MARK, "v": 1}),
]
ODD_IDS = [b"a\nforged line", b"\x1b[2Jowned", b"%s{0}", b"\xff\xfe", b"b" * 5000]


@pytest.mark.may_leak(reason="ids that are none, and a worker that is killed")
@pytest.mark.parametrize("log_format", ["json", "console"])
def test_nothing_private_and_no_forged_line(settled_redis: LocalRedis, log_format: str) -> None:
    settings: dict[str, Any] = {
        "log__level": "debug", "log__format": log_format, "jobs__signing_keys": [KEY],
        "redis__password": None, "batch__max_rows": 8,
    }  # fmt: skip
    with (
        settled_redis.client() as connection,
        WorkerProcess(settled_redis.url, "logged", 200, **settings) as worker,
        Client(settings=quick_settings(settled_redis.url, jobs__signing_keys=[KEY])) as client,
    ):
        driver = Driver(connection)
        worker.serving()
        good = client.submit(
            model="tally", max_tokens=3, result_ttl=60, metadata={"m": MARK}, tenant=MARK,
            messages=[{"role": "system", "content": MARK}, {"role": "user", "content": MARK}],
        )  # fmt: skip
        assert good.result(timeout=20).text == ANSWER
        cancelled = client.submit(model="tally", prompt=MARK, max_tokens=9000, result_ttl=60)
        next(cancelled.stream())
        cancelled.cancel()
        cancelled.result(timeout=20)
        for number, data in enumerate(HOSTILE):
            driver.enqueue(f"hostile{number}", rq_fields=rq_fields() | {"data": data})
        for job_id in ODD_IDS:
            connection.hset(b"rq:job:" + job_id, "data", payload(GOOD))
            connection.rpush(f"rq:queue:{QUEUE}", job_id)
            connection.publish("mlxs:ctl:logged", b"cancel " + job_id)
        command = {"command": "stop-job", "job_id": f"x\n{MARK}"}
        for message in (json.dumps(command).encode(), b"\xff" + MARK.encode(), b"[" * 30_000):
            connection.publish("rq:pubsub:logged", message)
        for number in range(len(HOSTILE)):
            assert client.result(f"hostile{number}", timeout=20).error is not None
        wait_until(lambda: connection.llen(f"rq:queue:{QUEUE}") == 0)
        after = client.submit(model="tally", prompt="x", max_tokens=3, result_ttl=60)
        assert after.result(timeout=20).text == ANSWER
        worker.terminate()
        assert worker.exit_status() == 0
        log = Path(worker._log.name).read_text()
    assert "bad_signature" in log
    assert "drained" in log
    # The tenant, the metadata, the key, the prompts, the answers.
    assert MARK not in log
    assert ANSWER not in log
    assert "forged line" not in [line.strip() for line in log.splitlines()]
    assert all(line.isprintable() for line in log.splitlines())
    assert max(map(len, log.splitlines())) < 8000
    if log_format == "json":
        lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
        assert {"job_refused", "drained"} <= {line["event"] for line in lines}
