"""Plants keys of every wrong type, and looks at what became of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlx_serving.common.protocol.keys import Keys
from mlx_serving.common.protocol.quarantine import read_quarantined

if TYPE_CHECKING:
    from collections.abc import Callable

    import redis

TENANT = "acme"

PLANTS: dict[str, Callable[[redis.Redis, str], object]] = {
    "string": lambda r, key: r.set(key, "odd"),
    "list": lambda r, key: r.rpush(key, "odd"),
    "set": lambda r, key: r.sadd(key, "odd"),
    "zset": lambda r, key: r.zadd(key, {"odd": 1}),
    "hash": lambda r, key: r.hset(key, "odd", "1"),
    "stream": lambda r, key: r.xadd(key, {"odd": "1"}),
}
"""How to make a key of each type."""

OF_JOBS = {
    "mlxs:open:tally:default": "zset",
    "mlxs:leases:tally:default": "zset",
    "mlxs:deadlines": "zset",
    "mlxs:limits": "hash",
    "mlxs:tenants": "set",
    f"mlxs:tenant:{TENANT}:queued": "set",
    f"mlxs:tenant:{TENANT}:running": "set",
    f"mlxs:line:tally:default:{TENANT}": "list",
    "mlxs:turns:tally:default": "list",
    "rq:queue:tally:default": "list",
    "rq:queues": "set",
    "rq:wip:tally:default": "zset",
    "rq:finished:tally:default": "zset",
    "rq:failed:tally:default": "zset",
    "rq:canceled:tally:default": "zset",
    "rq:suspended": "string",
}
"""Keys that jobs of one queue and tenant share, and their types."""

OF_WORKERS = {
    "mlxs:worker:local": "hash",
    "rq:worker:local": "hash",
    "rq:worker:local:executions": "set",
    "rq:workers": "set",
    "rq:workers:tally:default": "set",
}
"""Keys of the worker `local`, and those that workers share."""


def cases(keys: dict[str, str]) -> list[tuple[str, str]]:
    """Every key with every wrong type."""
    return [(key, kind) for key, right in keys.items() for kind in PLANTS if kind != right]


def plant(client: redis.Redis, key: str, kind: str) -> None:
    """Make a key of this type, whatever was there; in one step, beside workers that write it."""
    with client.pipeline(transaction=True) as pipe:
        pipe.delete(key)
        PLANTS[kind](pipe, key)
        pipe.execute()


def check_quarantined_once(client: redis.Redis, key: str, kind: str) -> None:
    """Check that the planted key, and no other, was moved aside, once, and what it holds too."""
    moved = read_quarantined(client, Keys())
    assert [(each.key, each.kind) for each in moved] == [(key, kind)]
    place: Any = moved[0].place
    assert place.startswith(f"mlxs:quarantine:{key}:")
    assert client.type(place) == kind.encode()
    assert 0 < client.ttl(place) <= 7 * 24 * 3600
    assert client.type(key) != kind.encode()
