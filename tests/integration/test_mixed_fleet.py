"""Two protocols in one fleet (DESIGN §2): whatever is deployed first, nothing is lost.

The newer one is invented: producer and newer workers here believe that it came with
`presence_penalty`. Workers of today's protocol leave such jobs alone.
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

import pytest

from mlx_serving.common.job import schema
from mlx_serving.common.protocol.fields import JobField
from mlx_serving.common.queues import PROTOCOL
from tests.support.worker_process import (
    Hacks,
    WorkerProcess,
    check_answers,
    job_events,
    submit,
    wait_until_decoded,
)

if TYPE_CHECKING:
    import redis

    from mlx_serving import Client
    from mlx_serving.common.redis.local import LocalRedis
    from mlx_serving.producer.handles import JobHandle

pytestmark = [
    pytest.mark.slow,
    pytest.mark.may_leak(
        reason="workers that are killed at the end leave their names in RQ's sets"
    ),
]

OLD, NEW = PROTOCOL, PROTOCOL + 1
NEWER_FIELD: dict[str, Any] = {"presence_penalty": 0.5}
RATE = 100.0


@pytest.fixture(autouse=True)
def newer_producer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have this process submit as a producer of the newer protocol does."""
    monkeypatch.setattr(schema, "FEATURE_PROTOCOL", dict.fromkeys(NEWER_FIELD, NEW))


def worker(url: str, name: str, protocol: int = NEW, rate: float = RATE) -> WorkerProcess:
    hacks = Hacks(protocol=protocol)
    return WorkerProcess(url, name, rate, hacks, worker__drain_seconds=0).serving()


def old_jobs(client: Client, count: int, tokens: int = 40) -> list[JobHandle]:
    return submit(client, count, tokens)


def new_jobs(client: Client, count: int, tokens: int = 40) -> list[JobHandle]:
    return submit(client, count, tokens, **NEWER_FIELD)


def owners(client: Client, handles: list[JobHandle]) -> set[str | None]:
    """Every worker that ever opened an attempt of these jobs."""
    return {e.worker for h in handles for e in job_events(client, h.id) if e.type == "attempt"}


def touched(raw: redis.Redis, handles: list[JobHandle]) -> set[tuple[Any, ...]]:
    """What a claim changes: state, epoch, owner, seq."""
    names = (JobField.STATE, JobField.EPOCH, JobField.OWNER, JobField.SEQ)
    return {tuple(raw.hmget(f"mlxs:job:{h.id}", *names)) for h in handles}


UNTOUCHED = {(b"queued", b"0", b"", b"0")}


def test_the_newer_jobs_need_the_newer_protocol(client: Client, redis_client: redis.Redis) -> None:
    kinds = [old_jobs(client, 1), new_jobs(client, 1)]
    name = JobField.MIN_PROTOCOL
    needed = [redis_client.hget(f"mlxs:job:{handles[0].id}", name) for handles in kinds]
    assert needed == [b"%d" % OLD, b"%d" % NEW]


def test_producers_first(
    settled_redis: LocalRedis, redis_client: redis.Redis, client: Client
) -> None:
    """Newer jobs wait, unharmed and harming nobody, until there is a worker for them."""
    url = settled_redis.url
    with worker(url, "old-a", OLD) as first, worker(url, "old-b", OLD):
        newer = new_jobs(client, 40)  # in front of all others, in the same lane
        older = old_jobs(client, 40)
        check_answers(client, older, 40)
        assert touched(redis_client, newer) == UNTOUCHED
        running = old_jobs(client, 16, 400)
        wait_until_decoded(client, running, 4)
        first.terminate()
        assert first.exit_status() == 0
        with worker(url, "new-a"):
            check_answers(client, newer, 40)
            check_answers(client, running, 400)
    assert owners(client, newer) == {"new-a"}
    assert owners(client, older) <= {"old-a", "old-b"}


def test_workers_first(settled_redis: LocalRedis, client: Client) -> None:
    """The newer worker takes both kinds, the older one its own, side by side."""
    url = settled_redis.url
    with worker(url, "old-a", OLD) as old, worker(url, "new-b"):
        old.signal(signal.SIGSTOP)
        alone = old_jobs(client, 4)
        check_answers(client, alone, 40)
        assert owners(client, alone) == {"new-b"}
        old.signal(signal.SIGCONT)
        older, newer = [], []
        for _ in range(8):
            older += old_jobs(client, 6)
            newer += new_jobs(client, 6)
        check_answers(client, older, 40)
        check_answers(client, newer, 40)
        assert owners(client, newer) == {"new-b"}
        assert owners(client, older) <= {"old-a", "new-b"}
        old.terminate()
        assert old.exit_status() == 0
        rest = old_jobs(client, 4) + new_jobs(client, 4)
        check_answers(client, rest, 40)


@pytest.mark.chaos
def test_a_roll_back_in_the_middle(
    settled_redis: LocalRedis, redis_client: redis.Redis, client: Client
) -> None:
    """Jobs begun by the newer worker: the older one continues its own kind and leaves the other."""
    url = settled_redis.url
    with worker(url, "new-a") as first:
        older, newer = old_jobs(client, 8, 300), new_jobs(client, 8, 300)
        wait_until_decoded(client, older + newer, 4)
        first.terminate()
        assert first.exit_status() == 0
    handed_over = touched(redis_client, newer)
    with worker(url, "old-a", OLD):
        check_answers(client, older, 300)
        assert touched(redis_client, newer) == handed_over
    assert {state for state, *_ in handed_over} == {b"queued"}
    with worker(url, "new-b"):
        check_answers(client, newer, 300)
    assert owners(client, older) == {"new-a", "old-a"}
    assert owners(client, newer) == {"new-a", "new-b"}
