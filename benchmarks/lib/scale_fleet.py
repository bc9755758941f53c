"""The scale benchmark's processes: hosts of several workers each, and consumers of live streams."""

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from threading import Thread
from typing import Final

from benchmarks.lib.harness import MODEL
from mlx_serving.common.settings import Settings
from mlx_serving.worker.models.loading import EngineSpec

GAPS_KEPT: Final = 100_000  # of a window: enough for a p99


@dataclass(frozen=True)
class Start:
    """Have a host run workers of these names, each row at so many tokens a second."""

    names: Sequence[str]
    tokens_per_second: float


@dataclass(frozen=True)
class Counts:
    """What a process has done so far. Times are seconds of CLOCK_MONOTONIC.

    A consumer's `at` is its last arrival: between two of these the count of tokens is exact, where
    a window by the clock would cut a slow engine's steps.
    """

    at: float = 0.0
    tokens: int = 0
    events: int = 0
    ended: int = 0
    backlog: int = 0  # decoded and in no flush yet
    gaps: tuple[float, ...] = ()  # seconds between a stream's arrivals, since the last look


# A host of workers


def host_workers(connection: Connection, settings: Settings) -> None:
    """Run workers on command: all of a worker's child, as threads here; no parents.

    `Start` starts, "read" is answered with `Counts`, "stop" hands over and ends them all; None
    ends the host.
    """
    from mlx_serving.common.telemetry import configure_logging
    from mlx_serving.worker.process.child import Child, ChildSpec

    configure_logging(log_format="json", level=settings.log.level)
    running: list[tuple[Child, Thread]] = []
    connection.send("ready")
    while (message := connection.recv()) is not None:
        if isinstance(message, Start):
            spec = EngineSpec("simulated", "", message.tokens_per_second)
            for name in message.names:
                child = Child(ChildSpec(settings, MODEL, name, spec))
                thread = Thread(target=child.run, name=name)
                thread.start()
                running.append((child, thread))
        elif message == "stop":
            for child, _ in running:
                child.messages.post("hand_over")
            for _, thread in running:
                thread.join()
            running.clear()
            connection.send("stopped")
        else:
            connection.send(_count([child for child, _ in running]))


def _count(children: Sequence[object]) -> Counts:
    from mlx_serving.worker.process.child import Child

    tokens = ended = backlog = 0
    for child in children:
        assert isinstance(child, Child)
        counts, _ = child.counters.read()
        tokens += int(sum(counts.get("generation_tokens", {}).values()))
        ended += int(sum(counts.get("jobs_ended", {}).values()))
        backlog += child.publisher.backlog
    return Counts(time.monotonic(), tokens, 0, ended, backlog)


# A consumer of streams


@dataclass
class Follower:
    """Follows its jobs in the queue's order, so many at a time."""

    waiting: deque[str]
    tokens: int = 0
    events: int = 0
    ended: int = 0
    at: float = 0.0
    gaps: list[float] = field(default_factory=list)

    async def follow(self, settings: Settings, connection: Connection) -> None:
        """Serve commands: a number is how many more streams to follow, "read" asks for `Counts`."""
        from mlx_serving.producer.async_client import AsyncClient

        tasks: list[asyncio.Task[None]] = []
        async with AsyncClient(settings=settings) as client:

            async def stream_after_stream() -> None:
                while self.waiting:
                    before = 0.0
                    async for event in client.stream(self.waiting.popleft()):
                        if tokens := sum(len(c.token_ids) for c in event.choices):
                            before = self._take(tokens, before)
                    self.ended += 1

            while (message := await asyncio.to_thread(connection.recv)) is not None:
                if isinstance(message, int):
                    tasks += [asyncio.create_task(stream_after_stream()) for _ in range(message)]
                else:
                    connection.send(self._counts())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _take(self, tokens: int, before: float) -> float:
        """Count an event's tokens; `before` is the stream's last arrival. Returns this one."""
        self.at = time.monotonic()
        self.tokens += tokens
        self.events += 1
        if before and len(self.gaps) < GAPS_KEPT:
            self.gaps.append(self.at - before)
        return self.at

    def _counts(self) -> Counts:
        gaps, self.gaps = tuple(self.gaps), []
        return Counts(self.at, self.tokens, self.events, self.ended, 0, gaps)


def consume(connection: Connection, settings: Settings) -> None:
    """Follow the jobs whose ids come first, then do as `Follower.follow` says."""
    connection.send("ready")
    ids = connection.recv()
    if ids is not None:
        asyncio.run(Follower(deque(ids)).follow(settings, connection))
