"""The users of `ops/redis/users.acl` on a real Redis: each does its whole work, and no more.

`tests/acceptance/test_cli_acl.py` runs the commands of the command line as these users.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
import redis

from mlx_serving import AsyncClient, Client
from mlx_serving.cli.doctor.engine import fleet_checks
from mlx_serving.cli.doctor.redis_server import redis_checks
from mlx_serving.common.errors import MissingPermission, TenantLimited
from mlx_serving.common.protocol import calls
from mlx_serving.common.protocol.client import Protocol
from mlx_serving.common.protocol.keys import Keys
from mlx_serving.common.protocol.quarantine import read_quarantined
from mlx_serving.common.protocol.scripts import NAMES, script_text
from mlx_serving.common.redis.connection import connect, resolve
from mlx_serving.common.redis.local import LocalRedis
from mlx_serving.common.states import JobState
from mlx_serving.common.tenancy import Tenancy
from mlx_serving.producer.batch.objects import Batch
from mlx_serving.producer.batch.registry import Registry, Report
from tests.support.bulk_files import simulated_line, write_lines
from tests.support.helpers import wait_until
from tests.support.odd_keys import OF_JOBS, TENANT, cases, check_quarantined_once, plant
from tests.support.paths import ROOT
from tests.support.protocol_driver import LANES, Driver
from tests.support.redis_users import as_user
from tests.support.worker_process import InProcessWorker, quick_settings, submit

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

USERS = ROOT / "ops" / "redis" / "users.acl"
UNTRUSTED = ("producer", "worker", "monitor", "operator")


def load_users(client: redis.Redis) -> None:
    """Set the users of the file up; `default` stays as it is, to look at things."""
    for line in USERS.read_text().splitlines():
        _, name, *rules = line.split()
        if name != "default":
            client.execute_command("ACL", "SETUSER", name, *rules)


@pytest.fixture(scope="module")
def server() -> Iterator[LocalRedis]:
    # Allowed by the server, so that it is the users' rules that deny.
    options = {"enable-debug-command": "yes", "enable-module-command": "yes"}
    with LocalRedis(options=options) as server, server.client() as client:
        load_users(client)
        wait_until(lambda: client.info("server")["uptime_in_seconds"] >= 5)
        yield server


@pytest.fixture
def admin(server: LocalRedis) -> Iterator[redis.Redis]:
    with server.client() as client:
        client.flushall()
        client.execute_command("ACL", "LOG", "RESET")
        yield client


def url_of(server: LocalRedis, user: str) -> str:
    return as_user(server.url, user, f"change-me-{user}")


def connection(server: LocalRedis, user: str) -> redis.Redis:
    return connect(resolve(quick_settings(url_of(server, user))))


def denials(admin: redis.Redis) -> list[tuple[str, str, str]]:
    """What Redis denied since the start of the test: user, command or key, and its kind."""
    log = admin.execute_command("ACL", "LOG")
    found = set()
    for raw in log:
        entry = raw if isinstance(raw, dict) else dict(zip(raw[::2], raw[1::2], strict=True))
        text = {str(_text(k)): str(_text(v)) for k, v in entry.items()}
        found.add((text["username"], text["object"], text["reason"]))
    return sorted(found)


def _text(value: object) -> object:
    return value.decode() if isinstance(value, bytes) else value


@pytest.mark.parametrize("user", UNTRUSTED)
def test_a_doctor_warns_of_nothing_that_its_user_may_not_see(user: str) -> None:
    """What it could not look at is said, and is neither a warning nor a failure."""
    with LocalRedis(appendonly="always") as server, server.client() as admin:
        load_users(admin)
        endpoint = resolve(quick_settings(url_of(server, user)))
        checks = [*redis_checks(endpoint), *fleet_checks(endpoint)]
    levels = {check.name: check.level.value for check in checks}
    assert set(levels.values()) <= {"ok", "skip"}, checks
    assert levels["redis persistence"] == "skip"  # CONFIG is nobody's
    unseen = {name for name, level in levels.items() if level == "skip"}
    assert unseen == {
        "worker": {"redis persistence"},
        "monitor": {"redis persistence", "redis scripts"},
        "producer": {
            "redis persistence", "redis version", "redis maxmemory-policy", "fleet",
            "redis key types",
        },
        "operator": {
            "redis persistence", "redis version", "redis maxmemory-policy", "fleet",
            "redis scripts", "redis key types",
        },
    }[user]  # fmt: skip


HARMLESS = {
    # redis-py and RQ introduce themselves, and go on without.
    ("worker", "client|list", "command"),
}


class TestTheWholePath:
    def test_submit_stream_result_status_and_cancel(
        self, server: LocalRedis, admin: redis.Redis
    ) -> None:
        """Also: the worker registers, claims, commits, renews, reaps and reconciles, as itself."""
        settings = quick_settings(url_of(server, "producer"))
        with (
            InProcessWorker(url_of(server, "worker"), rate=200),
            Client(settings=settings) as client,
        ):
            check_all(client, submit(client, 4, 5), 5)
            check_all(client, submit(client, 4, 5, prompt="marked " * 400), 5)
            assert list(admin.scan_iter("mlxs:warm:*"))
            running = client.submit(model="tally", prompt="x", max_tokens=100_000, result_ttl=60)
            next(running.stream())
            assert client.status(running.id).state is JobState.RUNNING
            running.cancel()
            assert running.result(timeout=10).state is JobState.CANCELLED
            lost = client.submit(model="tally", prompt="x", max_tokens=5, result_ttl=60)
            assert lost.result(timeout=20).text == "1 2 3 4 5"
        assert [denied for denied in denials(admin) if denied not in HARMLESS] == []

    def test_limits_are_an_operators(self, server: LocalRedis, admin: redis.Redis) -> None:
        """One sets them, a producer is refused by them, a monitor reads them."""
        endpoints = {user: resolve(quick_settings(url_of(server, user))) for user in UNTRUSTED}
        with Tenancy(endpoints["operator"]) as tenancy:
            tenancy.limit("acme", {"queued": 1})
            tenancy.limit("acme", {"running": "default"})
        fields = {"model": "tally", "prompt": "x", "result_ttl": 60, "tenant": "acme"}
        with Client(settings=quick_settings(url_of(server, "producer"))) as client:
            job = client.submit(fields)
            with pytest.raises(TenantLimited):
                client.submit(fields)
            with Tenancy(endpoints["monitor"]) as tenancy:
                (view,) = tenancy.view().tenants
            assert (view.tenant, view.queued, view.queued_limit) == ("acme", 1, 1)
            with InProcessWorker(url_of(server, "worker"), rate=200):
                job.result(timeout=10)
            cancelled = client.submit(fields)
            assert cancelled.cancel() is JobState.CANCELLED
            assert client.requeue(cancelled.id) is JobState.QUEUED
            cancelled.cancel()
            cancelled.forget()
        assert not admin.exists("mlxs:tenants")
        assert [denied for denied in denials(admin) if denied not in HARMLESS] == []

    def test_the_async_client(self, server: LocalRedis, admin: redis.Redis) -> None:
        settings = quick_settings(url_of(server, "producer"))

        async def use() -> str:
            async with AsyncClient(settings=settings) as client:
                job = await client.submit(model="tally", prompt="x", max_tokens=5, result_ttl=60)
                async for _ in job.stream():
                    pass
                return (await job.result(timeout=10)).text

        with InProcessWorker(url_of(server, "worker"), rate=200):
            assert asyncio.run(use()) == "1 2 3 4 5"
        assert [denied for denied in denials(admin) if denied not in HARMLESS] == []

    def test_a_bulk_file(self, server: LocalRedis, admin: redis.Redis, tmp_path: Path) -> None:
        batches = Client(settings=quick_settings(url_of(server, "producer"))).batches
        path = write_lines(tmp_path / "in.jsonl", map(simulated_line, range(1, 6)))
        batch = batches.submit(path, start=False)
        with InProcessWorker(url_of(server, "worker"), rate=200):
            assert batches.run(batch.id).request_counts.completed == 5
        batch = batches.submit(path, start=False)
        batches.cancel(batch.id)
        assert batches.wait(batch.id, timeout=20).status == "cancelled"
        assert batches.report().batch.id == batch.id
        assert [denied for denied in denials(admin) if denied not in HARMLESS] == []

    @pytest.mark.parametrize("state", ["queued", "mangled", "expired", "running"])
    def test_a_producer_cancels_in_every_state(
        self, server: LocalRedis, admin: redis.Redis, state: str
    ) -> None:
        driver = Driver(connection(server, "worker"))
        producer = Protocol(connection(server, "producer"), Keys())
        Driver(producer.redis).enqueue("a", deadline_ms=1 if state == "expired" else 0)
        if state == "mangled":
            admin.hset("mlxs:job:a", "ep", "x")
        elif state == "running":
            driver.take()
        reply = producer.run(calls.cancel("a", "enough"))
        assert reply in {JobState.CANCELLED, JobState.RUNNING, JobState.FAILED}
        assert (reply is JobState.RUNNING) == (state == "running")
        assert denials(admin) == []

    @pytest.mark.parametrize(("key", "kind"), cases(OF_JOBS))
    def test_producer_and_worker_go_on_past_an_odd_key(
        self, server: LocalRedis, admin: redis.Redis, key: str, kind: str
    ) -> None:
        """Whoever meets it moves it aside; a producer may not move an operator's."""
        producer, worker = (Driver(connection(server, user)) for user in ("producer", "worker"))
        operators = key in {"mlxs:limits", "rq:suspended"}
        plant(admin, key, kind)
        assert producer.enqueue("a", tenant=TENANT, deadline_ms=60_000).created
        assert producer.cancel("a") is JobState.CANCELLED
        if not operators and not key.startswith(("mlxs:leases", "rq:wip")):
            check_quarantined_once(admin, key, kind)
        attempt = worker.start("b", tenant=TENANT, deadline_ms=60_000)
        assert worker.commit(attempt, attempt.row(), attempt.end()) == ["OK", "OK"]
        check_quarantined_once(admin, key, kind)
        assert [moved.key for moved in read_quarantined(connection(server, "monitor"), Keys())] == [
            key
        ]
        assert {denied[1] for denied in denials(admin)} <= {key}

    def test_a_producers_reports_on_batches_go_on_past_odd_keys(
        self, server: LocalRedis, admin: redis.Redis
    ) -> None:
        plant(admin, "mlxs:batches", "string")
        plant(admin, "mlxs:batch:b1", "list")
        report = Report(batch=Batch(id="b1", input_file_id="x", created_at=1), folder="x")
        with Registry(quick_settings(url_of(server, "producer"))) as registry:
            registry.tell(report)
            assert [each.batch.id for each in registry.reports()] == ["b1"]
        assert denials(admin) == []

    @pytest.mark.parametrize("kind", ["string", "list", "set", "zset", "stream"])
    def test_a_producer_enqueues_where_the_control_hash_is_odd(
        self, server: LocalRedis, admin: redis.Redis, kind: str
    ) -> None:
        """It may not rename jobs, so it deletes what is there."""
        plant(admin, "mlxs:job:a", kind)
        producer = Driver(connection(server, "producer"))
        assert producer.enqueue("a").created
        producer.cancel("a")

    def test_a_worker_reaps_reconciles_and_hands_back(
        self, server: LocalRedis, admin: redis.Redis
    ) -> None:
        producer, worker = (Driver(connection(server, user)) for user in ("producer", "worker"))
        for job_id in ("lapsed", "released", "fallen", "late"):
            producer.enqueue(job_id, deadline_ms=1 if job_id == "late" else 0)
        admin.lrem("rq:queue:tally:default", 1, "fallen")
        attempts = {job.job_id: job for job in worker.claim().jobs}
        assert {"lapsed", "released"} <= set(attempts)
        worker.protocol.run(calls.release("w1", [calls.Returned(attempts["released"].attempt)]))
        worker.lapse("lapsed")
        assert dict(worker.reap().outcomes)["lapsed"] == "requeued"
        found = worker.protocol.run(calls.reconcile(LANES[1], ["fallen"], lease_ms=1000))
        assert found.outcomes == [("fallen", "requeued")]
        assert denials(admin) == []

    def test_a_monitor_runs_rq_info_beside_a_living_and_a_dead_worker(
        self, server: LocalRedis, admin: redis.Redis
    ) -> None:
        """`rq info` writes too: it trims registries and strikes off workers that are gone."""
        settings = quick_settings(url_of(server, "producer"))
        url = f"unix://monitor:change-me-monitor@{server.socket}"
        command = [sys.executable, "-m", "rq.cli", "info", "--url", url]
        with (
            InProcessWorker(url_of(server, "worker"), name="alive", rate=100),
            Client(settings=settings) as client,
        ):
            check_all(client, submit(client, 2, 5), 5)
            running = client.submit(model="tally", prompt="x", max_tokens=100_000, result_ttl=60)
            next(running.stream())
            for key in ("rq:workers", "rq:workers:tally:default"):
                admin.sadd(key, "rq:worker:dead")
            done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
            running.cancel()
            running.result(timeout=10)
        assert (done.returncode, done.stderr) == (0, "")
        assert "1 executing, 2 finished" in done.stdout
        assert "alive" in done.stdout
        assert admin.sismember("rq:workers", "rq:worker:dead") == 0
        assert [denied for denied in denials(admin) if denied not in HARMLESS] == []


