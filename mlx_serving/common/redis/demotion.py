"""Connections that leave a server which has become a replica, so that they find the new primary.

A failover may cut no connection (`REPLICAOF` by hand, a managed service that moves a name or an
address). The old primary then answers each write with READONLY, for ever. A connection that hears
so closes itself, and its next command connects anew, to whatever the URL leads to by then. The
clients of a Sentinel service do that by themselves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from redis.exceptions import ReadOnlyError

if TYPE_CHECKING:
    from redis.asyncio.connection import AbstractConnection as AsyncConnection
    from redis.connection import AbstractConnection


def leaving_replicas(kind: type[AbstractConnection]) -> type[AbstractConnection]:
    """Return a connection class like `kind` that closes itself when it is refused a write."""

    class Leaving(kind):  # type: ignore[misc, valid-type]
        def read_response(self, *given: Any, **options: Any) -> Any:  # noqa: ANN401 -- redis-py's
            try:
                return super().read_response(*given, **options)
            except ReadOnlyError:
                self.disconnect()
                raise

    return Leaving


def leaving_replicas_async(kind: type[AsyncConnection]) -> type[AsyncConnection]:
    """Return the asyncio twin of `leaving_replicas`."""

    class Leaving(kind):  # type: ignore[misc, valid-type]
        async def read_response(self, *given: Any, **options: Any) -> Any:  # noqa: ANN401 -- redis-py's
            try:
                return await super().read_response(*given, **options)
            except ReadOnlyError:
                await self.disconnect(nowait=True)
                raise

    return Leaving
