"""A publisher over a protocol without Redis, for unit tests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from mlx_serving.worker.delivery.publisher import EngineLink, Publisher, PublisherOptions
from tests.support.helpers import wait_until
from tests.support.worker_fakes import FakeProtocol

if TYPE_CHECKING:
    from mlx_serving.worker.delivery.held import HeldJob

FLUSH = 0.1


class Bench:
    def __init__(
        self,
        protocol: FakeProtocol | None = None,
        lease_ms: int = 400,
        flush_seconds: float = FLUSH,
    ) -> None:
        self.protocol = protocol or FakeProtocol()
        self.gone: list[str] = []
        self.alive = True
        self.missing: set[str] = set()  # attempts that the engine lost
        self.publisher = Publisher(
            self.protocol,  # type: ignore[arg-type]
            "w1",
            PublisherOptions(lease_ms=lease_ms, flush_seconds=flush_seconds, idle_seconds=0.02),
            EngineLink(self.gone.append, lambda: self.alive, lambda name: name not in self.missing),
        )

    def hold(self, *jobs: HeldJob) -> None:
        self.publisher.hold(jobs)

    def types(self) -> list[str]:
        return [event.type for event in self.protocol.events]

    def idle(self) -> None:
        wait_until(lambda: not self.publisher.pending and self.protocol.gate.is_set())

    def wait_for(self, *types: str) -> None:
        wait_until(lambda: self.types() == list(types), timeout=3, what=str(types))

    def __enter__(self) -> Self:
        self.publisher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.protocol.gate.set()
        self.publisher.stop()
        self.publisher.join(5)
        assert not self.publisher.is_alive()
