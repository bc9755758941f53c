"""Small things that tests of all folders share."""

from __future__ import annotations

import asyncio
import socket
import time
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from mlx_serving.common.protocol.keys import Keys
from mlx_serving.common.states import TERMINAL

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    import redis

T = TypeVar("T")

POLL_SECONDS = 0.01
ENDED = {state.value.encode() for state in TERMINAL}


def wait_until(
    condition: Callable[[], T | Literal[False]], *, timeout: float = 10.0, what: str = ""
) -> T:
    """Poll until the condition is truthy and return its value; fail after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout} s: {what or condition}")
        time.sleep(POLL_SECONDS)
    return value


async def wait_until_async(
    condition: Callable[[], Awaitable[T]],
    *,
    timeout: float = 10.0,  # noqa: ASYNC109 -- it bounds the whole polling, as in wait_until
    what: str = "",
) -> T:
    """Asyncio twin of `wait_until`."""
    deadline = time.monotonic() + timeout
    while not (value := await condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout} s: {what or condition}")
        await asyncio.sleep(POLL_SECONDS)
    return value


def free_port() -> int:
    """A TCP port that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def dataset_bytes(client: redis.Redis) -> int:
    """What the keys of this Redis take, its own overhead apart."""
    client.memory_purge()
    return int(client.info("memory")["used_memory_dataset"])


def leaked_keys(client: redis.Redis, keys: Keys | None = None) -> list[str]:
    """Keys that would stay for ever: no TTL, no part of an open job, no documented index.

    A queued or running job has keys without a TTL, and stands in lists and sorted sets; RQ
    keeps the set of its queues, and trims its registries of ended jobs by score.
    """
    keys = keys or Keys()
    names = [name for name in client.scan_iter(count=1000) if client.ttl(name) == -1]
    job = keys.job("").encode()
    open_ids = {
        name.removeprefix(job)
        for name in names
        if name.startswith(job) and client.hget(name, "st") not in ENDED
    }
    return sorted(
        name.decode()
        for name in names
        if not (
            name.startswith(_documented(keys))
            or any(job_id in name for job_id in open_ids)
            or _holds_only(client, name, open_ids)
        )
    )


def _documented(keys: Keys) -> tuple[bytes, ...]:
    """Starts of names of keys that stay by design; each is one key a queue, or one in all."""
    rq = keys.rq_prefix.encode()
    return tuple(rq + b":" + name for name in (b"queues", b"finished:", b"failed:", b"canceled:"))


def _holds_only(client: redis.Redis, name: bytes, open_ids: Iterable[bytes]) -> bool:
    kind = client.type(name)
    members: list[Any]
    if kind == b"list":
        members = client.lrange(name, 0, -1)
    elif kind == b"zset":
        members = client.zrange(name, 0, -1)
    elif kind == b"set":
        members = list(client.smembers(name))
    else:
        return False
    return all(any(job_id in member for job_id in open_ids) for member in members)
