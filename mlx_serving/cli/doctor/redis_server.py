"""Checks of Redis: reachable, recent, durable, and that it does not evict keys."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any, Final

import redis

from mlx_serving.cli.console import harmless
from mlx_serving.cli.doctor.report import MAY_NOT_LOOK, Check, Level
from mlx_serving.cli.overview import look, oddities
from mlx_serving.common.errors import MissingPermission, QueueFailure, UnsupportedRedis, summary
from mlx_serving.common.redis.connection import connect
from mlx_serving.common.redis.retrying import answered
from mlx_serving.common.redis.server import (
    NOEVICTION,
    POLICY,
    Server,
    check_scripts,
    read_server,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mlx_serving.common.redis.connection import Endpoint

PINGS: Final = 20
SLOW_PING_MS: Final = 5.0
OLDEST: Final = (7, 0, 0)
TESTED: Final = (7, 0, 15)
# INFO has no package version, so this can only be said, not checked.
DEBIAN_ADVICE: Final = (
    "on Debian 12 keep the package at 7.0.15-1~deb12u10 or newer (CVE-2026-81934); "
    "INFO doesn't tell which one it is"
)


def redis_checks(endpoint: Endpoint) -> Iterator[Check]:
    """Check the Redis of an endpoint; if it does not answer, that is the only outcome."""
    with connect(endpoint) as client:
        try:
            answered(client.ping)
            server = read_server(client)
        except QueueFailure as error:
            yield Check("redis", Level.FAIL, f"{error.code}: {error}")
            return
        looks: dict[str, Callable[[], Check]] = {
            "version": lambda: check_version(client),
            "persistence": lambda: check_persistence(client),
            "maxmemory-policy": lambda: check_eviction(server),
            "mode": lambda: check_mode(server),
            "latency": lambda: check_latency(client),
            "key types": lambda: check_key_types(client, endpoint),
            "scripts": lambda: check_protocol(client, endpoint),
        }
        for name, check in looks.items():
            yield _looked(f"redis {name}", check)


def _looked(name: str, check: Callable[[], Check]) -> Check:
    """A check's outcome; it says so if this user may not look."""
    try:
        return answered(check)
    except MissingPermission:
        return Check(name, Level.SKIP, MAY_NOT_LOOK)
    except QueueFailure as error:
        return Check(name, Level.FAIL, f"{error.code}: {error}")


def check_version(client: redis.Redis) -> Check:
    """Compare the version with what this is tested on."""
    text = str(_info(client, "server").get("redis_version", "0"))
    version = tuple(int(part) for part in text.split(".")[:3] if part.isdigit())
    if version < OLDEST:
        return Check("redis version", Level.FAIL, f"{text}; 7.0 or newer is needed")
    if version < TESTED:
        return Check("redis version", Level.WARN, f"{text}; tested on 7.0.15; {DEBIAN_ADVICE}")
    advice = f"; {DEBIAN_ADVICE}" if version == TESTED else ""
    return Check("redis version", Level.OK, f"{text}{advice}")


def check_persistence(client: redis.Redis) -> Check:
    """Report what a crash of Redis, or of its machine, would lose."""
    if not int(_info(client, "persistence").get("aof_enabled", 0)):
        detail = (
            "appendonly no: a Redis restart loses jobs that were acknowledged (D1 does not "
            "hold); set appendonly yes, appendfsync always"
        )
        return Check("redis persistence", Level.WARN, detail)
    fsync = _configured(client, "appendfsync")
    if fsync is None:
        detail = "AOF is on; this user may not read appendfsync, which must be always (D1, D2)"
        return Check("redis persistence", Level.SKIP, detail)
    if fsync == "always":
        detail = "AOF always: no acknowledged job is lost by a crash of Redis or its machine (D1)"
        return Check("redis persistence", Level.OK, detail)
    detail = (
        f"AOF {fsync}: a crash of redis-server loses nothing, but a power loss may take the "
        "last second or more of acknowledged jobs and events; D1 and D2 need appendfsync always"
    )
    return Check("redis persistence", Level.WARN, detail)


def check_eviction(server: Server) -> Check:
    """An evicted key is a lost job."""
    name = f"redis {POLICY}"
    if server.policy is None:
        return Check(name, Level.SKIP, "this user may not read it; it must be noeviction")
    if server.policy == NOEVICTION:
        return Check(name, Level.OK, NOEVICTION)
    if server.evicts:
        detail = f"{server.policy} deletes jobs when Redis is full, so that no worker serves here"
        return Check(name, Level.FAIL, f"{detail}; set noeviction")
    detail = f"{server.policy}: harmless while maxmemory is 0; set noeviction"
    return Check(name, Level.WARN, detail)


def check_mode(server: Server) -> Check:
    """A Cluster can't hold a queue."""
    if server.mode is None:
        detail = "this user may not read whether it is a Cluster, which can't hold a queue"
        return Check("redis mode", Level.SKIP, detail)
    if server.mode == "cluster":
        detail = f"{UnsupportedRedis.code}: {summary(UnsupportedRedis)}"
        return Check("redis mode", Level.FAIL, detail)
    return Check("redis mode", Level.OK, server.mode)


def check_latency(client: redis.Redis) -> Check:
    """Time round trips: each flush of tokens needs one."""
    samples = []
    for _ in range(PINGS):
        began = time.perf_counter()
        client.ping()
        samples.append((time.perf_counter() - began) * 1000)
    median, worst = statistics.median(samples), max(samples)
    level = Level.WARN if median > SLOW_PING_MS else Level.OK
    return Check("redis latency", level, f"ping p50 {median:.2f} ms, max {worst:.2f} ms")


def check_key_types(client: redis.Redis, endpoint: Endpoint) -> Check:
    """Look for keys of a wrong type, those that were quarantined too."""
    found = oddities(look(client, endpoint.keys))
    if not found:
        return Check("redis key types", Level.OK, "no key of a wrong type")
    detail = f"somebody else writes to our keys: {'; '.join(found)}"
    return Check("redis key types", Level.WARN, harmless(detail))


def check_protocol(client: redis.Redis, endpoint: Endpoint) -> Check:
    """Run one script of the protocol; a user that may run none, as a monitor, needs none."""
    name = "redis scripts"
    try:
        check_scripts(client, endpoint.keys)
    except MissingPermission as error:
        if "evalsha" in str(error):
            return Check(name, Level.SKIP, MAY_NOT_LOOK)
        return Check(name, Level.FAIL, f"{error.code}: {error}")
    return Check(name, Level.OK, "the protocol's scripts run")


def _info(client: redis.Redis, section: str) -> dict[str, Any]:
    return dict(client.info(section))


def _configured(client: redis.Redis, name: str) -> str | None:
    """One directive; None if this user or a hosted service forbids CONFIG."""
    try:
        return str(dict(client.config_get(name)).get(name, "(unknown fsync)"))
    except redis.ResponseError:
        return None