def check_all(client: Client, handles: list[Any], tokens: int) -> None:
    """Check every answer over the producer's own connection."""
    for handle in handles:
        assert handle.result(timeout=10).token_ids == list(range(1, tokens + 1))
        assert [event.seq for event in client.stream(handle.id)][:1] == [1]


EVERYONE = [
    ["FLUSHALL"], ["FLUSHDB"], ["KEYS", "*"], ["SCAN", "0"], ["RANDOMKEY"], ["DBSIZE"],
    ["CONFIG", "GET", "*"], ["CONFIG", "SET", "dir", "/x"], ["DEBUG", "SLEEP", "0"],
    ["SHUTDOWN", "NOSAVE"], ["SAVE"], ["BGREWRITEAOF"], ["REPLICAOF", "127.0.0.1", "1"],
    ["SLAVEOF", "NO", "ONE"], ["MODULE", "LOAD", "/x.so"], ["ACL", "SETUSER", "x", "on"],
    ["ACL", "GETUSER", "producer"], ["MONITOR"], ["CLIENT", "LIST"],
    ["CLIENT", "KILL", "TYPE", "normal"],
    ["MIGRATE", "h", "1", "k", "0", "9"], ["SWAPDB", "0", "1"], ["SLOWLOG", "GET"],
    ["SCRIPT", "FLUSH"], ["SCRIPT", "KILL"], ["EVAL", "return 1", "0"],
    ["EVAL_RO", "return 1", "0"],
    ["FUNCTION", "LOAD", "#!lua name=x"], ["FUNCTION", "FLUSH"], ["PUBSUB", "CHANNELS"],
    ["GET", "other:key"], ["SET", "other:key", "1"], ["HGETALL", "other:job:x"],
    ["PUBLISH", "other:channel", "x"], ["SUBSCRIBE", "other:channel"], ["PSUBSCRIBE", "*"],
]  # fmt: skip

