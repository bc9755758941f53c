"""What a Redis server is, and whether it may hold a queue; also where a user may not ask all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

from mlx_serving.common.errors import (
    EvictingRedis,
    MissingPermission,
    UnsupportedRedis,
    summary,
)
from mlx_serving.common.protocol import calls
from mlx_serving.common.protocol.client import Protocol
from mlx_serving.common.redis.retrying import ATTEMPTS, answered

if TYPE_CHECKING:
    from collections.abc import Callable

    import redis

    from mlx_serving.common.protocol.keys import Keys

T = TypeVar("T")

NOEVICTION: Final = "noeviction"
POLICY: Final = "maxmemory-policy"
NOBODY: Final = "no-such-job"


@dataclass(frozen=True, slots=True)
class Server:
    """What a server says of itself; None: it does not tell this user.

    `maxmemory` is in bytes, 0: no limit, so that nothing is ever deleted.
    """

    mode: str | None = None
    policy: str | None = None
    maxmemory: int | None = None

    @property
    def evicts(self) -> bool:
        """Whether it deletes keys when it is full."""
        return self.policy not in {None, NOEVICTION} and self.maxmemory != 0

    @property
    def unknown(self) -> list[str]:
        """What it did not tell."""
        told = {"its mode (whether it is a Cluster)": self.mode, POLICY: self.policy}
        return [what for what, value in told.items() if value is None]


def read_server(client: redis.Redis, *, attempts: int = ATTEMPTS) -> Server:
    """Ask INFO; if that is denied, HELLO and CONFIG.

    Raises:
        QueueFailure: Redis can't be reached, or refuses our credentials.

    """

    def allowed(call: Callable[[], T]) -> T | None:
        """Its reply; None if this user, or a hosted service, may not ask."""
        try:
            return answered(call, attempts=attempts)
        except (MissingPermission, UnsupportedRedis):
            return None

    info = allowed(lambda: dict(client.info("server", "memory"))) or {}
    mode, policy, most = (info.get(n) for n in ("redis_mode", "maxmemory_policy", "maxmemory"))
    if mode is None:
        hello = allowed(lambda: client.execute_command("HELLO"))  # type: ignore[no-untyped-call]
        mode = _by_name(hello).get("mode")
    if policy is None:
        config = allowed(lambda: dict(client.config_get("maxmemory*"))) or {}
        policy, most = config.get(POLICY), config.get("maxmemory")
    return Server(mode, policy, None if most is None else int(most))


def check_server(server: Server) -> None:
    """Check that a server may hold a queue, as far as it tells.

    Raises:
        UnsupportedRedis: it is a Cluster.
        EvictingRedis: it deletes keys when it is full.

    """
    if server.mode == "cluster":
        raise UnsupportedRedis(f"{summary(UnsupportedRedis)} (it is a Redis Cluster)")
    if server.evicts:
        limit = "" if server.maxmemory is None else f", maxmemory {server.maxmemory} bytes"
        raise EvictingRedis(f"{summary(EvictingRedis)} ({server.policy}{limit})")


def check_scripts(client: redis.Redis, keys: Keys) -> None:
    """Run one script of the protocol on a job that does not exist; it writes nothing.

    Raises:
        QueueFailure: it does not run.

    """
    answered(lambda: Protocol(client, keys).run(calls.cancel(NOBODY, "checked")))


def _by_name(reply: Any) -> dict[str, str]:  # noqa: ANN401 -- a list in RESP2, a mapping in RESP3
    if isinstance(reply, list):
        reply = dict(zip(reply[::2], reply[1::2], strict=True))
    return {_text(name): _text(value) for name, value in (reply or {}).items()}


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
