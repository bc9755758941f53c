"""`status`, `cancel`, `doctor` and `generate` against a real Redis that no worker serves."""

import json
import secrets
from threading import Thread
from typing import Any

import pytest
import redis
from typer.testing import CliRunner

from mlx_serving.cli.doctor import redis_server
from mlx_serving.cli.doctor.report import Check
from mlx_serving.cli.main import app
from mlx_serving.cli.worker import require_redis
from mlx_serving.common.protocol.keys import Keys
from mlx_serving.common.redis.connection import resolve
from mlx_serving.common.redis.local import LocalRedis
from mlx_serving.common.settings import load_settings
from mlx_serving.producer.client import Client
from tests.support.helpers import wait_until
from tests.support.redis_users import as_user

runner = CliRunner()
KEYS = Keys()


@pytest.fixture
def url(local_redis: LocalRedis, redis_client: redis.Redis) -> str:
    """URL of an emptied Redis."""
    del redis_client
    return local_redis.url


def wait_for_job(client: Client) -> str:
    """Id of the first job that is enqueued."""
    queue = KEYS.open("tally:interactive")
    ids: list[Any] = wait_until(lambda: client._redis.zrange(queue, 0, 0), what="a job")
    return str(ids[0].decode())


def test_status_of_an_empty_redis_is_empty(url: str) -> None:
    result = runner.invoke(app, ["status", "--json", "--redis-url", url])
    assert result.exit_code == 0
    empty: dict[str, Any] = {"queues": [], "workers": [], "odd_keys": [], "quarantined_keys": []}
    assert json.loads(result.stdout) == {**empty, "suspended": False}


def test_status_counts_what_waits(url: str, redis_client: redis.Redis) -> None:
    with Client(url) as client:
        client.submit_many([{"model": "tally", "prompt": "x", "lane": "bulk"}] * 3)
    redis_client.hset(KEYS.worker("w1"), mapping={"model": "tally"})  # not registered with RQ
    redis_client.set("rq:suspended", 1)
    overview = json.loads(runner.invoke(app, ["status", "--json", "--redis-url", url]).stdout)
    (queue,) = overview["queues"]
    assert 0 <= queue.pop("oldest_seconds") < 60
    counts = {"queued": 3, "running": 0, "open": 3}
    assert queue == {"name": "tally:bulk", **counts, "isolated": []}
    assert overview["workers"] == []
    assert overview["suspended"] is True
    table = runner.invoke(app, ["status", "--redis-url", url]).stdout
    assert "tally:bulk" in table
    assert "suspended" in table


def test_a_job_is_shown_then_cancelled(url: str) -> None:
    with Client(url) as client:
        job_id = client.submit(model="tally", prompt="my secret prompt").id
    shown = runner.invoke(app, ["status", job_id, "--redis-url", url])
    assert shown.exit_code == 0
    assert "queued" in shown.stdout
    assert "secret" not in shown.stdout
    for _ in range(2):  # idempotent
        cancelled = runner.invoke(app, ["cancel", job_id, "--redis-url", url])
        assert (cancelled.exit_code, cancelled.stdout.strip()) == (0, "cancelled")
    view = json.loads(runner.invoke(app, ["status", job_id, "--json", "--redis-url", url]).stdout)
    assert (view["state"], view["cancel"], view["queue"]) == ("cancelled", None, "tally:default")
    assert view["finished"] >= view["enqueued"]


@pytest.mark.parametrize("command", ["status", "cancel", "requeue"])
def test_an_unknown_job_is_one_line(command: str, url: str) -> None:
    result = runner.invoke(app, [command, "0" * 32, "--redis-url", url])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: job_not_found: ")


def test_a_job_is_run_again_then_forgotten(url: str, redis_client: redis.Redis) -> None:
    with Client(url) as client:
        job = client.submit(model="tally", prompt="my secret prompt")
        job.cancel()
    for _ in range(2):  # idempotent
        again = runner.invoke(app, ["requeue", job.id, "--json", "--redis-url", url])
        assert json.loads(again.stdout) == {"id": job.id, "state": "queued"}
    refused = runner.invoke(app, ["forget", job.id, "--redis-url", url])
    assert refused.exit_code == 1
    assert refused.stderr == (
        f"error: job_not_ended: job {job.id} is queued: cancel it first, or wait for its end\n"
    )
    runner.invoke(app, ["cancel", job.id, "--redis-url", url])
    for _ in range(2):
        gone = runner.invoke(app, ["forget", job.id, "--redis-url", url])
        assert (gone.exit_code, gone.stdout) == (0, "")
    assert not list(redis_client.scan_iter(f"*{job.id}*"))


