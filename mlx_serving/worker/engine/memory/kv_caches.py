"""What the memory guard reads of an engine's KV caches, and does to them. Pure."""

from typing import Protocol

from mlx_serving.worker.engine.kv.prefix.cache import PrefixCache
from mlx_serving.worker.engine.memory.guard import KvUse, MemoryRoom


class Caches(Protocol):
    """What `KvMemory` needs of `model_runner.ModelRunner`."""

    @property
    def kv_bytes(self) -> int:
        """Bytes of all KV caches."""

    def shrink(self) -> None:
        """Give back memory that no row and no cached prefix uses."""


class KvMemory:
    """An engine's KV caches. Only the engine's thread calls it, between steps."""

    def __init__(
        self,
        caches: Caches,
        room: MemoryRoom,
        bytes_per_token: int,
        prefixes: PrefixCache | None = None,
    ) -> None:
        self.room = room
        self._caches, self._bytes_per_token, self._prefixes = caches, bytes_per_token, prefixes
        self._idle_limit = prefixes.idle_limit if prefixes else 0
        self.keeps_prefixes = prefixes is not None

    @property
    def use(self) -> KvUse:
        """What the caches hold now."""
        return KvUse(self._caches.kv_bytes, starved=self.room.starved)

    def allow(self, nbytes: int) -> None:
        """Let the caches grow to so many bytes in all."""
        self.room.look(nbytes // self._bytes_per_token)

    def shrink(self) -> None:
        """Evict cached prefixes that no row uses, and keep none until `restore`."""
        if self._prefixes is not None:
            self._prefixes.keep_idle(0)
            self._caches.shrink()

    def restore(self) -> None:
        """Keep prefixes that no row uses again."""
        if self._prefixes is not None:
            self._prefixes.keep_idle(self._idle_limit)
