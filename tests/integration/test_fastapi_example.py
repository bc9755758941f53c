"""The FastAPI example behind a real server, read by a real HTTP client."""

from __future__ import annotations

import importlib.util
import json
import socket
import sys
import threading
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import uvicorn

from mlx_serving.common.protocol.keys import Keys
from tests.support.helpers import wait_until
from tests.support.paths import ROOT
from tests.support.scripted_worker import ScriptedWorker

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

    import redis

    from mlx_serving.common.redis.local import LocalRedis

EXAMPLE = ROOT / "examples" / "fastapi_app.py"
JOB = {"model": "tally", "prompt": "count from 3 to 12", "result_ttl": 60}
WORDS = [f"w{i} " for i in range(30)]


@pytest.fixture
def example(local_redis: LocalRedis, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setenv("MLX_SERVING_REDIS_URL", local_redis.url)
    spec = importlib.util.spec_from_file_location("fastapi_app", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fastapi_app", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "KEEP_ALIVE_S", 0.1)
    return module


@pytest.fixture
def http(example: ModuleType, redis_client: redis.Redis) -> Iterator[httpx.Client]:
    del redis_client
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(
            uvicorn.Config(example.app, log_level="warning", timeout_graceful_shutdown=1)
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        wait_until(lambda: server.started)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with httpx.Client(base_url=url, timeout=10) as http:
            yield http
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture
def worker(redis_client: redis.Redis) -> ScriptedWorker:
    return ScriptedWorker(redis_client, Keys())


def read_sse(lines: Iterator[str], *, most: int = 10_000) -> list[dict[str, str]]:
    """Parse server-sent events, as EventSource does; comments are skipped."""
    found: list[dict[str, str]] = []
    current: dict[str, str] = {}
    for line in lines:
        if line == "" and current:
            found.append(current)
            current = {}
            if len(found) == most:
                break
        elif line and not line.startswith(":"):
            name, _, value = line.partition(": ")
            current[name] = value
    return found


def events(http: httpx.Client, job_id: str, last: str | None = None) -> list[dict[str, str]]:
    headers = {} if last is None else {"Last-Event-ID": last}
    with http.stream("GET", f"/jobs/{job_id}/events", headers=headers) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        return read_sse(response.iter_lines())


def seq_of(sent: dict[str, str]) -> int:
    """What the event's id counts; its tag stands behind it."""
    return int(sent["id"].partition("-")[0])


def submit(http: httpx.Client, **fields: Any) -> str:
    response = http.post("/jobs", json=JOB | fields)
    assert response.status_code == 202, response.text
    return str(response.json()["id"])


def test_a_job_is_relayed(http: httpx.Client, worker: ScriptedWorker) -> None:
    job_id = submit(http)
    with worker.serving(WORDS, pause_s=0.002):
        got = events(http, job_id)
    assert [seq_of(each) for each in got] == list(range(1, 33))
    assert [each["event"] for each in got] == ["attempt", *["tokens"] * 30, "end"]
    texts = [json.loads(each["data"])["choices"][0]["text"] for each in got[1:-1]]
    assert texts == WORDS
    assert json.loads(got[-1]["data"])["state"] == "finished"


@pytest.mark.parametrize("after", [None, 0, 2])
def test_a_late_reader_is_told_that_the_events_are_gone(
    http: httpx.Client, worker: ScriptedWorker, redis_client: redis.Redis, after: int | None
) -> None:
    """By a status after which an EventSource does not come again."""
    job_id = submit(http)
    row = worker.serve(WORDS)
    redis_client.delete(f"mlxs:ev:{job_id}")  # as their time does
    headers = {} if after is None else {"Last-Event-ID": row.written[after].cursor}
    response = http.get(f"/jobs/{job_id}/events", headers=headers)
    assert (response.status_code, response.json()["code"]) == (410, "events_gone")


def test_a_reader_that_was_cut_off_resumes_without_gap_or_repeat(
    http: httpx.Client, worker: ScriptedWorker, redis_client: redis.Redis
) -> None:
    job_id = submit(http)
    with worker.serving(WORDS, pause_s=0.02):
        with http.stream("GET", f"/jobs/{job_id}/events") as response:
            first = read_sse(response.iter_lines(), most=7)
        wait_until(lambda: redis_client.pubsub_channels() == [], what="the reading has stopped")
        second = events(http, job_id, last=first[-1]["id"])
    assert [seq_of(each) for each in first + second] == list(range(1, 33))
    assert redis_client.hget(f"mlxs:job:{job_id}", "st") == b"finished"


def test_a_reader_that_leaves_a_quiet_job_is_noticed(
    http: httpx.Client, worker: ScriptedWorker, redis_client: redis.Redis
) -> None:
    job_id = submit(http)
    with http.stream("GET", f"/jobs/{job_id}/events") as response:
        lines = response.iter_lines()
        assert next(lines).startswith(":")
        wait_until(lambda: redis_client.pubsub_channels() != [])
    wait_until(lambda: redis_client.pubsub_channels() == [])
    worker.serve(WORDS)


def test_after_its_end_there_is_no_content(http: httpx.Client, worker: ScriptedWorker) -> None:
    job_id = submit(http)
    row = worker.serve(WORDS)
    response = http.get(f"/jobs/{job_id}/events", headers={"Last-Event-ID": row.written[-1].cursor})
    assert (response.status_code, response.content) == (204, b"")


def test_it_cancels(http: httpx.Client) -> None:
    job_id = submit(http)
    assert http.delete(f"/jobs/{job_id}").json() == {"id": job_id, "state": "cancelled"}
    (end,) = events(http, job_id)
    assert (end["event"], json.loads(end["data"])["state"]) == ("end", "cancelled")


def test_bad_input_is_refused(http: httpx.Client) -> None:
    response = http.post("/jobs", json=JOB | {"top_p": 7})
    assert (response.status_code, response.json()["code"]) == (422, "invalid_job")
    assert "top_p" in response.json()["message"]
    for answer in (http.delete("/jobs/nothing"), http.get("/jobs/nothing/events")):
        assert (answer.status_code, answer.json()["code"]) == (404, "job_not_found")
    for cursor in ("-4", "17"):
        bad = http.get("/jobs/nothing/events", headers={"Last-Event-ID": cursor})
        assert (bad.status_code, bad.json()["code"]) == (422, "invalid_cursor")
        assert bad.json()["message"].startswith("after: must be an event's cursor")


def test_a_cursor_that_redis_forgot_is_a_reset_and_the_whole_answer(
    http: httpx.Client, worker: ScriptedWorker, redis_client: redis.Redis
) -> None:
    """An empty id: `EventSource` sends no Last-Event-ID if it is cut off right after it."""
    job_id = submit(http)
    row = worker.claim_one()
    found = redis_client.scan_iter()
    before = [(key, max(0, redis_client.pttl(key)), redis_client.dump(key)) for key in found]
    row.say("lost ")
    row.end()
    for key, ttl_ms, value in before:
        redis_client.restore(key, ttl_ms, value or b"", replace=True)
    row.hand_back()
    again = worker.serve(["found "])
    for lost in row.written[1:]:
        reset, *rest = events(http, job_id, last=lost.cursor)
        assert (reset["event"], reset["id"]) == ("reset", "")
        told = [row.written[0], *again.written]
        assert [each["id"] for each in rest] == [event.cursor for event in told]
    kept = events(http, job_id, last=row.written[0].cursor)
    assert [each["id"] for each in kept] == [event.cursor for event in again.written]


def test_an_error_on_the_way_is_told(
    http: httpx.Client, worker: ScriptedWorker, redis_client: redis.Redis
) -> None:
    job_id = submit(http)
    worker.serve(WORDS)
    redis_client.xtrim(f"mlxs:ev:{job_id}", maxlen=2, approximate=False)
    (error,) = events(http, job_id)
    assert error == {"event": "error", "data": '{"code":"stream_gap"}'}