OWN = {
    "producer": [
        ["SET", "rq:suspended", "1"], ["HSET", "mlxs:worker:w", "held", "9"],
        ["HGETALL", "mlxs:worker:w"], ["HGETALL", "rq:worker:w"], ["SMEMBERS", "rq:workers"],
        ["DEL", "rq:workers"], ["PUBLISH", "rq:pubsub:w", '{"command": "shutdown"}'],
        ["SUBSCRIBE", "rq:pubsub:w"], ["HGET", "rq:job:x", "data"], ["HGETALL", "rq:job:x"],
        ["LRANGE", "rq:queue:tally:default", "0", "-1"], ["LPUSH", "rq:queue:tally:default", "x"],
        ["ZRANGE", "mlxs:open:tally:default", "0", "-1"], ["XRANGE", "rq:results:x", "-", "+"],
        ["RENAME", "mlxs:job:x", "mlxs:job:y"], ["COPY", "mlxs:job:x", "mlxs:job:y"],
        ["PSUBSCRIBE", "mlxs:ch:*"], ["SMEMBERS", "rq:queues"], ["INFO"], ["MULTI"],
        ["HSET", "mlxs:limits", "queued:x", "9"], ["DEL", "mlxs:limits"],
        ["SMEMBERS", "mlxs:tenants"], ["SMEMBERS", "mlxs:tenant:x:queued"],
        ["LRANGE", "mlxs:line:tally:default:x", "0", "-1"], ["DEL", "mlxs:warm:x"],
        # What it may move aside, it may not read afterwards, nor bring to where it could.
        ["ZRANGE", "mlxs:quarantine", "0", "-1"], ["RENAME", "mlxs:quarantine", "mlxs:batch:x"],
        ["ZRANGE", "mlxs:quarantine:mlxs:open:x:1", "0", "-1"],
        ["RENAME", "mlxs:quarantine:mlxs:open:x:1", "mlxs:batch:x"],
        ["RENAME", "mlxs:open:tally:default", "mlxs:batch:x"],
        ["RENAME", "mlxs:open:tally:default", "mlxs:job:x"],
        ["RENAME", "mlxs:batch:x", "mlxs:job:x"], ["RENAME", "rq:job:x", "mlxs:quarantine:x"],
        ["RENAME", "mlxs:job:x", "mlxs:quarantine:x"],
        ["RENAME", "mlxs:worker:w", "mlxs:quarantine:x"],
        ["RENAME", "rq:suspended", "mlxs:quarantine:x"],
        ["RENAME", "mlxs:limits", "mlxs:quarantine:x"],
        ["RENAME", "mlxs:open:tally:default", "rq:suspended"],
    ],
    "worker": [
        ["RENAME", "mlxs:job:x", "other"], ["COPY", "mlxs:job:x", "other"],
        ["RESTORE", "mlxs:job:x", "0", "x"], ["SORT", "mlxs:open:x"],
        ["OBJECT", "FREQ", "other"], ["SINTERSTORE", "mlxs:x", "other"],
        ["SPUBLISH", "other", "x"], ["XREAD", "STREAMS", "other", "0"],
    ],
    "monitor": [
        ["HGETALL", "rq:job:x"], ["HGETALL", "mlxs:job:x"], ["XRANGE", "mlxs:ev:x", "-", "+"],
        ["SUBSCRIBE", "mlxs:ch:x"], ["SET", "rq:suspended", "1"], ["DEL", "rq:suspended"],
        ["DEL", "rq:queue:tally:bulk"], ["LPUSH", "rq:queue:tally:default", "x"],
        ["SREM", "rq:queues", "rq:queue:tally:default"], ["HSET", "mlxs:worker:w", "held", "9"],
        ["ZREMRANGEBYSCORE", "mlxs:open:tally:default", "0", "1"],
        ["ZREMRANGEBYSCORE", "mlxs:leases:tally:default", "0", "1"],
        ["ZREMRANGEBYSCORE", "rq:wip:tally:default", "0", "1"], ["SADD", "rq:workers", "x"],
        ["EVALSHA", "0" * 40, "0"], ["SCRIPT", "LOAD", "return 1"],
        ["PUBLISH", "mlxs:ctl:w", "cancel x"], ["XADD", "mlxs:ev:x", "*", "e", "x"],
        ["HSET", "mlxs:limits", "queued", "9"], ["DEL", "mlxs:warm:x"],
        ["DEL", "mlxs:quarantine"], ["ZRANGE", "mlxs:quarantine:mlxs:open:x:1", "0", "-1"],
    ],
    "operator": [
        ["HGETALL", "mlxs:job:x"], ["HGETALL", "rq:job:x"], ["XRANGE", "mlxs:ev:x", "-", "+"],
        ["HSET", "mlxs:job:x", "st", "x"], ["DEL", "mlxs:limits"], ["EVALSHA", "0" * 40, "0"],
        ["SADD", "mlxs:tenant:x:queued", "a"], ["PUBLISH", "mlxs:ctl:w", "cancel x"],
        ["DEL", "mlxs:warm:x"], ["DEL", "mlxs:quarantine"],
        ["RENAME", "mlxs:limits", "mlxs:quarantine:x"],
    ],
}  # fmt: skip

