"""A Redis that answers, but not as one would like: full, read-only, closed, crowded (D10).

The worker waits and goes on afterwards; the producer gets an error with a code, soon; no row is
half-written.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from mlx_serving import Client, JobState
from mlx_serving.common.errors import (
    MissingPermission,
    QueueFailure,
    QueueUnavailable,
    RedisCrowded,
    RedisFull,
    RedisReadOnly,
    WrongCredentials,
)
from mlx_serving.common.redis.connection import Endpoint, connect
from mlx_serving.common.redis.local import LocalRedis
from tests.support.helpers import free_port, wait_until
from tests.support.redis_trouble import Followers, check_results, check_view
from tests.support.worker_process import LEASE_SECONDS, WorkerProcess, submit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import redis

pytestmark = pytest.mark.chaos

TOKENS, JOBS, RATE = 120, 8, 30
LONG = LEASE_SECONDS + 1.5  # the trouble outlasts every lease
JOB = {"model": "tally", "prompt": "x", "result_ttl": 60}


@pytest.fixture
def server() -> Iterator[LocalRedis]:
    with LocalRedis(appendonly="always", port=free_port()) as server:
        yield server
        server.kill()  # one that can't save would not end in order


@pytest.fixture
def admin(server: LocalRedis) -> Iterator[redis.Redis]:
    """A connection that stays, whatever happens to new ones."""
    with connect(Endpoint(url=server.url)) as client:
        client.ping()
        yield client


def refused(
    client: Client, kinds: type[QueueFailure] | tuple[type[QueueFailure], ...], within: float = 8
) -> QueueFailure:
    """What a submit is told, and how soon."""
    began = time.monotonic()
    with pytest.raises(QueueFailure) as raised:
        client.submit(JOB)
    assert time.monotonic() - began < within
    assert type(raised.value) in (kinds if isinstance(kinds, tuple) else (kinds,))
    return raised.value


def endure(
    server: LocalRedis,
    client: Client,
    trouble: Callable[[], object],
    relief: Callable[[], object],
    told: type[QueueFailure] | tuple[type[QueueFailure], ...],
) -> str:
    """Run jobs through trouble; returns the worker's log."""
    with WorkerProcess(server.url, "only", rate=RATE) as worker:
        worker.serving()
        followers = Followers(client, submit(client, JOBS, TOKENS))
        wait_until(lambda: min(followers.tokens()) > 5, timeout=20)
        trouble()
        refused(client, told)
        time.sleep(LONG)
        assert {len(e) for e in followers.events.values()} != {TOKENS}
        relief()
        more = submit(client, 4, 20)
        followers.finish()
        followers.check(TOKENS)
        check_results(client, followers.events, TOKENS)
        check_results(client, [handle.id for handle in more], 20)
        assert followers.attempts() == [1] * JOBS
        assert worker.process.poll() is None
        with server.client() as connection:
            check_view(connection, followers.events)
        return worker.whole_log()


def test_memory_is_full(server: LocalRedis, client: Client, admin: redis.Redis) -> None:
    keys_before = 0

    def fill() -> None:
        admin.config_set("maxmemory", "1mb")
        nonlocal keys_before
        keys_before = admin.zcard(client.keys.open("tally:default"))

    def raise_it() -> None:
        # Nothing of the job that was refused is there.
        assert admin.zcard(client.keys.open("tally:default")) == keys_before
        assert len(list(admin.scan_iter("rq:job:*"))) == keys_before
        admin.config_set("maxmemory", "0")

    log = endure(server, client, fill, raise_it, RedisFull)
    assert log.count("redis_write_failed") == 1
    assert log.count("redis_unavailable") <= 1


