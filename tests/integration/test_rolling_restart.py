"""Rolling restarts under load (D9): nothing lost, nothing twice, nobody waits long."""

from __future__ import annotations

import asyncio
import itertools
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from mlx_serving import AsyncClient, Client
from tests.support.figures import show
from tests.support.worker_process import WorkerProcess, check_answers, job_events

if TYPE_CHECKING:
    from mlx_serving.common.redis.local import LocalRedis
    from mlx_serving.producer.async_client import AsyncClient as Producer
    from mlx_serving.producer.handles import AsyncJobHandle

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.slow,
    pytest.mark.timeout(240),
    pytest.mark.may_leak(
        reason="workers that are killed at the end leave their names in RQ's sets"
    ),
]

GRACE_SECONDS = 1.0
RATE = 40.0  # tokens a second of a row
TOKENS = 120  # three seconds: every job of the load meets at most one drain or two
JOBS_A_SECOND = 6.0  # some 20 rows at once, of the 32 that one worker has alone
ROUNDS = 3
# A claim wakes on the release; what is left is the prefill and a busy test machine.
SLACK_SECONDS = 1.5


@dataclass
class Heard:
    """When one consumer heard of its job, in seconds of this process."""

    handle: AsyncJobHandle
    times: list[float] = field(default_factory=list)

    @property
    def longest_wait(self) -> float:
        return max(b - a for a, b in itertools.pairwise(self.times))


async def follow(client: Producer, heard: Heard) -> Heard:
    heard.times.append(time.monotonic())
    async for _ in client.stream(heard.handle.id):
        heard.times.append(time.monotonic())
    return heard


async def load(client: Producer, done: asyncio.Event) -> list[Heard]:
    """Submit at a steady rate, each job with a consumer that listens from the start."""
    streams = []
    while not done.is_set():
        handle = await client.submit(
            model="tally", prompt="x", max_tokens=TOKENS, result_ttl=240, stream=True
        )
        streams.append(asyncio.create_task(follow(client, Heard(handle))))
        await asyncio.sleep(1 / JOBS_A_SECOND)
    return await asyncio.gather(*streams)


def started(url: str, name: str) -> WorkerProcess:
    return WorkerProcess(url, name, RATE, worker__drain_seconds=GRACE_SECONDS).serving()


def roll(url: str, workers: dict[str, WorkerProcess]) -> list[float]:
    """Drain each worker in turn, and put another in its place once it has gone, as launchd does."""
    drains = []
    for number, slot in itertools.product(range(ROUNDS), ("a", "b")):
        begun = time.monotonic()
        workers[slot].terminate()
        assert workers[slot].exit_status() == 0
        drains.append(time.monotonic() - begun)
        workers[slot].__exit__()
        workers[slot] = started(url, f"{slot}{number + 1}")
    return drains


async def test_two_workers_restarted_in_turn_lose_and_repeat_nothing(
    settled_redis: LocalRedis, client: Client
) -> None:
    url = settled_redis.url
    workers = {slot: started(url, f"{slot}0") for slot in ("a", "b")}
    try:
        async with AsyncClient(url) as producer:
            done = asyncio.Event()
            loading = asyncio.create_task(load(producer, done))
            await asyncio.sleep(1.0)
            drains = await asyncio.to_thread(roll, url, workers)
            done.set()
            heard = await asyncio.wait_for(loading, 60)
    finally:
        for worker in workers.values():
            worker.__exit__()
    handles = [each.handle for each in heard]
    check_answers(client, handles, TOKENS)  # type: ignore[arg-type]
    attempts = [sum(e.type == "attempt" for e in job_events(client, h.id)) for h in handles]
    waits = sorted(each.longest_wait for each in heard)
    moved = sum(n > 1 for n in attempts)
    show(
        f"{len(handles)} jobs, {moved} of them handed over (up to {max(attempts) - 1} times);"
        f" longest silence p50 {waits[len(waits) // 2]:.3f} s, max {waits[-1]:.3f} s;"
        f" drains at most {max(drains):.2f} s"
    )
    assert moved >= 2 * ROUNDS  # the hand-offs did meet the load
    assert {client.status(h.id).attempts for h in handles} == {0}
    assert waits[-1] <= GRACE_SECONDS + SLACK_SECONDS
    assert max(drains) <= GRACE_SECONDS + 2 * SLACK_SECONDS
