"""Odd keys beside real workers and clients, and in what people look at."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import structlog
from typer.testing import CliRunner

from mlx_serving.cli.doctor.redis_server import check_key_types
from mlx_serving.cli.main import app
from mlx_serving.cli.overview import look, oddities
from mlx_serving.common.errors import CorruptJob
from mlx_serving.common.protocol.keys import Keys
from mlx_serving.common.protocol.quarantine import read_quarantined
from mlx_serving.common.redis.connection import resolve
from mlx_serving.common.states import JobState
from mlx_serving.common.tenancy import Tenancy
from mlx_serving.producer.batch.objects import Batch
from mlx_serving.producer.batch.registry import Registry, Report
from tests.support.helpers import wait_until
from tests.support.odd_keys import (
    OF_JOBS,
    OF_WORKERS,
    PLANTS,
    TENANT,
    cases,
    check_quarantined_once,
    plant,
)
from tests.support.worker_process import InProcessWorker, quick_settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    import redis

    from mlx_serving import Client
    from mlx_serving.common.redis.local import LocalRedis

pytestmark = pytest.mark.may_leak(reason="RQ's sets of workers stay until somebody cleans them")

KEYS = Keys()
OF_BATCHES = {"mlxs:batch:b1": "hash", "mlxs:batches": "zset"}
JOB: dict[str, Any] = {
    "model": "tally", "prompt": "x", "max_tokens": 2, "tenant": TENANT, "deadline": 60,
    "result_ttl": 60,
}  # fmt: skip


def work(client: Client) -> None:
    """Run one job to its end, and cancel one that runs and one that waits."""
    assert client.submit(JOB).result(timeout=10).token_ids == [1, 2]
    running = client.submit(JOB | {"max_tokens": 100_000})
    next(running.stream())
    running.cancel()
    assert running.result(timeout=10).state is JobState.CANCELLED


class TestAWorkerThatStarts:
    @pytest.mark.parametrize(("key", "kind"), cases(OF_WORKERS))
    def test_it_serves_is_listed_and_says_what_it_moved(
        self,
        server: LocalRedis,
        client: Client,
        redis_client: redis.Redis,
        key: str,
        kind: str,
    ) -> None:
        plant(redis_client, key, kind)
        with (
            structlog.testing.capture_logs() as logs,
            InProcessWorker(server.url, rate=500) as worker,
        ):
            work(client)
            wait_until(lambda: [w.name for w in look(redis_client, KEYS).workers] == ["local"])
            if key != "rq:worker:local":  # RQ's own hash of an earlier run, which a start deletes
                wait_until(lambda: read_quarantined(redis_client, KEYS))
                check_quarantined_once(redis_client, key, kind)
                assert worker.child.counters.total("keys_quarantined") == 1
        moved = [each for each in logs if each["event"] == "key_quarantined"]
        assert [each["key"] for each in moved] == ([key] if key != "rq:worker:local" else [])
        assert redis_client.exists("mlxs:worker:local") == 0

    @pytest.mark.parametrize(("key", "kind"), cases(OF_WORKERS))
    def test_one_that_runs_comes_back_into_view(
        self,
        server: LocalRedis,
        client: Client,
        redis_client: redis.Redis,
        monkeypatch: pytest.MonkeyPatch,
        key: str,
        kind: str,
    ) -> None:
        """Each beat is an early one here, and looks at the lists."""
        monkeypatch.setattr("mlx_serving.worker.status.fleet.BEAT_SECONDS", 0.05)
        monkeypatch.setattr("mlx_serving.worker.rq_worker.LOOK_SECONDS", 0.0)
        with InProcessWorker(server.url, rate=500):
            wait_until(lambda: [w.name for w in look(redis_client, KEYS).workers] == ["local"])
            plant(redis_client, key, kind)
            work(client)
            wait_until(lambda: redis_client.type(key) == OF_WORKERS[key].encode() or (
                key.endswith("executions") and not redis_client.exists(key)))  # fmt: skip
            check_quarantined_once(redis_client, key, kind)
            wait_until(lambda: [w.name for w in look(redis_client, KEYS).workers] == ["local"])


class TestReaders:
    @pytest.mark.parametrize(("key", "kind"), cases(OF_JOBS | OF_WORKERS))
    def test_status_top_doctor_and_tenants_answer(
        self, server: LocalRedis, redis_client: redis.Redis, key: str, kind: str
    ) -> None:
        """Before it is moved, they show the rest; those that read the key name it."""
        redis_client.sadd("rq:queues", "rq:queue:tally:default")
        redis_client.sadd("rq:workers", "rq:worker:local")
        plant(redis_client, key, kind)
        endpoint = resolve(quick_settings(server.url))
        for command in (["status"], ["top", "--count", "1"], ["tenants", "list"]):
            done = CliRunner().invoke(app, [*command, "--redis-url", server.url])
            assert (done.exit_code, done.exception) == (0, None), command
        overview = look(redis_client, KEYS)
        if key in {"rq:queue:tally:default", "rq:queues", "rq:workers"} | {
            f"mlxs:{name}:tally:default" for name in ("open", "leases")
        }:
            assert overview.odd_keys == [key]
            check = check_key_types(redis_client, endpoint)
            assert (check.level, key in check.detail) == ("warn", True)
        with Tenancy(endpoint) as tenancy:
            tenancy.view()

    def test_a_moved_key_is_named_with_its_place(
        self, server: LocalRedis, client: Client, redis_client: redis.Redis
    ) -> None:
        plant(redis_client, "rq:queue:tally:default", "hash")
        job = client.submit(JOB)
        (moved,) = read_quarantined(redis_client, KEYS)
        found = f"key rq:queue:tally:default was a hash: moved to {moved.place}"
        assert oddities(look(redis_client, KEYS)) == [found]
        shown = CliRunner().invoke(app, ["status", "--redis-url", server.url]).stdout
        assert found in " ".join(shown.split())
        as_json = CliRunner().invoke(app, ["status", "--json", "--redis-url", server.url]).stdout
        assert json.loads(as_json)["quarantined_keys"][0][0] == "rq:queue:tally:default"
        check = check_key_types(redis_client, resolve(quick_settings(server.url)))
        assert (check.level, found in check.detail) == ("warn", True)
        job.cancel()

    @pytest.mark.parametrize("kind", [kind for kind in PLANTS if kind != "hash"])
    def test_a_client_says_that_a_jobs_record_is_corrupt(
        self, server: LocalRedis, client: Client, redis_client: redis.Redis, kind: str
    ) -> None:
        """Not that Redis is away, which a caller would wait out."""
        job = client.submit(JOB)
        plant(redis_client, f"mlxs:job:{job.id}", kind)
        with pytest.raises(CorruptJob):
            client.status(job.id)
        with InProcessWorker(server.url, rate=500):
            wait_until(lambda: read_quarantined(redis_client, KEYS))
        assert client.status(job.id).error_code == "corrupt_job"


class TestReportsOnBatches:
    @pytest.mark.parametrize(("key", "kind"), cases(OF_BATCHES))
    def test_a_runner_writes_and_others_read(
        self, server: LocalRedis, redis_client: redis.Redis, key: str, kind: str
    ) -> None:
        batch = Batch(id="b1", input_file_id="in.jsonl", created_at=1)
        plant(redis_client, key, kind)
        with Registry(quick_settings(server.url)) as registry:
            assert not registry.tell(Report(batch=batch, folder="x"))
            check_quarantined_once(redis_client, key, kind)
            assert [report.batch.id for report in registry.reports()] == ["b1"]
            plant(redis_client, key, kind)
            registry.reports()
            registry.tell(Report(batch=batch, folder="x"))
            assert registry.find("b1").batch.id == "b1"


# Last, since its worker lives on: it would move what the readers above are to see.


@pytest.fixture(scope="module")
def serving(local_redis: LocalRedis) -> Iterator[InProcessWorker]:
    with InProcessWorker(local_redis.url, "serving", rate=500) as worker:
        yield worker


@pytest.mark.parametrize(("key", "kind"), cases(OF_JOBS))
def test_a_worker_serves_on_and_the_key_is_quarantined_once(
    client: Client, redis_client: redis.Redis, serving: InProcessWorker, key: str, kind: str
) -> None:
    """One worker serves through all cases, so nothing that is planted ends it either."""
    before = serving.child.counters.total("redis_errors")
    plant(redis_client, key, kind)
    work(client)
    wait_until(lambda: read_quarantined(redis_client, KEYS))
    check_quarantined_once(redis_client, key, kind)
    assert serving.child.counters.total("redis_errors") == before