FORBIDDEN = [
    (user, command) for user in UNTRUSTED for command in [*EVERYONE, *OWN[user]]
]  # fmt: skip


@pytest.mark.parametrize(
    ("user", "command"),
    FORBIDDEN,
    ids=lambda value: value if isinstance(value, str) else " ".join(value)[:60],
)
def test_forbidden(server: LocalRedis, user: str, command: list[str]) -> None:
    with connection(server, user) as client, pytest.raises(redis.RedisError) as denied:
        client.execute_command(*command)
    reason = str(denied.value).lower()
    assert "no permission" in reason or "permissions" in reason, reason


DENIED = (
    r"can't run this command|can't access at least one|can't publish to|not allowed from script"
)


class TestScripts:
    """A producer's scripts run with the producer's own permissions, so they gain it nothing."""

    @pytest.mark.parametrize(
        "body",
        [
            "return redis.call('GET', 'other:key')",
            "return redis.call('HGETALL', 'rq:job:x')",
            "return redis.call('KEYS', '*')",
            "return redis.call('SET', 'rq:suspended', '1')",
            "return redis.call('PUBLISH', 'rq:pubsub:w', '{}')",
            "return redis.call('CONFIG', 'SET', 'dir', '/x')",
            "return redis.call('SCRIPT', 'FLUSH')",
        ],
    )
    def test_a_script_of_its_own_is_denied_the_same(self, server: LocalRedis, body: str) -> None:
        with connection(server, "producer") as client:
            digest = client.script_load(body)
            with pytest.raises(redis.ResponseError, match=DENIED):
                client.evalsha(digest, 0)

    def test_without_script_load_a_producer_runs_what_an_admin_loaded_and_nothing_else(
        self, server: LocalRedis, admin: redis.Redis
    ) -> None:
        """The tighter variant of docs/how-to/security.md: no script of its own, no endless loop."""
        rules = next(
            line.split()[2:] for line in USERS.read_text().splitlines() if "user producer" in line
        )
        admin.execute_command("ACL", "SETUSER", "locked", *rules, "-script")
        settings = quick_settings(as_user(server.url, "locked", "change-me-producer"))
        admin.script_flush()
        try:
            with Client(settings=settings) as client:
                with pytest.raises(MissingPermission, match="permission"):
                    client.submit(model="tally", prompt="x", result_ttl=60)
                for name in NAMES:
                    admin.script_load(script_text(name))
                job = client.submit(model="tally", prompt="x", result_ttl=60)
                assert job.cancel() is JobState.CANCELLED
                assert job.result(timeout=5).state is JobState.CANCELLED
            with (
                connect(resolve(settings)) as connection_,
                pytest.raises(redis.ResponseError, match="permission"),
            ):
                connection_.script_load("while true do end")
        finally:
            with suppress(redis.ResponseError):
                admin.execute_command("ACL", "DELUSER", "locked")


def test_at_least_sixteen_actions_are_denied_to_each() -> None:
    assert {user: len(EVERYONE) + len(OWN[user]) >= 16 for user in UNTRUSTED} == dict.fromkeys(
        UNTRUSTED, True
    )
