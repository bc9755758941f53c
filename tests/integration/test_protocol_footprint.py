"""What a job costs in Redis, and that nothing stays (D11). `pytest -s` shows the figures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import msgspec
import pytest

from mlx_serving.common.job.schema import GenerationJob
from mlx_serving.common.lifetimes import Lifetimes
from mlx_serving.common.protocol import calls, ended_calls
from mlx_serving.common.states import JobState
from mlx_serving.producer.envelope import seal
from mlx_serving.worker.delivery.sweeper import Sweeper
from tests.support.helpers import dataset_bytes, wait_until
from tests.support.protocol_driver import LANES, QUEUE, Attempt, Driver

if TYPE_CHECKING:
    import redis

    from mlx_serving.common.redis.local import LocalRedis

JOBS = 2_000
EVENTS = 2_000
QUEUED_BYTES = 1.5 * 1024
EVENT_BYTES = 100
MANY = 32
BRIEF = Lifetimes(failed=1)
CLAIM_COMMANDS = 11  # a job, of a claim of many
MARKED_COMMANDS = 2  # more a mark: of a job, or of a claim where the jobs share it
LEFT_COMMANDS = 3  # a job that is left to the worker that has its prefix
EVENT_COMMANDS = 6  # an event, of a flush of many rows
END_COMMANDS = 14  # a job's last event and its end


def memory(client: redis.Redis, *names: str) -> int:
    return sum(int(client.memory_usage(name, samples=0) or 0) for name in names)


@pytest.mark.may_leak(reason="jobs stay queued")
@pytest.mark.parametrize("tenant", [None, "acme"])
def test_a_queued_job_costs_at_most_1_5_kib_and_its_payload(
    driver: Driver, tenant: str | None
) -> None:
    prompt = "count from 3 to 12, " * 10
    entries = [
        seal(
            GenerationJob.build(model="tally", prompt=prompt, deadline=60, tenant=tenant),
            max_payload_bytes=1 << 20,
        )
        for _ in range(JOBS)
    ]
    payload = sum(len(cast("bytes", e.rq_fields["data"])) for e in entries) / JOBS
    before = dataset_bytes(driver.redis)
    driver.protocol.run_many([calls.enqueue(e) for e in entries])
    by_dataset = (dataset_bytes(driver.redis) - before) / JOBS
    one = entries[0].job_id
    own = memory(driver.redis, f"mlxs:job:{one}", f"rq:job:{one}")
    keys = [driver.keys.open(QUEUE), "rq:queue:tally:default", "mlxs:deadlines"]
    if tenant:
        keys += [driver.keys.tenant_queued(tenant), driver.keys.line(QUEUE, tenant)]
    else:
        assert not driver.redis.exists(driver.keys.turns(QUEUE), driver.keys.tenants())
    shared = memory(driver.redis, *keys)
    by_keys = own + shared / JOBS
    assert by_keys - payload <= QUEUED_BYTES
    assert by_dataset - payload <= QUEUED_BYTES


@pytest.mark.may_leak(reason="the job stays running")
def test_an_event_costs_at_most_100_bytes_and_its_text(driver: Driver) -> None:
    attempt = driver.start("a")
    driver.commit(attempt, attempt.row())
    before = memory(driver.redis, "mlxs:ev:a")
    text = " word"
    rows = [attempt.row(text=text) for _ in range(EVENTS)]
    for start in range(0, EVENTS, 100):
        driver.commit(attempt, *rows[start : start + 100])
    each = (memory(driver.redis, "mlxs:ev:a") - before) / EVENTS
    assert each - len(text) <= EVENT_BYTES


def test_an_ended_job_keeps_its_output_once(driver: Driver) -> None:
    """Besides, it takes as much as one that waits; once it is forgotten, nothing."""
    attempt = driver.start("a")
    rows = [attempt.row(text="word " * 20) for _ in range(50)]
    last = attempt.end()
    assert last.end is not None
    result = b'{"v":1,"id":"a","state":"finished","choices":[{"index":0,"text":"%b"}]}' % (
        b"word " * 1000
    )
    end = msgspec.structs.replace(last.end, result=result, rq_result=b"")
    driver.commit(attempt, *rows, msgspec.structs.replace(last, end=end))
    driver.redis.delete(driver.keys.events("a"), *driver.redis.keys("mlxs:claim:*"))
    names = [name.decode() for name in driver.redis.scan_iter(count=1000)]
    holding = [name for name in names if b"word" in (driver.redis.dump(name) or b"")]
    assert holding == [driver.keys.job("a")]
    left = memory(driver.redis, *names)
    # The allocator's sizes are a quarter apart.
    assert left - 1.25 * len(result) <= QUEUED_BYTES
    driver.protocol.run(ended_calls.forget(["a"]))
    assert list(driver.redis.scan_iter()) == [b"rq:queues"]


def commands(client: redis.Redis) -> int:
    """Commands that Redis has run, those of scripts included."""
    stats: dict[str, dict[str, int]] = client.info("commandstats")
    return sum(s["calls"] for name, s in stats.items() if name != "cmdstat_info")


@pytest.mark.may_leak(reason="RQ's view of ended jobs stays")
def test_a_job_costs_few_commands_and_a_live_event_fewer(driver: Driver) -> None:
    """Redis runs every script on one core: what it does there bounds how many Macs it carries."""
    for number in range(MANY):
        driver.enqueue(f"job{number}")
    before = commands(driver.redis)
    attempts = [Attempt(job, "w1") for job in driver.claim(most=MANY).jobs]
    assert len(attempts) == MANY
    claimed = commands(driver.redis)
    assert claimed - before <= CLAIM_COMMANDS * MANY
    driver.commit(attempts[0], *(attempt.row() for attempt in attempts))
    driver.commit(attempts[0], *(attempt.row() for attempt in attempts))
    streamed = commands(driver.redis)
    assert streamed - claimed <= 2 * EVENT_COMMANDS * MANY
    driver.commit(attempts[0], *(row for a in attempts for row in (a.row(), a.end())))
    assert commands(driver.redis) - streamed <= END_COMMANDS * MANY


@pytest.mark.may_leak(reason="jobs stay running")
@pytest.mark.parametrize("taken", ["by who has them", "by the first"])
def test_marks_cost_few_commands(driver: Driver, taken: str) -> None:
    """Each job is of a conversation of its own, and all share a beginning."""
    for number in range(2 * MANY):
        driver.enqueue(f"job{number}", marks=f"{number % MANY:016x},{'b' * 16}")
    if taken == "by who has them":
        driver.claim(most=MANY, affinity_ms=150, keeps_prefixes=True)
    before = commands(driver.redis)
    assert len(driver.claim(most=MANY, affinity_ms=150, keeps_prefixes=True).jobs) == MANY
    per_job = CLAIM_COMMANDS + MARKED_COMMANDS
    assert commands(driver.redis) - before <= per_job * MANY + MARKED_COMMANDS


@pytest.mark.may_leak(reason="jobs stay queued")
def test_a_job_that_is_left_costs_few_commands(driver: Driver) -> None:
    facts: dict[Any, Any] = {"state": "serving", "resident": "tally", "batch_rows": 8 * MANY}
    driver.redis.hset(driver.keys.worker("w1"), mapping=facts)
    driver.enqueue("first", marks=f"{'c' * 16},{'b' * 16}")
    driver.claim(affinity_ms=150, keeps_prefixes=True)
    for number in range(MANY):
        driver.enqueue(f"job{number}", marks=f"{number:016x},{'b' * 16}")
    before = commands(driver.redis)
    assert driver.claim("w2", most=MANY, affinity_ms=10_000, keeps_prefixes=True).jobs == []
    assert commands(driver.redis) - before <= LEFT_COMMANDS * MANY + 10


def finish(driver: Driver, state: JobState) -> None:
    attempt = driver.start("a", result_ttl=1, lifetimes=BRIEF)
    driver.commit(attempt, attempt.row(), attempt.end(state))


def cancel_queued(driver: Driver) -> None:
    driver.enqueue("a", result_ttl=1, deadline_ms=60_000)
    driver.cancel("a")


def finish_a_tenants(driver: Driver) -> None:
    attempt = driver.start("a", result_ttl=1, tenant="acme")
    driver.release(attempt)
    attempt = driver.take()
    driver.commit(attempt, attempt.row(), attempt.end())


def cancel_after_hand_over(driver: Driver) -> None:
    attempt = driver.start("a", result_ttl=1)
    driver.commit(attempt, attempt.row())
    driver.release(attempt)
    driver.cancel("a")


def die(driver: Driver) -> None:
    attempt = driver.start("a", result_ttl=1, max_attempts=1, lifetimes=BRIEF)
    driver.commit(attempt, attempt.row())
    blame = calls.Blame(attempt.job.attempt, max_unproven=1, alone=True)
    assert driver.protocol.run(calls.crash("w1", [blame])) == [("a", "dead")]


def stock_delete(driver: Driver) -> None:
    attempt = driver.start("a", result_ttl=1)
    driver.redis.delete("rq:job:a")
    driver.commit(attempt, attempt.row(), attempt.end(JobState.CANCELLED))


@pytest.mark.parametrize(
    "end",
    [
        lambda driver: finish(driver, JobState.FINISHED),
        lambda driver: finish(driver, JobState.FAILED),
        cancel_queued,
        finish_a_tenants,
        cancel_after_hand_over,
        die,
        stock_delete,
    ],
    ids=[
        "finished",
        "failed",
        "cancelled queued",
        "a tenant's",
        "cancelled handed over",
        "dead",
        "deleted",
    ],
)
def test_nothing_is_left_after_result_ttl(
    driver: Driver, settled_redis: LocalRedis, end: object
) -> None:
    del settled_redis
    assert callable(end)
    driver.lease_ms = 1_000  # a claim is remembered for as long
    end(driver)
    sweeper = Sweeper(driver.protocol, LANES, lease_ms=1_000, reap_seconds=1)

    def left() -> set[bytes]:
        sweeper.reap()
        return set(driver.redis.scan_iter(count=1000))

    # RQ's set of its queues is the one key that stays, one for all jobs.
    wait_until(lambda: left() == {b"rq:queues"}, timeout=5, what="keys stayed")
