"""What marks cost Redis: its own time of claims (`INFO commandstats`), a job.

    python -m benchmarks.studies.affinity_claims

Jobs are claimed 32 a call by the protocol's script alone, without marks, with a beginning that all
share, and with a conversation of its own each as well. *Passed*: one job a call, behind 32 bulk
lines whose beginning another worker has, over the same without prefix affinity.
"""

import statistics
from collections.abc import Callable
from typing import Any, Final

import redis

from benchmarks.lib.harness import Figure, table
from benchmarks.studies.tenants import FIELDS, MOST, QUEUE, Lane
from mlx_serving.common.attempts import new_nonce
from mlx_serving.common.protocol import calls
from mlx_serving.common.redis.local import LocalRedis

CLAIMS: Final = 64
PASSED: Final = 32
ROUNDS: Final = 3
SHARED: Final = "b" * 16
ON: Final = {"affinity_ms": 150, "keeps_prefixes": True}
CASES: Final[dict[str, Callable[[int], str]]] = {
    "no mark": lambda _: "",
    "one beginning": lambda _: f",{SHARED}",
    "own conversations": lambda n: f"{n:016x},{SHARED}",
}


def fill(lane: Lane, count: int, marks: Callable[[int], str]) -> None:
    """Enqueue jobs, some claims' worth a call."""
    entries = [
        calls.EnqueueEntry(f"{n:032x}", QUEUE, FIELDS, result_ttl=600, marks=marks(n))
        for n in range(count)
    ]
    for start in range(0, count, MOST):
        lane.protocol.run(calls.enqueue_many(entries[start : start + MOST]))


def claims(lane: Lane, most: int, **given: Any) -> list[float]:
    """Microseconds of each claim."""
    found = []
    for _ in range(CLAIMS):
        call = calls.claim(
            "w", [QUEUE], nonce=new_nonce(), most=most, lease_ms=600_000, protocol=1,
            capacity_tokens=1 << 30, max_payload_bytes=1 << 20, **given,
        )  # fmt: skip
        lane.redis.config_resetstat()
        assert len(lane.protocol.run(call).jobs) == most
        found.append(float(lane.redis.info("commandstats")["cmdstat_evalsha"]["usec"]))
    return found


def passed(client: redis.Redis, **given: Any) -> list[float]:
    """Claims of one job each, of those behind lines whose beginning another worker has."""
    lane = Lane(client)
    facts: dict[Any, Any] = {"state": "serving", "resident": "tally", "batch_rows": 1}
    client.hset(lane.keys.worker("other"), mapping=facts)
    client.set(lane.keys.warm(SHARED), "\nother\n")
    fill(lane, PASSED + CLAIMS, lambda n: f",{SHARED}" if n < PASSED else "")
    for n in range(PASSED):  # older than anybody leaves them
        client.hincrby(lane.keys.job(f"{n:032x}"), "en", -60_000)
    return claims(lane, 1, **given)


def measure(rounds: int = ROUNDS) -> list[Figure]:
    """Cases in turn: the median of all claims and the least."""
    found: dict[str, list[float]] = {name: [] for name in (*CASES, "passed", "not passed")}
    with LocalRedis() as server, server.client() as client:
        for _ in range(rounds):
            for name, marks in CASES.items():
                lane = Lane(client)
                fill(lane, MOST * CLAIMS, marks)
                found[name] += [us / MOST for us in claims(lane, MOST, **ON)]
            found["passed"] += passed(client, **ON)
            found["not passed"] += passed(client)
    figures = []
    for what, of in (("median", statistics.median), ("least", min)):
        figures += [Figure(f"{name}: {what}", of(found[name]), "µs/job") for name in CASES]
        more = (of(found["passed"]) - of(found["not passed"])) / PASSED
        figures.append(Figure(f"passed: {what}", more, "µs/line"))
    return figures


def main() -> None:
    """Print the table."""
    print(table({f"Claims of {MOST}": measure()}))


if __name__ == "__main__":
    main()
