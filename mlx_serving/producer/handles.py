"""What `submit` returns: a job's id, with the client's calls on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, overload

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator

    from mlx_serving.common.events import Event
    from mlx_serving.common.protocol.client import JobRecord
    from mlx_serving.common.results import GenerationResult
    from mlx_serving.common.states import JobState


class JobCalls(Protocol):
    """The calls of `Client` that a handle makes."""

    @overload
    def stream(self, job_id: str, after: str = "") -> Generator[Event, None, None]: ...
    @overload
    def stream(
        self, job_id: str, after: str = "", *, text: Literal[True]
    ) -> Generator[str, None, None]: ...
    def result(self, job_id: str, timeout: float | None = None) -> GenerationResult: ...  # noqa: D102 -- see `Client`
    def status(self, job_id: str) -> JobRecord: ...  # noqa: D102
    def cancel(self, job_id: str) -> JobState: ...  # noqa: D102
    def forget(self, job_id: str) -> None: ...  # noqa: D102


class AsyncJobCalls(Protocol):
    """The calls of `AsyncClient` that a handle makes."""

    @overload
    def stream(self, job_id: str, after: str = "") -> AsyncGenerator[Event, None]: ...
    @overload
    def stream(
        self, job_id: str, after: str = "", *, text: Literal[True]
    ) -> AsyncGenerator[str, None]: ...
    async def result(self, job_id: str, timeout: float | None = None) -> GenerationResult: ...  # noqa: ASYNC109, D102 -- the sync twin's word
    async def status(self, job_id: str) -> JobRecord: ...  # noqa: D102
    async def cancel(self, job_id: str) -> JobState: ...  # noqa: D102
    async def forget(self, job_id: str) -> None: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class JobHandle:
    """A submitted job.

    Attributes:
        id: 32 hex digits.
        created: False if the job existed already: by its idempotency key, or because the
            reply to the enqueue was lost and the enqueue was sent again.
        state: the state it had when it was submitted.

    """

    id: str
    created: bool
    state: JobState
    _client: JobCalls = field(repr=False, compare=False)

    def stream(self, after: str = "") -> Generator[Event, None, None]:
        """See :meth:`Client.stream`."""
        return self._client.stream(self.id, after)

    def text(self) -> Generator[str, None, None]:
        """See :meth:`Client.stream` with ``text=True``."""
        return self._client.stream(self.id, text=True)

    def result(self, timeout: float | None = None) -> GenerationResult:
        """See :meth:`Client.result`."""
        return self._client.result(self.id, timeout)

    def status(self) -> JobRecord:
        """See :meth:`Client.status`."""
        return self._client.status(self.id)

    def cancel(self) -> JobState:
        """See :meth:`Client.cancel`."""
        return self._client.cancel(self.id)

    def forget(self) -> None:
        """See :meth:`Client.forget`."""
        self._client.forget(self.id)


@dataclass(frozen=True, slots=True)
class AsyncJobHandle:
    """A submitted job, for asyncio; see :class:`JobHandle`."""

    id: str
    created: bool
    state: JobState
    _client: AsyncJobCalls = field(repr=False, compare=False)

    def stream(self, after: str = "") -> AsyncGenerator[Event, None]:
        """See :meth:`AsyncClient.stream`."""
        return self._client.stream(self.id, after)

    def text(self) -> AsyncGenerator[str, None]:
        """See :meth:`AsyncClient.stream` with ``text=True``."""
        return self._client.stream(self.id, text=True)

    async def result(self, timeout: float | None = None) -> GenerationResult:  # noqa: ASYNC109 -- the sync twin's word
        """See :meth:`AsyncClient.result`."""
        return await self._client.result(self.id, timeout)

    async def status(self) -> JobRecord:
        """See :meth:`AsyncClient.status`."""
        return await self._client.status(self.id)

    async def cancel(self) -> JobState:
        """See :meth:`AsyncClient.cancel`."""
        return await self._client.cancel(self.id)

    async def forget(self) -> None:
        """See :meth:`AsyncClient.forget`."""
        await self._client.forget(self.id)