def test_a_job_that_does_not_finish_is_an_error(url: str) -> None:
    def cancel_soon() -> None:
        with Client(url) as client:
            client.cancel(wait_for_job(client))

    thread = Thread(target=cancel_soon)
    thread.start()
    result = runner.invoke(app, ["generate", "hello", "--redis-url", url])
    thread.join()
    assert result.exit_code == 1
    assert result.stderr.startswith("error: job_cancelled: ")


# -- doctor -----------------------------------------------------------------------------


def _checks(server: LocalRedis) -> dict[str, Check]:
    endpoint = resolve(load_settings(redis__url=server.url))
    return {check.name: check for check in redis_server.redis_checks(endpoint)}


@pytest.mark.parametrize(("appendonly", "level"), [("always", "ok"), ("everysec", "warn")])
def test_doctor_reads_a_real_servers_persistence(appendonly: str, level: str) -> None:
    with LocalRedis(appendonly=appendonly) as server:  # type: ignore[arg-type]
        checks = _checks(server)
    assert checks["redis persistence"].level == level
    assert checks["redis scripts"].level == "ok"
    assert checks["redis latency"].level == "ok"
    assert checks["redis maxmemory-policy"].level == "ok"


def test_doctor_fails_a_server_that_evicts() -> None:
    options = {"maxmemory": "64mb", "maxmemory-policy": "allkeys-lru"}
    with LocalRedis(options=options) as server:
        checks = _checks(server)
    assert checks["redis maxmemory-policy"].level == "fail"


@pytest.mark.parametrize(("evalsha", "level"), [("+evalsha", "fail"), ("-evalsha", "skip")])
def test_doctor_fails_scripts_that_an_acl_denies(
    local_redis: LocalRedis, evalsha: str, level: str
) -> None:
    """Not for a user that runs none: it is a monitor, and could not submit anyhow."""
    password = secrets.token_hex(8)
    with local_redis.client() as client:
        client.acl_setuser(
            "viewer", enabled=True, passwords=[f"+{password}"], keys=["*"],
            commands=["+info", "+ping", "+hgetall", "+script|load", evalsha],
            categories=["+@connection"],
        )  # fmt: skip
        settings = load_settings(
            redis__url=as_user(local_redis.url, "viewer"), redis__password=password
        )
        checks = {c.name: c for c in redis_server.redis_checks(resolve(settings))}
        client.acl_deluser("viewer")
    assert checks["redis scripts"].level == level
    assert checks["redis version"].level == "ok"


def test_doctor_passes_here(url: str) -> None:
    """All of it: the model loads and answers right."""
    result = runner.invoke(app, ["doctor", "--json", "--redis-url", url])
    checks = {check["name"]: check for check in json.loads(result.stdout)}
    assert [c for c in checks.values() if c["level"] == "fail"] == []
    assert result.exit_code == 0
    assert checks["model tally"]["detail"].startswith("answers right")


def test_doctor_without_redis_fails_and_still_checks_the_rest() -> None:
    result = runner.invoke(app, ["doctor", "--json", "--redis-url", "unix:///nowhere.sock"])
    checks = {check["name"]: check["level"] for check in json.loads(result.stdout)}
    assert result.exit_code == 1
    assert checks["redis"] == "fail"
    assert checks["model tally"] == "ok"


def test_a_worker_whose_name_another_has_is_warned(
    url: str, redis_client: redis.Redis, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = load_settings(redis__url=url)
    redis_client.hset(KEYS.worker("mac-1"), "pid", 1)
    require_redis(settings, "tally", "mac-2")
    require_redis(settings, "tally")
    assert capsys.readouterr().err == ""
    require_redis(settings, "tally", "mac-1")
    assert capsys.readouterr().err.startswith("warning: a worker 'mac-1' was here")
