"""A Sentinel deployment of the smallest sensible kind: a primary, a replica, three Sentinels."""

from __future__ import annotations

import subprocess
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self

import redis

from mlx_serving.common.redis.local import LocalRedis
from tests.support.helpers import free_port, wait_until

SERVICE = "main"
DOWN_MS = 2000


class SentinelFleet:
    """`nodes[0]` is the first primary. Both refuse writes while they have no replica."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        options = {"min-replicas-to-write": "1", "min-replicas-max-lag": "2",
                   "repl-diskless-sync-delay": "0"}  # fmt: skip
        self.nodes = [
            LocalRedis(appendonly="always", port=free_port(), options=options) for _ in range(2)
        ]
        self.ports = [free_port() for _ in range(3)]

    def __enter__(self) -> Self:
        for node in self.nodes:
            self._stack.enter_context(node)
        with self.nodes[1].client() as replica:
            replica.replicaof("127.0.0.1", self.nodes[0].port)
        for port in self.ports:
            self._start_sentinel(port)
        wait_until(self._is_complete, timeout=20, what="Sentinels that know everybody")
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def settings(self) -> dict[str, Any]:
        """What leads workers and clients here."""
        hosts = tuple(f"127.0.0.1:{port}" for port in self.ports)
        return {"sentinel__hosts": hosts, "sentinel__service": SERVICE}

    @property
    def url(self) -> str:
        """The first primary, directly."""
        return f"redis://127.0.0.1:{self.nodes[0].port}/0"

    def primary_ports(self) -> set[int]:
        """Whom the Sentinels name."""
        return {self._ask(port)["port"] for port in self.ports}

    def forget(self) -> None:
        """Let the Sentinels watch nobody."""
        for port in self.ports:
            with redis.Redis(port=port) as sentinel:
                sentinel.sentinel_remove(SERVICE)

    def watch(self, node: LocalRedis) -> None:
        """Let the Sentinels name this node as the primary."""
        for port in self.ports:
            with redis.Redis(port=port) as sentinel:
                sentinel.sentinel_monitor(SERVICE, "127.0.0.1", node.port, 2)

    def _start_sentinel(self, port: int) -> None:
        folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="mlxs-", dir="/tmp"))
        config = Path(folder) / "sentinel.conf"
        config.write_text(
            f"port {port}\nbind 127.0.0.1\ndir {folder}\n"
            f"sentinel monitor {SERVICE} 127.0.0.1 {self.nodes[0].port} 2\n"
            f"sentinel down-after-milliseconds {SERVICE} {DOWN_MS}\n"
            f"sentinel failover-timeout {SERVICE} 10000\n"
        )
        process = subprocess.Popen(
            ["redis-server", str(config), "--sentinel"],  # noqa: S607 -- LocalRedis found it on PATH
            stdout=subprocess.DEVNULL,
        )
        self._stack.callback(process.wait)
        self._stack.callback(process.terminate)

    def _is_complete(self) -> bool:
        with suppress(redis.RedisError):
            return all(
                (state["num-slaves"], state["num-other-sentinels"], state["flags"])
                == (1, 2, "master")
                for state in map(self._ask, self.ports)
            )
        return False

    @staticmethod
    def _ask(port: int) -> dict[str, Any]:
        with redis.Redis(port=port, decode_responses=True) as sentinel:
            state: dict[str, Any] = sentinel.sentinel_master(SERVICE)
            return state
