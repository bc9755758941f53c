"""One producer process: submits jobs, and follows each by consumers that come and go.

Whatever it learns goes to files of the run's folder, a JSON line a fact; the file `stop` in it
says that no more jobs are wanted.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import sys
from collections import defaultdict
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from mlx_serving.common.errors import MlxServingError, QueueUnavailable
from mlx_serving.common.settings import load_settings
from mlx_serving.producer.async_client import AsyncClient
from tests.chaos.trace import now

if TYPE_CHECKING:
    from mlx_serving.common.events import Event

LANES = ("interactive", "default", "bulk")


def digest(events: list[tuple[Any, ...]]) -> str:
    return hashlib.sha256(json.dumps(events).encode()).hexdigest()


def seen(event: Event) -> tuple[Any, ...]:
    """What two readers of one event must agree on."""
    choices = msgspec.to_builtins(event.choices)
    return (event.seq, event.attempt, event.type, choices, event.state, event.tag)


@dataclass
class Follower:
    """One consumer of one job. `resumes`: (ns it reconnected, ms to the first event it lacked)."""

    job_id: str
    rng: random.Random
    client: AsyncClient
    through_proxy: bool
    events: list[tuple[Any, ...]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    resumes: list[tuple[int, float]] = field(default_factory=list)
    connections: int = 0
    unavailable: int = 0
    ended: bool = False
    cursor: str = ""

    @property
    def after(self) -> int:
        return self.events[-1][0] if self.events else 0

    async def run(self) -> None:
        await asyncio.sleep(self.rng.choice([0, 0, self.rng.uniform(0, 3)]))  # some join late
        while not (self.ended or self.problems):
            try:
                await self._connect()
            except QueueUnavailable:
                self.unavailable += 1
            except MlxServingError as error:
                self.problems.append(f"{error.code}: {error}")
            if not self.ended:
                await asyncio.sleep(self.rng.uniform(0, 0.5))

    async def _connect(self) -> None:
        lacks = self.connections > 0 and (await self.client.status(self.job_id)).seq > self.after
        self.connections += 1
        patience = self.rng.choice([None, self.rng.randint(1, 30)])
        started, got = now(), 0
        async with aclosing(self.client.stream(self.job_id, self.cursor)) as stream:
            async for event in stream:
                if lacks and not got:
                    self.resumes.append((started, (now() - started) / 1e6))
                got += 1
                self._take(event)
                if self.ended or self.problems or got == patience:
                    return
        if not self.ended:
            self.problems.append(f"the stream ended after seq {self.after} without an end event")

    def token_ids(self) -> dict[int, list[int]]:
        """Each choice's tokens."""
        tokens: defaultdict[int, list[int]] = defaultdict(list)
        for event in self.events:
            for choice in event[3]:
                tokens[choice["index"]] += choice.get("token_ids", [])
        return tokens

    def _take(self, event: Event) -> None:
        if event.seq != self.after + 1:
            self.problems.append(f"got seq {event.seq} after {self.after}")
        self.events.append(seen(event))
        self.cursor = event.cursor
        self.ended = event.type == "end"


class Producer:
    """`given`: url, proxy_url, folder, index, seed, in_flight, and work as `work.Work`."""

    def __init__(self, given: dict[str, Any]) -> None:
        self._given = given
        self._folder = Path(given["folder"])
        self._rng = random.Random(f"{given['seed']} producer {given['index']}")
        self._work: list[dict[str, Any]] = given["work"]
        self._room = asyncio.Semaphore(given["in_flight"])
        path = self._folder / f"producer-{given['index']}.jsonl"
        self._file = path.open("a", buffering=1)

    def _note(self, **fact: Any) -> None:
        self._file.write(json.dumps(fact) + "\n")

    async def run(self) -> None:
        given = self._given
        async with (
            AsyncClient(settings=load_settings(redis__url=given["proxy_url"])) as lossy,
            AsyncClient(settings=load_settings(redis__url=given["url"])) as direct,
            asyncio.TaskGroup() as tasks,
        ):
            self._clients = (lossy, direct)
            lag = tasks.create_task(self._measure_lag())
            number = 0
            while not (self._folder / "stop").exists():
                await self._room.acquire()
                number += 1
                tasks.create_task(self._one(number))
            lag.cancel()
        self._note(what="over")

    async def _measure_lag(self) -> None:
        """How late this process runs what is due: a part of every time that it measures."""
        while True:
            late = []
            for _ in range(50):
                due = now() + 20_000_000
                await asyncio.sleep(0.02)
                late.append((due, round((now() - due) / 1e6, 1)))
            self._note(what="lag", late=late)

    async def _one(self, number: int) -> None:
        try:
            index = self._rng.randrange(len(self._work))
            job_id = await self._submit(index, number)
            followers = [self._follower(job_id) for _ in range(self._rng.choice([1, 1, 1, 2]))]
            await asyncio.gather(*(f.run() for f in followers))
            wanted = {c["index"]: c["token_ids"] for c in self._work[index]["answer"]}
            for follower in followers:
                if follower.ended and (tokens := follower.token_ids()) != wanted:
                    counts = [{i: len(ids) for i, ids in each.items()} for each in (tokens, wanted)]
                    follower.problems.append(f"other tokens: {counts[0]} for {counts[1]}")
                self._report(follower)
            self._note(what="done", job=job_id)
        finally:
            self._room.release()

    async def _submit(self, index: int, number: int) -> str:
        """Until it is acknowledged: a submit with a key may be sent any number of times."""
        key = f"{self._given['index']}-{number}"
        job = self._work[index]["job"] | {
            "idempotency_key": key,
            "lane": self._rng.choice(LANES),
            "stream": self._rng.random() < 0.9,
        }
        while True:
            try:
                handle = await self._clients[0].submit(job)
            except QueueUnavailable:
                await asyncio.sleep(0.1)
            else:
                self._note(what="job", job=handle.id, work=index)
                return handle.id

    def _follower(self, job_id: str) -> Follower:
        through_proxy = self._rng.random() < 0.5
        client = self._clients[0 if through_proxy else 1]
        return Follower(job_id, random.Random(self._rng.random()), client, through_proxy)

    def _report(self, f: Follower) -> None:
        self._note(
            what="consumer", job=f.job_id, digest=digest(f.events), events=len(f.events),
            problems=f.problems, resumes=f.resumes, connections=f.connections,
            through_proxy=f.through_proxy, unavailable=f.unavailable,
        )  # fmt: skip


if __name__ == "__main__":
    asyncio.run(Producer(json.loads(Path(sys.argv[1]).read_text())).run())
