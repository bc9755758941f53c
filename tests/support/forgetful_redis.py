"""Redis that forgets: what was told to it after `keep` is gone after `forget`."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Self

from mlx_serving.common.redis.connection import Endpoint, connect
from mlx_serving.common.redis.local import LocalRedis
from tests.support.helpers import free_port, wait_until

if TYPE_CHECKING:
    import redis


class RestoredSnapshot:
    """It is killed and started again on an older dump."""

    def __init__(self) -> None:
        self._server = LocalRedis()
        self.url = ""

    def __enter__(self) -> Self:
        self._server.start()
        self.url = self._server.url
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop()

    def client(self) -> redis.Redis:
        return self._server.client()

    def keep(self) -> None:
        with self.client() as client:
            client.save()

    def forget(self) -> None:
        self._server.restart()


class PromotedReplica:
    """The primary dies, and a replica takes over that had lost its link to it.

    Clients reach whoever is the primary by one path, as they would by a name.
    """

    def __init__(self) -> None:
        self._stack = ExitStack()
        options = {"repl-diskless-sync-delay": "0"}
        self.old = LocalRedis(port=free_port(), options=options)
        self.new = LocalRedis(port=free_port(), options=options)

    def __enter__(self) -> Self:
        for server in (self.old, self.new):
            self._stack.enter_context(server)
        folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="mlxs-", dir="/tmp"))
        self._path = Path(folder) / "primary.sock"
        self._path.symlink_to(self.old.socket)
        self.url = f"unix://{self._path}"
        with self.new.client() as replica:
            replica.replicaof("127.0.0.1", self.old.port)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def client(self) -> redis.Redis:
        return connect(Endpoint(url=self.url))

    def keep(self) -> None:
        """Cut the replica's link once it has everything."""
        with self.old.client() as primary, self.new.client() as replica:
            wait_until(lambda: replica.info("replication")["master_link_status"] == "up")
            assert primary.wait(1, 5000) == 1
            replica.replicaof("NO", "ONE")

    def forget(self, *, kill: bool = True) -> None:
        """Make the replica the primary; the old one dies, or goes on for those who stay with it."""
        self._path.unlink()
        self._path.symlink_to(self.new.socket)
        if kill:
            self.old.kill()


Forgetful = RestoredSnapshot | PromotedReplica
