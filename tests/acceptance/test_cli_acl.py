"""The ACL users of `ops/redis/users.acl`: each does its work, and is denied all else."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from mlx_serving.cli.overview import read_overview
from mlx_serving.common.protocol.keys import Keys
from mlx_serving.common.redis.connection import Endpoint, connect, resolve
from mlx_serving.common.redis.local import LocalRedis
from mlx_serving.common.settings import Settings, load_settings
from mlx_serving.common.states import JobState
from mlx_serving.producer.client import Client
from tests.support.helpers import wait_until
from tests.support.paths import ROOT
from tests.support.redis_users import as_user

USERS = ROOT / "ops" / "redis" / "users.acl"
KEYS = Keys()


@pytest.fixture(scope="module")
def server() -> Iterator[LocalRedis]:
    """A Redis with the users of the file; `default` stays, to look at things."""
    with LocalRedis() as redis_server, redis_server.client() as client:
        for line in USERS.read_text().splitlines():
            _, name, *rules = line.split()
            if name != "default":
                client.execute_command("ACL", "SETUSER", name, *rules)
        yield redis_server


def settings_of(server: LocalRedis, user: str) -> Settings:
    return load_settings(redis__url=as_user(server.url, user), redis__password=f"change-me-{user}")


def client_of(server: LocalRedis, user: str) -> redis.Redis:
    endpoint: Endpoint = resolve(settings_of(server, user))
    return connect(endpoint)


def test_producer_worker_and_monitor_do_their_work(
    server: LocalRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLX_SERVING_REDIS_PASSWORD", "change-me-worker")
    monkeypatch.setenv("MLX_SERVING_REDIS_URL", as_user(server.url, "worker"))
    command = [sys.executable, "-m", "mlx_serving", "worker", "--engine", "simulated"]
    worker = subprocess.Popen([*command, "--tokens-per-second", "100"], cwd=ROOT)
    try:
        with Client(settings=settings_of(server, "producer")) as client:
            done = client.submit(model="tally", prompt="x", max_tokens=5)
            assert len([event for event in done.stream() if event.type == "tokens"]) >= 1
            assert done.result(timeout=10).state is JobState.FINISHED
            running = client.submit(model="tally", prompt="x", max_tokens=100_000)
            next(running.stream())
            running.cancel()
            assert running.result(timeout=10).state is JobState.CANCELLED
        overview = read_overview(resolve(settings_of(server, "monitor")))
        assert [queue.name for queue in overview.queues] == ["tally:default"]
        assert [seen.device for seen in overview.workers] == ["simulated"]
        worker.terminate()
        assert worker.wait(30) == 0
    finally:
        worker.kill()
        worker.wait()


def test_a_producer_cancels_what_is_queued(server: LocalRedis) -> None:
    with Client(settings=settings_of(server, "producer")) as client:
        job = client.submit(model="tally", prompt="x", lane="bulk")
        assert job.cancel() is JobState.CANCELLED


DENIED = {
    "producer": [
        ["FLUSHALL"], ["KEYS", "*"], ["CONFIG", "GET", "*"], ["SET", "rq:suspended", "1"],
        ["GET", "other"], ["HSET", "mlxs:worker:w", "held", "9"], ["SMEMBERS", "rq:workers"],
        ["PUBLISH", "rq:pubsub:w", "{}"], ["EVAL", "return redis.call('GET', 'other')", "0"],
        ["SCRIPT", "FLUSH"], ["SHUTDOWN"],
    ],
    "worker": [
        ["FLUSHALL"], ["FLUSHDB"], ["KEYS", "*"], ["CONFIG", "SET", "appendonly", "no"],
        ["GET", "other"], ["SCRIPT", "FLUSH"], ["ACL", "LIST"],
        ["SHUTDOWN"],
    ],
    "monitor": [
        ["HGETALL", "rq:job:x"], ["HGETALL", "mlxs:job:x"], ["XRANGE", "mlxs:ev:x", "-", "+"],
        ["SET", "rq:suspended", "1"], ["SUBSCRIBE", "mlxs:ch:x"], ["FLUSHALL"],
        ["EVAL", "return 1", "0"], ["DEL", "rq:queue:tally:bulk"],
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("user", "command"),
    [(user, command) for user, commands in DENIED.items() for command in commands],
    ids=lambda value: value if isinstance(value, str) else " ".join(value)[:40],
)
def test_all_else_is_denied(server: LocalRedis, user: str, command: list[str]) -> None:
    with client_of(server, user) as client, pytest.raises(redis.ResponseError) as denied:
        client.execute_command(*command)
    reason = str(denied.value).lower()
    assert "no permission" in reason or "can't run this command" in reason


def test_the_file_is_one_that_redis_loads(tmp_path: Path) -> None:
    """As `aclfile`: Redis refuses to start on a line that it can't read."""
    copy = tmp_path / "users.acl"
    copy.write_text(USERS.read_text().replace("user default off", "user default on nopass +@all"))
    with LocalRedis(options={"aclfile": str(copy)}) as server, server.client() as client:
        users = json.loads(json.dumps(client.acl_users(), default=bytes.decode))
    assert set(users) == {"default", "producer", "worker", "monitor", "operator"}


def test_users_need_a_password(server: LocalRedis) -> None:
    with (
        connect(Endpoint(url=as_user(server.url, "producer"), password="")) as client,
        pytest.raises(redis.AuthenticationError),
    ):
        wait_until(client.ping)
