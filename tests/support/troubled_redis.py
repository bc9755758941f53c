"""A real redis-server brought into each kind of trouble, and what a client is to be told of it."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from mlx_serving.common.errors import (
    MissingPermission,
    MlxServingError,
    QueueUnavailable,
    RedisCrowded,
    RedisFull,
    RedisReadOnly,
    UnsupportedRedis,
    WrongCredentials,
    WrongDatabase,
)
from mlx_serving.common.redis.local import LocalRedis
from tests.support.helpers import free_port, wait_until
from tests.support.redis_users import as_user

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import redis

SECRET = "my-secret-word"  # noqa: S105 -- made up, to be looked for in errors


CROWD: list[redis.Redis] = []


class Trouble(NamedTuple):
    """`make` brings a server into it, and returns the URL that a client uses.

    `writes`, `reads`: whether the calls that write, and those that only read, are told.
    """

    told: type[MlxServingError]
    make: Callable[[LocalRedis], str]
    writes: bool = True
    reads: bool = True


def wrong_password(server: LocalRedis) -> str:
    with server.client() as admin:
        admin.acl_setuser("app", enabled=True, passwords=["+right"], keys=["*"], commands=["+@all"])
    return as_user(server.url, "app", SECRET)


def no_password(server: LocalRedis) -> str:
    with server.client() as admin:
        admin.config_set("requirepass", SECRET)
    return server.url


def password_for_nothing(server: LocalRedis) -> str:
    return as_user(server.url, "", SECRET)


def denied(*rules: str) -> Callable[[LocalRedis], str]:
    """Let a user do all but what the rules take away."""

    def make(server: LocalRedis) -> str:
        with server.client() as admin:
            everything = ("on", f">{SECRET}", "~*", "&*", "+@all")
            admin.execute_command("ACL", "SETUSER", "app", *everything, *rules)
        return as_user(server.url, "app", SECRET)

    return make


def full(server: LocalRedis) -> str:
    with server.client() as admin:
        admin.config_set("maxmemory", "100kb")
    return server.url


def replica(server: LocalRedis) -> str:
    with server.client() as admin:
        admin.replicaof("127.0.0.1", free_port())
    return server.url


def without_replicas(server: LocalRedis) -> str:
    with server.client() as admin:
        admin.config_set("min-replicas-to-write", "1")
    return server.url


def broken_disk(server: LocalRedis) -> str:
    with server.client() as admin:
        admin.config_set("save", "3600 1000000")
        (server.folder / "dump.rdb").mkdir()  # BGSAVE can't replace a folder
        admin.bgsave()
        wait_until(lambda: admin.info("persistence")["rdb_last_bgsave_status"] == "err")
    return server.url


def no_such_database(server: LocalRedis) -> str:
    return f"{server.url}?db=99"


def crowded(server: LocalRedis) -> str:
    CROWD.append(server.client())  # the one client that is let in
    CROWD[-1].config_set("maxclients", "1")
    CROWD[-1].client_kill_filter(_type="normal", skipme=True)
    return server.url


def gone(server: LocalRedis) -> str:
    server.kill()
    return server.url


def unresolved(_server: LocalRedis) -> str:
    return f"redis://:{SECRET}@no-such-host.invalid:6379/0"


def shut_port(_server: LocalRedis) -> str:
    return f"redis://:{SECRET}@127.0.0.1:{free_port()}/0"


def lonely_cluster(server: LocalRedis) -> str:
    """Every slot is its own, so that most commands would work."""
    with server.client() as admin:
        admin.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        wait_until(lambda: b"cluster_state:ok" in admin.execute_command("CLUSTER", "INFO"))
    return server.url


TROUBLES = {
    "wrong password": Trouble(WrongCredentials, wrong_password),
    "no password given": Trouble(WrongCredentials, no_password),
    "a password where none is set": Trouble(WrongCredentials, password_for_nothing),
    "no such database": Trouble(WrongDatabase, no_such_database),
    "may run no script": Trouble(MissingPermission, denied("-evalsha"), reads=False),
    "may not write in scripts": Trouble(MissingPermission, denied("-hset"), reads=False),
    "may touch no key": Trouble(MissingPermission, denied("resetkeys")),
    "may not publish": Trouble(MissingPermission, denied("resetchannels"), reads=False),
    "may not read": Trouble(MissingPermission, denied("-hgetall", "-hmget"), writes=False),
    "full": Trouble(RedisFull, full, reads=False),
    "a replica": Trouble(RedisReadOnly, replica, reads=False),
    "lacks replicas": Trouble(RedisReadOnly, without_replicas, reads=False),
    "can't save": Trouble(RedisReadOnly, broken_disk, reads=False),
    "crowded": Trouble(RedisCrowded, crowded),
    "gone": Trouble(QueueUnavailable, gone),
    "no such host": Trouble(QueueUnavailable, unresolved),
    "nobody listens": Trouble(QueueUnavailable, shut_port),
    "a Cluster": Trouble(UnsupportedRedis, lonely_cluster, reads=False),
}


@contextmanager
def in_trouble(name: str) -> Iterator[str]:
    """Yield the URL of a server of its own that is in this trouble."""
    options, port = {}, 0
    if name == "a Cluster":  # its bus is on a port of its own: two tests may run at once
        port = free_port()
        options = {"cluster-enabled": "yes", "cluster-port": str(free_port())}
    with LocalRedis(port=port, options=options) as server:
        try:
            yield TROUBLES[name].make(server)
        finally:
            for client in CROWD:
                client.close()
            CROWD.clear()
            server.kill()  # one that can't save would not end in order
