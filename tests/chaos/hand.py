"""A hand that plants keys of a wrong type under the names of what jobs share.

It may do what the user of any producer may: write where nothing is. Most of these keys vanish when
they are empty, so that there is nothing, now and then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from mlx_serving.common.protocol.keys import Keys
from mlx_serving.common.queues import LANES
from tests.chaos.work import TENANTS

if TYPE_CHECKING:
    import random

    import redis

VALUE: Final = "planted by a hand"
PLANT: Final = """
if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
redis.call(ARGV[1], KEYS[1], unpack(ARGV, 2))
return 1
"""
WRITES: Final = {
    "string": ("SET", VALUE),
    "hash": ("HSET", VALUE, "1"),
    "set": ("SADD", VALUE),
    "zset": ("ZADD", "1", VALUE),
    "list": ("RPUSH", VALUE),
}


def shared_keys(keys: Keys) -> dict[str, str]:
    """Every key that jobs share, and its right type."""
    queues = [f"tally:{lane}" for lane in LANES]
    tenants = [name for name in TENANTS if name]
    found = {keys.tenants(): "set", f"{keys.prefix}:deadlines": "zset"}
    for queue in queues:
        found |= {keys.open(queue): "zset", keys.leases(queue): "zset", keys.turns(queue): "list"}
        found |= {keys.rq_queue(queue): "list", f"{keys.rq_prefix}:wip:{queue}": "zset"}
        found |= {keys.line(queue, tenant): "list" for tenant in tenants}
    for tenant in tenants:
        found |= {keys.tenant_queued(tenant): "set", keys.tenant_running(tenant): "set"}
    return found


class Hand:
    """Plants keys, and remembers which."""

    def __init__(self, keys: Keys | None = None) -> None:
        self._types = shared_keys(keys or Keys())
        self.planted: list[str] = []

    def plant(self, client: redis.Redis, rng: random.Random) -> bool:
        """Plant one key; False if each of those tried is there already."""
        for name in rng.sample(sorted(self._types), 8):
            kind = rng.choice([kind for kind in WRITES if kind != self._types[name]])
            if client.eval(PLANT, 1, name, *WRITES[kind]):
                self.planted.append(name)
                return True
        return False

    def take_back(self, client: redis.Redis) -> list[str]:
        """Remove what still stands as it was planted: nobody had a use for the key. Return it."""
        odd = [
            name
            for name in {*self.planted}
            if client.type(name) not in {self._types[name].encode(), b"none"}
        ]
        if odd:
            client.delete(*odd)
        return odd
