"""Checks of Redis: reachable, recent, durable, and that it does not evict keys."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any, Final

import redis

from mlx_serving.cli.console import harmless
from mlx_serving.cli.doctor.report import Check, Level
from mlx_serving.cli.overview import look, oddities
from mlx_serving.common.protocol import calls
from mlx_serving.common.protocol.client import Protocol
from mlx_serving.common.redis.connection import connect

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
            client.ping()
        except (redis.RedisError, OSError) as error:
            yield Check("redis", Level.FAIL, f"does not answer: {error}")
            return
        looks: list[Callable[[redis.Redis], Check]] = [
            check_version, check_persistence, check_eviction, check_latency,
        ]  # fmt: skip
        for check in looks:
            try:
                yield check(client)
            except redis.RedisError as error:  # an ACL user may not be allowed to look
                name = check.__name__.removeprefix("check_")
                yield Check(f"redis {name}", Level.WARN, f"can't be read: {error}")
        yield check_key_types(client, endpoint)
        yield check_scripts(client, endpoint)


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
    if fsync == "always":
        detail = "AOF always: no acknowledged job is lost by a crash of Redis or its machine (D1)"
        return Check("redis persistence", Level.OK, detail)
    detail = (
        f"AOF {fsync}: a crash of redis-server loses nothing, but a power loss may take the "
        "last second or more of acknowledged jobs and events; D1 and D2 need appendfsync always"
    )
    return Check("redis persistence", Level.WARN, detail)


def check_eviction(client: redis.Redis) -> Check:
    """An evicted key is a lost job."""
    memory = _info(client, "memory")
    policy, limit = str(memory.get("maxmemory_policy")), int(memory.get("maxmemory", 0))
    if policy == "noeviction":
        return Check("redis maxmemory-policy", Level.OK, "noeviction")
    if limit:
        detail = f"{policy} with maxmemory {limit} bytes deletes jobs when full; set noeviction"
        return Check("redis maxmemory-policy", Level.FAIL, detail)
    detail = f"{policy}: harmless while maxmemory is 0; set noeviction"
    return Check("redis maxmemory-policy", Level.WARN, detail)


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
    try:
        found = oddities(look(client, endpoint.keys))
    except redis.RedisError as error:
        return Check("redis key types", Level.WARN, f"can't be read: {error}")
    if not found:
        return Check("redis key types", Level.OK, "no key of a wrong type")
    detail = f"somebody else writes to our keys: {'; '.join(found)}"
    return Check("redis key types", Level.WARN, harmless(detail))


def check_scripts(client: redis.Redis, endpoint: Endpoint) -> Check:
    """Run one script of the protocol on a job that does not exist; it writes nothing."""
    try:
        Protocol(client, endpoint.keys).run(calls.cancel("doctor", "doctor"))
    except redis.RedisError as error:
        return Check("redis scripts", Level.FAIL, f"the protocol's scripts don't run: {error}")
    return Check("redis scripts", Level.OK, "the protocol's scripts run")


def _info(client: redis.Redis, section: str) -> dict[str, Any]:
    return dict(client.info(section))


def _configured(client: redis.Redis, name: str) -> str:
    """One directive; hosted Redis often forbids CONFIG."""
    try:
        return str(dict(client.config_get(name)).get(name, "(unknown fsync)"))
    except redis.ResponseError:
        return "(unknown fsync: CONFIG is forbidden)"
