"""What a claim costs Redis with tenants in the lane: one that has none is the measure.

    python -m benchmarks.studies.tenants

Jobs are claimed 32 a call and ended, by the protocol's scripts alone; the time is Redis's own of
the claim calls (`INFO commandstats`), so it is what the scripts hold everybody else up.
"""

import argparse
import statistics
from collections.abc import Sequence
from typing import Final

import redis

from benchmarks.lib.harness import Figure, table
from mlx_serving.common.attempts import new_nonce
from mlx_serving.common.events import end_event
from mlx_serving.common.protocol import calls
from mlx_serving.common.protocol.calls import ClaimedJob
from mlx_serving.common.protocol.client import Protocol
from mlx_serving.common.protocol.keys import Keys
from mlx_serving.common.redis.local import LocalRedis
from mlx_serving.common.states import JobState

QUEUE: Final = "tally:bulk"
MOST: Final = 32
ENQUEUE: Final = 500
QUEUED: Final = 10_000
CLAIMS: Final = 30
FIELDS: Final[dict[str, str | bytes | int]] = {
    "status": "queued",
    "data": b"x" * 300,
    "origin": QUEUE,
    "timeout": 180,
}


class Lane:
    """One lane of a private Redis, filled by hand and emptied by claims."""

    def __init__(self, client: redis.Redis) -> None:
        client.flushall()
        self.redis, self.keys = client, Keys()
        self.protocol = Protocol(client, self.keys)
        self._count = 0

    def fill(self, tenant: str, count: int) -> None:
        """Enqueue jobs of a tenant ('': of none)."""
        numbers = range(self._count, self._count + count)
        self._count += count
        entries = [
            calls.EnqueueEntry(f"{n:032x}", QUEUE, FIELDS, result_ttl=600, tenant=tenant)
            for n in numbers
        ]
        for start in range(0, count, ENQUEUE):
            self.protocol.run(calls.enqueue_many(entries[start : start + ENQUEUE]))

    def claims(self, count: int) -> tuple[list[float], int]:
        """Milliseconds of each claim, and how many jobs they took."""
        milliseconds, jobs = [], 0
        for _ in range(count):
            self.redis.config_resetstat()
            claimed = self.protocol.run(
                calls.claim(
                    "w", [QUEUE], nonce=new_nonce(), most=MOST, lease_ms=60_000, protocol=1,
                    capacity_tokens=1 << 30, max_payload_bytes=1 << 20,
                )
            ).jobs  # fmt: skip
            stats = self.redis.info("commandstats")["cmdstat_evalsha"]
            milliseconds.append(stats["usec"] / 1000)
            jobs += len(claimed)
            self._end(claimed)
        return milliseconds, jobs

    def _end(self, held: Sequence[ClaimedJob]) -> None:
        rows = []
        for job in held:
            seq = job.seq + 1
            event = end_event(attempt=job.epoch, seq=seq, state=JobState.FINISHED)
            end = calls.JobEnd(JobState.FINISHED)
            rows.append(calls.CommitRow.of(job.attempt, event, publish=False, end=end))
        if rows:
            self.protocol.run(calls.commit("w", rows, lease_ms=60_000))


def measure(queued: int = QUEUED, claims: int = CLAIMS) -> list[Figure]:
    """Cases by what stands in the lane."""
    figures: list[Figure] = []

    def case(name: str, lane: Lane) -> None:
        milliseconds, jobs = lane.claims(claims)
        figures.append(Figure(f"{name}: median", statistics.median(milliseconds), "ms"))
        figures.append(Figure(f"{name}: longest", max(milliseconds), "ms"))
        figures.append(Figure(f"{name}: jobs a claim", jobs / claims, ""))

    with LocalRedis() as server, server.client() as client:
        lane = Lane(client)
        lane.fill("", queued)
        case("no tenant", lane)
        lane = Lane(client)
        lane.fill("a", queued)
        case("one tenant", lane)
        lane = Lane(client)
        lane.fill("a", queued)
        lane.fill("b", MOST * claims)
        case("behind another's jobs", lane)
        lane = Lane(client)
        for n in range(100):
            lane.fill(f"t{n}", queued // 100)
        case("100 tenants, one after the other", lane)
        lane = Lane(client)
        lane.redis.hset(lane.keys.limits(), "running:a", 0)
        lane.fill("a", queued)
        case("one tenant held back", lane)
        lane.fill("b", MOST * claims)
        case("behind one that is held back", lane)
    return figures


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--queued", type=int, default=QUEUED)
    parser.add_argument("--claims", type=int, default=CLAIMS)
    options = parser.parse_args()
    print(table({f"Claims of {MOST}, {options.queued} jobs queued": measure(**vars(options))}))


if __name__ == "__main__":
    main()
