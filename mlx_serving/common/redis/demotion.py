"""Connections that leave a server which has become a replica, so that they find the new primary.

A failover may cut no connection (`REPLICAOF` by hand, a managed service that moves a name or an
address). The old primary then answers each write with READONLY, for ever. A connection that hears
so closes itself before its next command, which connects anew, to whatever the URL leads to by then.
Not at once: the other replies of a pipeline are still to be read. The clients of a Sentinel service
do that by themselves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from redis.exceptions import ReadOnlyError

if TYPE_CHECKING:
    from redis.asyncio.connection import AbstractConnection as AsyncConnection
    from redis.connection import AbstractConnection


def leaving_replicas(kind: type[AbstractConnection]) -> type[AbstractConnection]:
    """Return a connection class like `kind` that closes itself when it was refused a write."""

    class Leaving(kind):  # type: ignore[misc, valid-type]
        _refused = False

        def read_response(self, *given: Any, **options: Any) -> Any:  # noqa: ANN401 -- redis-py's
            try:
                return super().read_response(*given, **options)
            except ReadOnlyError:
                self._refused = True
                raise

        def send_packed_command(self, *given: Any, **options: Any) -> None:
            if self._refused:
                self._refused = False
                self.disconnect()
            super().send_packed_command(*given, **options)

    return Leaving


def leaving_replicas_async(kind: type[AsyncConnection]) -> type[AsyncConnection]:
    """Return the asyncio twin of `leaving_replicas`."""

    class Leaving(kind):  # type: ignore[misc, valid-type]
        _refused = False

        async def read_response(self, *given: Any, **options: Any) -> Any:  # noqa: ANN401 -- redis-py's
            try:
                return await super().read_response(*given, **options)
            except ReadOnlyError:
                self._refused = True
                raise

        async def send_packed_command(self, *given: Any, **options: Any) -> None:
            if self._refused:
                self._refused = False
                await self.disconnect(nowait=True)
            await super().send_packed_command(*given, **options)

    return Leaving
