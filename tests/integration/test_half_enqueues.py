"""An enqueue that Redis cut in half is completed by its retry, or refused; nothing of it is left.

Redis cuts a script in half by an error in its middle. Here the error is a permission that is
missing, for each command of the script that writes.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
import redis

from mlx_serving import Client
from mlx_serving.common.errors import MissingPermission
from mlx_serving.common.protocol import calls, ended_calls
from mlx_serving.common.protocol.client import Protocol
from mlx_serving.common.protocol.keys import Keys
from mlx_serving.common.redis.connection import connect, resolve
from mlx_serving.common.redis.local import LocalRedis
from mlx_serving.common.states import JobState
from mlx_serving.worker.delivery.sweeper import Sweeper
from tests.support.protocol_driver import LANES, LEASE_MS, QUEUE, Driver, entry
from tests.support.redis_users import as_user
from tests.support.worker_process import InProcessWorker, quick_settings

if TYPE_CHECKING:
    from collections.abc import Iterator

TENANT = "acme"
# Everything that an enqueue writes; the index once in each form of a resend.
WRITTEN = [
    "mlxs:job:*", "mlxs:open:*", "mlxs:deadlines", "mlxs:tenants", "mlxs:tenant:*", "mlxs:line:*",
    "mlxs:turns:*", "rq:job:*", "rq:queue:*", "rq:queues",
]  # fmt: skip
READ = ("mlxs:ev:*", "mlxs:limits", "rq:results:*")
TOLERATED = {"mlxs:tenants", "mlxs:tenant:*", "mlxs:line:*", "mlxs:turns:*"}  # shares, no jobs


@pytest.fixture(scope="module")
def server() -> Iterator[LocalRedis]:
    with LocalRedis() as server:
        yield server


@pytest.fixture
def driver(server: LocalRedis) -> Iterator[Driver]:
    with server.client() as client:
        client.flushall()
        yield Driver(client)


def forbid(driver: Driver, *patterns: str, more: str = "") -> None:
    """Make a user that may do all, but may only read these of the keys."""
    allowed = [f"~{p}" for p in (*WRITTEN, *READ) if p not in patterns]
    rules = ["reset", "on", "nopass", "allchannels", "+@all", *more.split(), *allowed]
    driver.redis.execute_command("ACL", "SETUSER", "half", *rules, *(f"%R~{p}" for p in patterns))


def half(server: LocalRedis) -> redis.Redis:
    """Connect as that user."""
    return connect(resolve(quick_settings(as_user(server.url, "half", "x"))))


@pytest.mark.parametrize("pattern", WRITTEN)
def test_a_first_enqueue_leaves_nothing_and_its_retry_enqueues(
    server: LocalRedis, driver: Driver, pattern: str
) -> None:
    forbid(driver, pattern)
    send: dict[str, Any] = {"tenant": TENANT, "deadline_ms": 60_000}
    if pattern in TOLERATED:
        assert Driver(half(server)).enqueue("a", **send).created
    else:
        with pytest.raises(redis.ResponseError, match="can't access"):
            Driver(half(server)).enqueue("a", **send)
        assert {*driver.redis.scan_iter()} <= {b"rq:queues"}  # says that there is such a queue
        assert driver.enqueue("a", **send).created
    assert not driver.enqueue("a", **send).created
    assert driver.claimed_ids() == ["a"]
    driver.cancel("a")


def test_without_a_wake_up_it_is_enqueued_and_its_retry_says_so(
    server: LocalRedis, driver: Driver
) -> None:
    forbid(driver, more="-publish")
    with pytest.raises(redis.ResponseError):
        Driver(half(server)).enqueue("a")
    reply = driver.enqueue("a")
    assert (reply.created, reply.state.value) == (False, "queued")
    assert driver.claimed_ids() == ["a"]


HALVES = {
    "control hash alone": ["mlxs:open", "mlxs:deadlines", "rq:job", "rq:queue", "rq:queues"],
    "no RQ hash": ["mlxs:open", "rq:job", "rq:queue", "rq:queues"],
    "no list": ["mlxs:open", "rq:queue"],
    "no index": ["mlxs:open"],
}


@pytest.mark.parametrize("missing", HALVES)
def test_a_retry_completes_what_a_cut_left(driver: Driver, missing: str) -> None:
    """However it came to be: what is in no index was never acknowledged."""
    send: dict[str, Any] = {"tenant": TENANT, "deadline_ms": 60_000}
    driver.enqueue("a", **send)
    whole = {*driver.redis.scan_iter()}
    for name in HALVES[missing]:
        suffix = {"mlxs:open": f":{QUEUE}", "rq:queue": f":{QUEUE}", "rq:job": ":a"}.get(name, "")
        driver.redis.delete(name + suffix)
    assert driver.enqueue("a", **send).created
    assert {*driver.redis.scan_iter()} == whole
    assert driver.indexed() == ["a"]
    assert not driver.enqueue("a", **send).created
    attempt = driver.take()
    assert driver.claimed_ids() == []  # also if the list had it twice
    assert driver.commit(attempt, attempt.row(), attempt.end()) == ["OK", "OK"]
    assert driver.listed() == driver.indexed() == driver.leased() == []


@pytest.mark.parametrize("cut", ["state", "claimed", "ended"])
def test_a_retry_begins_no_job_anew_that_had_a_life(driver: Driver, cut: str) -> None:
    attempt = driver.start("a")
    driver.commit(attempt, attempt.row())
    if cut == "state":
        driver.release(attempt)
    elif cut == "ended":
        driver.commit(attempt, attempt.end())
    driver.redis.delete(f"mlxs:open:{QUEUE}")
    before = driver.snapshot()
    assert not driver.enqueue("a").created
    assert driver.snapshot() == before


def test_what_the_list_lost_the_sweeper_brings_back(driver: Driver) -> None:
    driver.enqueue("a")
    driver.redis.delete(f"rq:queue:{QUEUE}")
    assert not driver.enqueue("a").created
    sweeper = Sweeper(driver.protocol, LANES, lease_ms=1_000, reap_seconds=60)
    outcomes = [outcome for _ in range(2) for outcome in sweeper.reconcile(QUEUE)]
    assert outcomes == [("a", "requeued")]
    assert driver.claimed_ids() == ["a"]


def test_many_jobs_of_which_some_scripts_were_cut(server: LocalRedis, driver: Driver) -> None:
    """A pipeline of scripts: the second one is cut; sent again, each job is there once."""
    forbid(driver, "rq:queue:*", more=f"~rq:queue:{QUEUE}")
    queues = {"1-2": LANES[2]}
    ids = [[f"{n}-{k}" for k in range(4)] for n in range(3)]
    scripts = [
        calls.enqueue_many([entry(job_id, queues.get(job_id, QUEUE)) for job_id in some])
        for some in ids
    ]
    with pytest.raises(redis.ResponseError):
        Protocol(half(server), Keys()).run_many(scripts)
    assert sorted(driver.listed(LANES[1])) == sorted(driver.indexed(LANES[1]))
    assert "1-2" not in driver.indexed(LANES[2])
    created = [reply.created for some in driver.protocol.run_many(scripts) for reply in some]
    # Of the script that was cut, the jobs before the error are enqueued, the others are not.
    assert created == [False] * 4 + [False, False, True, True] + [False] * 4
    assert len(driver.claimed_ids(most=20)) == 12


@pytest.mark.parametrize("pattern", ["rq:job:*", "rq:queues", "mlxs:deadlines", "mlxs:open:*"])
def test_a_requeue_that_was_cut_can_be_sent_again(
    server: LocalRedis, driver: Driver, pattern: str
) -> None:
    """The job has still ended, with all that it had."""
    old = driver.start("a")
    driver.commit(old, old.row(), old.end(JobState.FAILED))
    before = driver.record("a"), driver.events("a")
    forbid(driver, pattern, more="~mlxs:ev:* ~rq:*:*" if pattern != "rq:job:*" else "~mlxs:ev:*")
    with pytest.raises(redis.ResponseError, match="can't access"):
        Driver(half(server)).protocol.run(ended_calls.requeue("a"))
    assert (driver.record("a"), driver.events("a")) == before
    reply = driver.protocol.run(ended_calls.requeue("a"))
    assert reply is not None
    assert reply.created
    attempt = driver.take()
    assert driver.commit(attempt, attempt.row(), attempt.end()) == ["OK", "OK"]


@pytest.mark.parametrize("runs", [False, True])
def test_a_resend_of_a_user_that_may_not_look_changes_nothing(
    server: LocalRedis, driver: Driver, *, runs: bool
) -> None:
    """Its error says nothing of the job."""
    driver.enqueue("a")
    if runs:
        driver.take()
    before = driver.snapshot()
    forbid(driver, more="-hmget")
    with pytest.raises(redis.ResponseError, match="t run this command"):
        Driver(half(server)).enqueue("a")
    assert driver.snapshot() == before
    driver.cancel("a")


@pytest.mark.parametrize("command", ["hget", "hmget"])
def test_nor_does_a_worker_that_may_not_look(
    server: LocalRedis, driver: Driver, command: str
) -> None:
    attempt = driver.start("a")
    driver.enqueue("b")
    before = driver.snapshot()
    forbid(driver, more=f"-{command} ~mlxs:* ~rq:*")
    worker = Driver(half(server))
    sends: list[calls.Call[Any]] = [
        calls.renew("w1", [attempt.job.attempt], lease_ms=LEASE_MS),
        calls.cancel("b", "enough"),
        calls.reconcile(QUEUE, ["a", "b"], lease_ms=LEASE_MS),
        calls.reap(lease_ms=LEASE_MS, queues=LANES),
    ]
    for send in sends if command == "hmget" else sends[:1]:
        with suppress(redis.ResponseError):
            worker.protocol.run(send)
    with pytest.raises(redis.ResponseError):
        worker.claim()
    assert driver.snapshot().keys() == before.keys()
    assert (driver.state("a"), driver.state("b")) == ("running", "queued")
    assert driver.record("a").cancel_reason == ""
    driver.cancel("a")
    driver.cancel("b")


def test_the_reviewers_case(server: LocalRedis, driver: Driver) -> None:
    """A submit fails in the middle; an operator mends it; the same key is submitted again."""
    forbid(driver, "mlxs:open:*")
    job = {"model": "tally", "prompt": "x", "max_tokens": 2, "idempotency_key": "order-7"}
    with Client(settings=quick_settings(as_user(server.url, "half", "x"))) as client:
        with pytest.raises(MissingPermission):
            client.submit(job)
        assert list(driver.redis.scan_iter("mlxs:job:*")) == []
        forbid(driver)
        handle = client.submit(job)
    assert handle.created
    with (
        InProcessWorker(server.url, rate=200),
        Client(settings=quick_settings(server.url)) as client,
    ):
        assert client.result(handle.id, timeout=10).token_ids == [1, 2]
