"""Many queued jobs: what each costs, how fast they come in, and a worker that does not grow (D11).

`pytest -s` shows the figures; `make chaos` runs 100,000 jobs, `make test` a tenth of them.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import pytest

from mlx_serving.common.job.schema import GenerationJob
from mlx_serving.producer.envelope import seal
from tests.support.figures import show
from tests.support.helpers import dataset_bytes, wait_until
from tests.support.worker_process import WorkerProcess, check_answers

if TYPE_CHECKING:
    import redis

    from mlx_serving import Client
    from mlx_serving.common.redis.local import LocalRedis
    from mlx_serving.producer.handles import JobHandle

pytestmark = [
    pytest.mark.slow,
    pytest.mark.may_leak(reason="a worker that is killed at the end leaves its name in RQ's sets"),
]

QUEUED_BYTES = 1.5 * 1024  # a queued job beside its payload
EVENT_BYTES = 100  # an event beside its text
SUBMIT_RATIO = 3.0  # the goal, held to where the run is long enough to measure it
SHORT_RATIO = 2.0  # what a short run on a busy machine still tells from no batches at all
RSS_GROWTH = 1.05
TOKENS = 3
WARM_UP = 5_000  # jobs: buffers and caches come to their size
SHORT = 10_000  # jobs
BATCH, SINGLES = 1_000, 200
PROMPT = "count from 3 to 12, " * 10


class Enqueued(NamedTuple):
    """Jobs, and their rates in jobs a second."""

    handles: list[JobHandle]
    many: float
    single: float


def job(tokens: int = TOKENS) -> dict[str, object]:
    return {"model": "tally", "prompt": PROMPT, "max_tokens": tokens, "result_ttl": 600, "seed": 1}


def enqueue(client: Client, count: int) -> Enqueued:
    """In turn, so that both see the same queue; the best of each, because noise only adds."""
    handles: list[JobHandle] = []
    many, single = 0.0, 0.0
    for start in range(0, count, BATCH):
        jobs = [job()] * (min(BATCH, count - start) - SINGLES)
        begun = time.perf_counter()
        handles += client.submit_many(jobs)
        between = time.perf_counter()
        handles += [client.submit(job()) for _ in range(SINGLES)]
        many = max(many, len(jobs) / (between - begun))
        single = max(single, SINGLES / (time.perf_counter() - between))
    return Enqueued(handles, many, single)


def payload_bytes() -> int:
    entry = seal(GenerationJob.parse(job()), max_payload_bytes=1 << 20)
    return len(cast("bytes", entry.rq_fields["data"]))


def resident(pid: int) -> int:
    """Bytes of a process in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def left(client: redis.Redis) -> int:
    return int(client.zcard("mlxs:open:tally:default"))


def work_off(worker: WorkerProcess, client: redis.Redis, count: int) -> list[int]:
    """The child's resident bytes at each twentieth of the way."""
    worker.serving()
    sizes = []
    for part in range(1, 21):
        goal = count - count * part // 20
        wait_until(lambda goal=goal: left(client) <= goal, timeout=120, what=worker.log())  # type: ignore[misc]
        sizes.append(resident(worker.child_pid))
    return sizes


def event_bytes(client: redis.Redis, handles: list[JobHandle]) -> float:
    """What an event of a long stream costs beside its text: from a job with many."""
    (name,) = {f"mlxs:ev:{h.id}" for h in handles}
    entries: list[Any] = client.xrange(name) or []
    texts = [e.get(b"t", b"").partition(b'"text":"')[2].partition(b'"')[0] for _, e in entries]
    text = sum(map(len, texts))
    return (int(client.memory_usage(name, samples=0) or 0) - text) / len(entries)


@pytest.mark.parametrize(
    "count",
    [
        pytest.param(SHORT, marks=pytest.mark.timeout(120)),
        pytest.param(100_000, marks=[pytest.mark.chaos, pytest.mark.timeout(900)]),
    ],
)
def test_a_long_queue(
    settled_redis: LocalRedis,
    redis_client: redis.Redis,
    client: Client,
    count: int,
) -> None:
    url = settled_redis.url
    before = dataset_bytes(redis_client)
    queued = enqueue(client, count)
    each = (dataset_bytes(redis_client) - before) / count
    beside = each - payload_bytes()
    assert redis_client.llen("rq:queue:tally:default") == count
    show(
        f"{count} queued: {each:.0f} bytes each, {beside:.0f} beside a payload of"
        f" {payload_bytes()}; submit_many {queued.many:.0f} jobs/s, submit {queued.single:.0f}"
        f" jobs/s, {queued.many / queued.single:.1f}x"
    )
    assert beside <= QUEUED_BYTES
    ratio = SHORT_RATIO if count == SHORT else SUBMIT_RATIO
    assert queued.many >= ratio * queued.single
    # The first jobs warm the worker up; the rest may not make it grow.
    with WorkerProcess(url, "w", rate=0.0, batch__max_rows=64) as worker:
        begun = time.perf_counter()
        sizes = work_off(worker, redis_client, count)
        rate = count / (time.perf_counter() - begun)
        warm = max(0, WARM_UP * 20 // count - 1)
        show(
            f"worked off at {rate:.0f} jobs/s; resident {sizes[warm] / 2**20:.1f} MiB after"
            f" {WARM_UP} jobs, then at most {max(sizes[warm:]) / 2**20:.1f},"
            f" {sizes[-1] / 2**20:.1f} at the end"
        )
        assert max(sizes[warm:]) < RSS_GROWTH * sizes[warm]
        assert left(redis_client) == 0
        states = {client.status(h.id).state.value for h in queued.handles[:: count // 500]}
        assert states == {"finished"}


def test_events_of_a_stream_stay_small(
    settled_redis: LocalRedis, redis_client: redis.Redis, client: Client
) -> None:
    with WorkerProcess(settled_redis.url, "w", rate=1000.0) as worker:
        worker.serving()
        handle = client.submit(job(tokens=2000))
        check_answers(client, [handle], 2000)
    each = event_bytes(redis_client, [handle])
    show(f"{each:.0f} bytes an event beside its text")
    assert each <= EVENT_BYTES
