"""A Redis that forgets: a replica that is behind is promoted, or an older copy is put back.

Clients reach it by proxies, as by an address that moves. While nobody can, what it still knows is
written down: a job that it does not know then is lost by Redis alone, and all others have to end.
"""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from mlx_serving.common.protocol.keys import Keys
from mlx_serving.common.redis.local import LocalRedis
from tests.chaos.trace import now
from tests.support.helpers import free_port, wait_until

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import redis

    from tests.support.lossy_proxy import LossyProxy

AOF = "appendonlydir"
NOWHERE = "nowhere"  # no socket of this name: connections to it are refused


@dataclass(frozen=True)
class Forgetting:
    """Once that Redis forgot. Times in ns, as of a trace.

    Nobody reached what it knew before after `closed`, nor what it knows since before `opened`.
    `kept`: jobs that it still knew.
    """

    kind: str
    closed: int
    opened: int
    kept: frozenset[str]


def since(forgettings: Sequence[Forgetting], start: int, end: int) -> bool:
    """Whether Redis may have forgotten between two times what happened at the first."""
    return any(start <= each.opened and each.closed <= end for each in forgettings)


class ForgetfulRedis:
    """A primary and a replica with AOF `always`; they change places. Has what `LocalRedis` has."""

    def __init__(self) -> None:
        options = {"repl-diskless-sync-delay": "0", "auto-aof-rewrite-percentage": "0"}
        self._primary, self._replica = (
            LocalRedis(appendonly="always", port=free_port(), options=options) for _ in range(2)
        )
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        for node in (self._primary, self._replica):
            self._stack.enter_context(node)
        self.follow()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def socket(self) -> Path:
        """Of the primary of now."""
        return self._primary.socket

    @property
    def url(self) -> str:
        return self._primary.url

    def client(self) -> redis.Redis:
        return self._primary.client()

    def kill(self) -> None:
        self._primary.kill()

    def start(self) -> None:
        self._primary.start()

    def follow(self) -> None:
        """Let the replica follow the primary, and wait until it knows all, its files too."""
        with self._replica.start().client() as replica:
            replica.replicaof("127.0.0.1", self._primary.port)
            wait_until(lambda: _is_whole(replica), timeout=60, what="a replica that follows")

    def cut_link(self) -> None:
        """From now on the replica does not learn what the primary does."""
        with self._replica.client() as replica:
            replica.replicaof("NO", "ONE")

    def promote(self, proxies: Sequence[LossyProxy]) -> Forgetting:
        """Let the primary die, and lead everybody to what was its replica."""
        closed = self._close(proxies)
        self._primary.kill()
        self._primary, self._replica = self._replica, self._primary
        return self._open(proxies, "failover", closed)

    def copy(self, to: Path) -> None:
        """Copy the primary's files while it writes, as a snapshot of the disk does."""
        shutil.rmtree(to, ignore_errors=True)
        shutil.copytree(self._primary.folder / AOF, to)

    def restore(self, copy: Path, proxies: Sequence[LossyProxy]) -> Forgetting:
        """Stop the primary, put back what was copied, start it."""
        closed = self._close(proxies)
        self._primary.kill()
        shutil.rmtree(self._primary.folder / AOF)
        shutil.copytree(copy, self._primary.folder / AOF)
        self._primary.start()
        return self._open(proxies, "restore", closed)

    def _close(self, proxies: Sequence[LossyProxy]) -> int:
        for proxy in proxies:
            proxy.lead_to(self._primary.folder / NOWHERE)
            proxy.cut()
        return now()

    def _open(self, proxies: Sequence[LossyProxy], kind: str, closed: int) -> Forgetting:
        with self.client() as client:
            head = Keys().job("")
            names = client.scan_iter(f"{head}*", count=1000)
            kept = frozenset(name.decode().removeprefix(head) for name in names)
        opened = now()
        for proxy in proxies:
            proxy.lead_to(self._primary.socket)
        return Forgetting(kind, closed, opened, kept)


def _is_whole(replica: redis.Redis) -> bool:
    """Whether it is as the primary is. Its AOF is of an older life until it is rewritten."""
    link, files = replica.info("replication"), replica.info("persistence")
    rewrites = files["aof_rewrite_in_progress"], files["aof_rewrite_scheduled"]
    return link.get("master_link_status") == "up" and rewrites == (0, 0)