def test_it_cannot_save(server: LocalRedis, client: Client, admin: redis.Redis) -> None:
    def fail_to_save() -> None:
        admin.config_set("save", "3600 1000000")
        (server.folder / "dump.rdb").mkdir()  # BGSAVE can't replace a folder
        admin.bgsave()
        wait_until(lambda: admin.info("persistence")["rdb_last_bgsave_status"] == "err")

    def save_again() -> None:
        admin.config_set("stop-writes-on-bgsave-error", "no")

    log = endure(server, client, fail_to_save, save_again, RedisReadOnly)
    assert log.count("redis_write_failed") == 1


def test_it_is_a_replica(server: LocalRedis, client: Client, admin: redis.Redis) -> None:
    """As after a demotion; its primary is away, so that the data stay."""

    def demote() -> None:
        admin.config_set("replica-serve-stale-data", "yes")
        admin.replicaof("127.0.0.1", free_port())

    log = endure(server, client, demote, lambda: admin.replicaof("NO", "ONE"), RedisReadOnly)
    assert log.count("redis_write_failed") == 1


def test_its_password_changed(server: LocalRedis, client: Client, admin: redis.Redis) -> None:
    def close() -> None:
        admin.config_set("requirepass", "another")
        admin.client_kill_filter(_type="normal", skipme=True)
        admin.client_kill_filter(_type="pubsub", skipme=True)

    followed: list[Exception] = []

    def open_again() -> None:
        with pytest.raises(WrongCredentials) as raised:
            client.status("0" * 32)
        followed.append(raised.value)
        admin.config_set("requirepass", "")

    with WorkerProcess(server.url, "only", rate=RATE) as worker:
        worker.serving()
        ids = [handle.id for handle in submit(client, JOBS, TOKENS)]
        wait_until(lambda: all(client.status(i).seq > 5 for i in ids), timeout=20)
        close()
        refused(client, WrongCredentials, within=2)
        time.sleep(LONG)
        open_again()
        followers = Followers(client)
        for job_id in ids:
            followers.follow(job_id)
        followers.finish()
        followers.check(TOKENS)
        check_results(client, ids, TOKENS)
        assert followers.attempts() == [1] * JOBS
        assert worker.process.poll() is None
        log = worker.whole_log()
        assert log.count("redis_write_failed") == 1
        assert log.count("redis_unavailable") == 1
        assert "another" not in log
        assert followed


def test_a_permission_is_taken_away(server: LocalRedis, client: Client, admin: redis.Redis) -> None:
    """By ACL, from inside the scripts: rows wait, and none is written by half."""
    admin.acl_setuser("default", enabled=True, nopass=True, keys=["*"], channels=["*"],
                      commands=["+@all"])  # fmt: skip

    def take() -> None:
        admin.execute_command("ACL", "SETUSER", "default", "-xadd", "-hset")

    def give() -> None:
        admin.execute_command("ACL", "SETUSER", "default", "+xadd", "+hset")

    endure(server, client, take, give, MissingPermission)


def test_there_are_too_many_clients(server: LocalRedis, client: Client, admin: redis.Redis) -> None:
    """All connections are gone and no new ones are let in."""

    def crowd() -> None:
        admin.config_set("maxclients", "1")
        admin.client_kill_filter(_type="normal", skipme=True)
        admin.client_kill_filter(_type="pubsub", skipme=True)

    # Which text a client sees of a connection that is refused is a matter of timing.
    log = endure(
        server,
        client,
        crowd,
        lambda: admin.config_set("maxclients", "1000"),
        (RedisCrowded, QueueUnavailable),
    )
    assert log.count("redis_write_failed") == 1


def test_a_worker_that_starts_while_redis_is_away_serves_when_it_is_back(
    server: LocalRedis, client: Client
) -> None:
    ids = [handle.id for handle in submit(client, 2, 20)]
    server.kill()
    with WorkerProcess(server.url, "early", rate=RATE) as worker:
        wait_until(lambda: "redis_unavailable" in worker.log(), timeout=20)
        server.start()
        check_results(client, ids, 20)
        assert worker.process.poll() is None
        assert {client.status(i).state for i in ids} == {JobState.FINISHED}
