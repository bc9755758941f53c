"""The asyncio client of a Sentinel service, which closes its connections to the Sentinels too."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from redis.asyncio import Redis

if TYPE_CHECKING:
    from redis.asyncio.sentinel import SentinelConnectionPool


class SentinelRedis(Redis):
    """Client of a service's primary.

    redis-py leaves the connections to the Sentinels open when the client is closed, and asyncio,
    unlike blocking sockets, warns about connections that are only garbage-collected.
    """

    async def aclose(self, close_connection_pool: bool | None = None) -> None:  # noqa: FBT001 -- as redis-py has it
        """Close the connections to the primary and to the Sentinels."""
        pool = cast("SentinelConnectionPool", self.connection_pool)
        await super().aclose(close_connection_pool)
        await pool.sentinel_manager.aclose()
