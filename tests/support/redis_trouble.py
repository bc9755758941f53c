"""What tests of a Redis in trouble share: consumers that follow, and what must hold at the end."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any, Self

from rq import Queue

from mlx_serving.common.errors import MlxServingError, QueueUnavailable
from mlx_serving.common.protocol.keys import Keys
from tests.support.worker_process import counted

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import redis

    from mlx_serving.common.events import Event
    from mlx_serving.producer.client import Client
    from mlx_serving.producer.handles import JobHandle

QUEUE = "tally:default"


class Followers:
    """Consumers, each on a thread of its own, that follow jobs from the start to the end."""

    def __init__(self, client: Client, handles: Iterable[JobHandle] = ()) -> None:
        self._client = client
        self.events: dict[str, list[Event]] = {}
        self.errors: dict[str, MlxServingError] = {}
        self._threads: list[threading.Thread] = []
        for handle in handles:
            self.follow(handle.id)

    def follow(self, job_id: str) -> None:
        self.events[job_id] = []
        thread = threading.Thread(target=self._follow, args=(job_id,), daemon=True)
        self._threads.append(thread)
        thread.start()

    def _follow(self, job_id: str) -> None:
        try:
            for event in self._client.stream(job_id):
                self.events[job_id].append(event)
        except MlxServingError as error:
            self.errors[job_id] = error

    def tokens(self) -> list[int]:
        """How many each has seen."""
        return [len(token_ids(events)) for events in self.events.values()]

    def attempts(self) -> list[int]:
        """How many attempts each has seen."""
        return [sum(e.type == "attempt" for e in events) for events in self.events.values()]

    def finish(self, timeout: float = 60) -> None:
        """Wait for all ends."""
        deadline = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            assert not thread.is_alive(), f"still follows: {self.tokens()}"

    def check(self, tokens: int) -> None:
        """Every stream was whole, in order, once, and right."""
        assert self.errors == {}, self.errors
        for events in self.events.values():
            check_told(events, tokens)


def token_ids(events: Iterable[Event]) -> list[int]:
    return [t for event in events for delta in event.choices for t in delta.token_ids]


def check_told(events: Sequence[Event], tokens: int) -> None:
    """What a consumer was told of one job is gap-free and right."""
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert [event.type for event in events].count("end") == 1
    assert events[-1].type == "end"
    assert token_ids(events) == list(range(1, tokens + 1))
    assert "".join(event.text for event in events) == counted(tokens)


def check_results(client: Client, ids: Iterable[str], tokens: int) -> None:
    """Every job finished, with the right text."""
    for job_id in ids:
        result = client.result(job_id, timeout=30)
        assert (result.state.value, result.error) == ("finished", None)
        assert result.token_ids == list(range(1, tokens + 1))
        assert result.text == counted(tokens)


def check_view(connection: redis.Redis, ids: Iterable[str]) -> None:
    """RQ shows what is true: all finished, nothing queued or running, nobody at work."""
    keys, expected = Keys(), set(ids)
    queue = Queue(QUEUE, connection=connection)
    assert queue.count == 0
    assert set(queue.finished_job_registry.get_job_ids(cleanup=False)) >= expected
    for registry in (queue.started_job_registry, queue.failed_job_registry):
        assert registry.get_job_ids(cleanup=False) == []
    for job_id in expected:
        assert connection.hget(keys.rq_job(job_id), "status") == b"finished"
    assert connection.zcard(keys.open(QUEUE)) == 0
    assert connection.zcard(keys.leases(QUEUE)) == 0
    assert list(connection.scan_iter(f"{keys.rq_prefix}:execution*")) == []


class Producer(threading.Thread):
    """Submits jobs at a pace, each until it is acknowledged; remembers the answers."""

    def __init__(self, client: Client, count: int, pause: float, **job: Any) -> None:
        super().__init__(daemon=True)
        self._client, self._count, self._pause = client, count, pause
        self._job = {"model": "tally", "prompt": "x", "result_ttl": 120} | job
        self.acknowledged: list[str] = []
        self.refused: list[QueueUnavailable] = []

    def run(self) -> None:
        for number in range(self._count):
            self._submit(f"job-{number}")
            time.sleep(self._pause)

    def _submit(self, key: str) -> None:
        while True:
            try:
                handle = self._client.submit(self._job | {"idempotency_key": key})
            except QueueUnavailable as error:
                self.refused.append(error)
            else:
                self.acknowledged.append(handle.id)
                return

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.join(30)
