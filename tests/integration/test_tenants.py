"""Tenants for their users: refusals, bulk files that wait, operators' limits, the audit."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from mlx_serving import AsyncClient, Client, TenantLimited, TenantRowsExceeded
from mlx_serving.cli.main import app
from mlx_serving.common.errors import InvalidSettings
from mlx_serving.common.redis.connection import resolve
from mlx_serving.common.states import TERMINAL, JobState
from mlx_serving.common.tenancy import Tenancy
from mlx_serving.producer.batch.feeder import Feeder
from mlx_serving.worker.delivery.sweeper import Sweeper
from tests.support.bulk_driver import errors, make_quick, output, submitted
from tests.support.bulk_files import check_simulated, simulated_line, write_lines
from tests.support.protocol_driver import LANES, Driver
from tests.support.worker_process import InProcessWorker

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import redis

    from mlx_serving.common.job.schema import GenerationJob
    from mlx_serving.common.redis.local import LocalRedis
    from mlx_serving.common.settings import Settings
    from mlx_serving.producer.handles import JobHandle

pytestmark = pytest.mark.may_leak(reason="jobs and limits stay at the end of a test")

JOB = {"model": "tally", "prompt": "x", "result_ttl": 60, "tenant": "acme"}


@pytest.fixture
def tenancy(settings: Settings, redis_client: redis.Redis) -> Iterator[Tenancy]:
    del redis_client
    with Tenancy(resolve(settings)) as tenancy:
        yield tenancy


class TestSubmit:
    def test_a_job_beyond_the_limit_is_refused_with_who_and_how_many(
        self, tenancy: Tenancy, settings: Settings
    ) -> None:
        tenancy.limit("acme", {"queued": 1})
        with Client(settings=settings) as client:
            client.submit(JOB)
            with pytest.raises(TenantLimited, match="'acme' has 1 jobs queued and may have 1") as e:
                client.submit(JOB)
        error = e.value
        assert (error.code, error.retryable) == ("tenant_limited", True)
        assert (error.tenant, error.limit, error.queued, error.job_ids) == ("acme", 1, 1, (None,))

    def test_of_many_jobs_those_that_there_is_room_for_are_enqueued(
        self, tenancy: Tenancy, settings: Settings, redis_client: redis.Redis
    ) -> None:
        tenancy.limit(None, {"queued": 2})
        jobs = [JOB, JOB, {**JOB, "tenant": "other"}, JOB, {**JOB, "tenant": None}]
        with (
            Client(settings=settings) as client,
            pytest.raises(TenantLimited, match="1 of 5 jobs were not enqueued") as refused,
        ):
            client.submit_many(jobs)
        ids = refused.value.job_ids
        assert [i is None for i in ids] == [False, False, False, True, False]
        listed = redis_client.lrange("rq:queue:tally:default", 0, -1)
        assert listed == [i.encode() for i in ids if i is not None]

    def test_a_job_with_more_rows_than_its_tenant_may_run_is_refused_by_both_numbers(
        self, tenancy: Tenancy, settings: Settings, redis_client: redis.Redis
    ) -> None:
        tenancy.limit("acme", {"running": 4})
        with Client(settings=settings) as client:
            with pytest.raises(TenantRowsExceeded) as refused:
                client.submit(JOB | {"n": 5})
            error = refused.value
            assert str(error) == "n: the job has 5 rows, and tenant 'acme' may run 4"
            assert (error.code, error.retryable) == ("tenant_rows_exceeded", False)
            assert redis_client.dbsize() == 1  # the limits
            with pytest.raises(TenantRowsExceeded, match=r"jobs\[1\].n: the job has 5") as refused:
                client.submit_many([JOB | {"n": 4}, JOB | {"n": 5}, JOB])
            assert [i is None for i in refused.value.job_ids] == [False, True, False]

    def test_what_can_never_be_enqueued_is_told_before_what_may_be_later(
        self, tenancy: Tenancy, settings: Settings
    ) -> None:
        tenancy.limit("acme", {"queued": 0, "running": 4})
        with (
            Client(settings=settings) as client,
            pytest.raises(TenantRowsExceeded) as refused,
        ):
            client.submit_many([JOB, JOB | {"n": 5}])
        paths = [error.path for error in refused.value.errors]
        assert paths == ["jobs[0].tenant", "jobs[1].n"]

    async def test_the_async_client_refuses_alike(
        self, tenancy: Tenancy, settings: Settings
    ) -> None:
        tenancy.limit("acme", {"queued": 1})
        async with AsyncClient(settings=settings) as client:
            with pytest.raises(TenantLimited) as refused:
                await client.submit_many([JOB, JOB])
            assert [i is None for i in refused.value.job_ids] == [False, True]
            with pytest.raises(TenantLimited):
                await client.submit(JOB)

    def test_the_command_line_says_so_in_a_line(
        self, tenancy: Tenancy, local_redis: LocalRedis
    ) -> None:
        tenancy.limit("acme", {"queued": 0})
        words = ["generate", "x", "--tenant", "acme", "--redis-url", local_redis.url]
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 1
        assert done.stderr == (
            "error: tenant_limited: tenant 'acme' has 0 jobs queued and may have 0\n"
        )


def test_a_bulk_file_waits_at_the_limit_and_fails_no_line(
    tenancy: Tenancy,
    settings: Settings,
    local_redis: LocalRedis,
    redis_client: redis.Redis,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_quick(monkeypatch)
    tenancy.limit("acme", {"queued": 20, "running": 8})
    batches = Client(settings=settings).batches
    batch = submitted(batches, tmp_path, 200, tenant="acme")
    seen: list[int] = []
    sent = 0  # lines of the look that goes on
    looks: list[tuple[int, int]] = []  # lines that a look sent, and those that it placed
    feed, submit_many = Feeder.feed, Client.submit_many

    def feeding(feeder: Feeder, seconds_left: float) -> int:
        nonlocal sent
        sent = 0
        fed = feed(feeder, seconds_left)
        seen.append(int(redis_client.scard("mlxs:tenant:acme:queued")))
        looks.append((sent, fed))
        return fed

    def submitting(client: Client, jobs: Sequence[GenerationJob]) -> list[JobHandle]:
        nonlocal sent
        sent += len(jobs)
        return submit_many(client, jobs)

    monkeypatch.setattr(Feeder, "feed", feeding)
    monkeypatch.setattr(Client, "submit_many", submitting)
    with InProcessWorker(local_redis.url, rate=1000):
        batch = batches.run(batch.id)
    assert (batch.status, batch.request_counts.failed) == ("completed", 0)
    check_simulated(output(batches, batch), range(1, 201))
    assert 0 < max(seen) <= 20
    # Lines that are refused travel for nothing: they are as few as what was placed shows.
    for (_, placed_before), (lines, placed) in pairwise(look for look in looks if look[0]):
        assert lines - placed <= placed + max(1, 2 * placed_before), looks
    assert not redis_client.exists("mlxs:tenants")


def test_a_tenants_rows_never_exceed_its_limit_and_all_its_jobs_end(
    tenancy: Tenancy, settings: Settings, local_redis: LocalRedis, redis_client: redis.Redis
) -> None:
    """Two workers, jobs of one and of many choices; their engines are asked what they run."""
    tenancy.limit("acme", {"running": 8})
    jobs = [JOB | {"n": n, "max_tokens": 20, "temperature": 1.0} for n in (1, 8, 3, 1, 5, 1, 8, 2)]
    most = 0
    with (
        Client(settings=settings) as client,
        InProcessWorker(local_redis.url, "one", rate=100) as one,
        InProcessWorker(local_redis.url, "two", rate=100) as two,
    ):
        handles = client.submit_many(jobs)
        while any(handle.status().state not in TERMINAL for handle in handles):
            engines = [worker.child.runner.engine for worker in (one, two)]
            most = max(most, sum(sum(e.lane_rows.active) for e in engines if e))
        results = [handle.result(timeout=30) for handle in handles]
    assert [len(result.choices) for result in results] == [job["n"] for job in jobs]
    assert {result.state for result in results} == {JobState.FINISHED}
    assert 0 < most <= 8
    assert not redis_client.exists("mlxs:tenants")


def test_a_bulk_line_with_more_rows_than_its_tenant_may_run_is_an_error_line(
    tenancy: Tenancy,
    settings: Settings,
    local_redis: LocalRedis,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_quick(monkeypatch)
    tenancy.limit("acme", {"running": 4, "queued": 3})
    lines = [simulated_line(index) for index in range(1, 21)]
    lines[4]["body"]["n"] = 5
    batches = Client(settings=settings).batches
    path = write_lines(tmp_path / "in.jsonl", lines)
    batch = batches.submit(path, start=False, tenant="acme")
    with InProcessWorker(local_redis.url, rate=1000):
        batch = batches.run(batch.id)
    check_simulated(output(batches, batch), [i for i in range(1, 21) if i != 5])
    (line,) = errors(batches, batch)
    assert (line["custom_id"], line["error"]["code"]) == ("r-5", "tenant_rows_exceeded")


class TestOperator:
    def test_limits_of_one_of_all_and_back(self, tenancy: Tenancy, settings: Settings) -> None:
        tenancy.limit(None, {"queued": 100, "running": 8})
        tenancy.limit("acme", {"queued": 5, "running": "none"})
        with Client(settings=settings) as client:
            client.submit(JOB)
            client.submit({**JOB, "tenant": "other"})
        view = tenancy.view()
        assert (view.queued, view.running) == (100, 8)
        assert [(t.tenant, t.queued, t.queued_limit, t.running_limit) for t in view.tenants] == [
            ("acme", 1, 5, None), ("other", 1, 100, 8),
        ]  # fmt: skip
        tenancy.limit("acme", {"queued": "default", "running": "default"})
        tenancy.limit(None, {"running": "none"})
        acme = tenancy.view().tenants[0]
        assert (acme.queued_limit, acme.running_limit) == (100, None)

    @pytest.mark.parametrize(
        ("tenant", "limits", "named"),
        [("a b", {"queued": 1}, "tenant"), ("a", {"queued": -1}, "queued"), ("a", {}, "queued"),
         ("a", {"running": "many"}, "running"), (None, {"queued": "default"}, "queued"),
         ("a", {"rows": 1}, "rows")],
    )  # fmt: skip
    def test_what_is_wrong_is_named(
        self, tenancy: Tenancy, tenant: str | None, limits: dict[str, int | str], named: str
    ) -> None:
        with pytest.raises(InvalidSettings, match=named):
            tenancy.limit(tenant, limits)

    @pytest.mark.usefixtures("redis_client")
    def test_the_command_line(self, local_redis: LocalRedis) -> None:
        def run(*words: str) -> str:
            done = CliRunner().invoke(app, ["tenants", *words, "--redis-url", local_redis.url])
            assert done.exit_code == 0, done.output
            return done.stdout

        run("set", "acme", "--queued", "5")
        run("set", "--all", "--running", "3")
        listed = json.loads(run("list", "--json"))
        assert listed == {
            "queued": None, "running": 3,
            "tenants": [{"tenant": "acme", "queued": 0, "running": 0, "queued_limit": 5,
                         "running_limit": 3}],
        }  # fmt: skip
        assert "acme" in run("list")
        wrong = CliRunner().invoke(app, ["tenants", "set", "acme", "--queued", "lots"])
        assert (wrong.exit_code, "queued: must be from 0" in wrong.stderr) == (1, True)
        assert CliRunner().invoke(app, ["tenants", "set", "--queued", "1"]).exit_code == 2


def test_workers_put_right_what_a_hand_did_to_a_tenants_sets(redis_client: redis.Redis) -> None:
    driver = Driver(redis_client)
    driver.enqueue("a", tenant="acme")
    queued, running = driver.keys.tenant_queued("acme"), driver.keys.tenant_running("acme")
    redis_client.sadd(queued, *(f"ghost{n}" for n in range(600)))
    redis_client.set(running, "odd")
    redis_client.sadd(driver.keys.tenants(), "gone")
    sweeper = Sweeper(driver.protocol, LANES, lease_ms=1_000, reap_seconds=60)
    for _ in range(10):  # each sweep that reconciles looks at one page
        sweeper._audit.look()
    assert redis_client.smembers(queued) == {b"a"}
    assert not redis_client.exists(running)
    assert redis_client.smembers(driver.keys.tenants()) == {b"acme"}
