"""How bulk files end, how they are found, and the clients' calls, through a real Redis."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from mlx_serving import AsyncClient, BatchNotFound, Client, QueueUnavailable
from mlx_serving.common.errors import MissingPermission, WrongCredentials
from mlx_serving.common.protocol.keys import Keys
from mlx_serving.common.redis.local import LocalRedis
from mlx_serving.common.settings import load_settings
from mlx_serving.producer.batch import runner as runner_module
from mlx_serving.producer.batch.registry import Registry
from mlx_serving.producer.batch.runner import BulkRunner
from tests.support.bulk_driver import (
    QUEUE,
    errors,
    job_keys,
    output,
    run_and_crash,
    running,
    submitted,
)
from tests.support.bulk_files import check_simulated, read_jsonl, simulated_line, write_lines
from tests.support.helpers import wait_until
from tests.support.worker_process import InProcessWorker

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import redis

    from mlx_serving.common.settings import Settings
    from mlx_serving.producer.batch.api import Batches
    from mlx_serving.producer.batch.folder import BatchFolder


pytestmark = pytest.mark.usefixtures("quick_batches")


def expire(folder: BatchFolder) -> None:
    """Let the completion window of a batch that nobody runs be over."""
    state = folder.read()
    state.batch.expires_at = int(time.time())
    folder.write(state)


class TestEnds:
    def test_expiry_keeps_what_finished(
        self, batches: Batches, redis_client: redis.Redis, local_redis: LocalRedis, tmp_path: Path
    ) -> None:
        with InProcessWorker(local_redis.url, rate=20, batch__max_rows=4) as worker:
            wait_until(lambda: redis_client.exists(Keys().worker(worker.name)), timeout=30)
            batch = submitted(batches, tmp_path, 300, completion_window="4s", depth=20)
            batch = batches.run(batch.id)
        assert batch.status == "expired"
        done, late = output(batches, batch), errors(batches, batch)
        assert done
        check_simulated(done, [int(line["custom_id"][2:]) for line in done])
        assert {line["error"]["code"] for line in late} == {"batch_expired"}
        ids = sorted(int(line["custom_id"][2:]) for line in [*done, *late])
        assert ids == list(range(1, 301))
        assert batch.request_counts.open == 0
        assert job_keys(redis_client) == []

    @pytest.mark.parametrize("clock", ["the runner's", "Redis's"])
    def test_a_clock_that_is_wrong_for_a_moment_ends_nothing(
        self,
        clock: str,
        batches: Batches,
        redis_client: redis.Redis,
        local_redis: LocalRedis,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        began, reads = time.monotonic(), 0
        right = time.time

        def wrong_s() -> int:
            nonlocal reads
            is_wrong = 0.5 < time.monotonic() - began < 0.9
            reads += is_wrong
            return 26 * 3600 * is_wrong

        if clock == "Redis's":
            real = Registry._now_ms
            monkeypatch.setattr(Registry, "_now_ms", lambda self: real(self) + 1000 * wrong_s())
        else:
            monkeypatch.setattr(time, "time", lambda: right() + wrong_s())
        with InProcessWorker(local_redis.url, rate=50, batch__max_rows=8) as worker:
            wait_until(lambda: redis_client.exists(Keys().worker(worker.name)), timeout=30)
            batch = submitted(batches, tmp_path, 100)
            began = time.monotonic()
            batch = batches.run(batch.id)
        assert reads or clock == "the runner's", "Redis's time was read while it was wrong"
        assert (batch.status, batch.request_counts.completed) == ("completed", 100)

    def test_what_finished_before_the_expiry_is_kept_over_a_crash(
        self, batches: Batches, redis_client: redis.Redis, local_redis: LocalRedis, tmp_path: Path
    ) -> None:
        batch = submitted(batches, tmp_path, 60, in_flight=50)
        with InProcessWorker(local_redis.url, rate=1000):
            run_and_crash(batches, batch, 1)
            wait_until(lambda: redis_client.zcard(f"rq:finished:{QUEUE}") == 50)
            expire(batches.folder(batch.id))
            batch = batches.run(batch.id)
        assert (batch.status, batch.request_counts.completed) == ("expired", 50)
        assert {e["error"]["code"] for e in errors(batches, batch)} == {"batch_expired"}

    def test_what_finished_before_the_expiry_is_kept_while_redis_is_away(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(runner_module, "AWAY_SECONDS", 0.1)
        with LocalRedis(appendonly="always") as server, server.client() as client:
            settings = load_settings(redis__url=server.url)
            batches = Client(settings=settings).batches
            batch = submitted(batches, tmp_path, 30, in_flight=20)
            folder = batches.folder(batch.id)
            with InProcessWorker(server.url, rate=1000):
                run_and_crash(batches, batch, 1)
                wait_until(lambda: client.zcard(f"rq:finished:{QUEUE}") == 20)
            server.kill()
            expire(folder)
            ended: list[Any] = []
            runner = BulkRunner(folder, settings, partial(Client, settings=settings))
            thread = threading.Thread(target=lambda: ended.append(runner.run()))
            thread.start()
            time.sleep(1)
            assert not ended
            server.start()
            thread.join(20)
        assert (ended[0].status, ended[0].request_counts.completed) == ("expired", 20)

    def test_the_end_is_told_again_where_redis_missed_it(
        self, batches: Batches, redis_client: redis.Redis, tmp_path: Path
    ) -> None:
        batch = submitted(batches, tmp_path, 3)
        folder = batches.folder(batch.id).path
        with running(batches, batch):
            batches.cancel(batch.id)
        redis_client.flushall()
        assert batches.resume(str(folder)).status == "cancelled"
        assert batches.status(batch.id).status == "cancelled"

    def test_cancel_keeps_what_finished_and_ends_the_rest(
        self, batches: Batches, redis_client: redis.Redis, local_redis: LocalRedis, tmp_path: Path
    ) -> None:
        batch = submitted(batches, tmp_path, 300, depth=20)
        with (
            InProcessWorker(local_redis.url, rate=20, batch__max_rows=4),
            running(batches, batch) as ended,
        ):
            wait_until(lambda: batches.status(batch.id).request_counts.completed > 3)
            batches.cancel(batch.id)
            wait_until(lambda: ended, timeout=20)
        batch = ended[0]
        assert batch.status == "cancelled"
        assert batch.cancelling_at is not None
        done, rest = output(batches, batch), errors(batches, batch)
        check_simulated(done, [int(line["custom_id"][2:]) for line in done])
        assert {line["error"]["code"] for line in rest} == {"batch_cancelled"}
        assert len(done) + len(rest) == 300
        assert redis_client.llen(f"rq:queue:{QUEUE}") == 0
        assert job_keys(redis_client) == []

    def test_cancel_of_a_batch_without_a_runner_winds_it_up(
        self, batches: Batches, tmp_path: Path
    ) -> None:
        batch = submitted(batches, tmp_path, 10)
        folder = batches.folder(batch.id)
        report = batches.report(batch.id)
        assert not report.batch.ended
        with batches_registry(batches) as client:
            client.hset(Keys().batch(batch.id), "cancel", "1")
        assert batches.run(batch.id).status == "cancelled"
        assert len(read_jsonl(folder.errors)) == 10


DENIED = ("-evalsha", "-zrange", "-llen", "-hmget", "-xrange")  # what the registry does without


class TestRefused:
    """A Redis that refuses what it did before: somebody changes its users."""

    @pytest.fixture
    def server(self) -> Iterator[LocalRedis]:
        with LocalRedis() as server:
            yield server

    @staticmethod
    def setting(settings: Settings, server: LocalRedis) -> Batches:
        return Client(settings=settings.replace(redis__url=server.url)).batches

    @pytest.mark.parametrize("denied", ["-time", "-@read"])
    def test_the_runner_waits_until_it_may_again(
        self, settings: Settings, server: LocalRedis, tmp_path: Path, denied: str
    ) -> None:
        batches = self.setting(settings, server)
        batch = submitted(batches, tmp_path, 5)
        with server.client() as admin, running(batches, batch):
            wait_until(lambda: admin.llen(f"rq:queue:{QUEUE}") == 5)
            admin.execute_command("ACL", "SETUSER", "default", denied)
            wait_until(admin.acl_log, timeout=20)
            admin.execute_command("ACL", "SETUSER", "default", "+@all")
            batches.cancel(batch.id)

    def test_the_runner_says_why_it_ends(
        self, settings: Settings, server: LocalRedis, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        monkeypatch.setattr(runner_module, "REFUSED_SECONDS", 0.5)
        batches = self.setting(settings, server)
        batch = submitted(batches, tmp_path, 5)
        with server.client() as admin:
            admin.execute_command("ACL", "SETUSER", "default", *DENIED)
        with pytest.raises(MissingPermission):
            batches.run(batch.id)
        report = batches.report(batch.id)
        assert "Redis denies this to our user" in report.problem
        assert not report.running


@contextmanager
def batches_registry(batches: Batches) -> Iterator[Any]:
    with Registry(batches._settings) as registry:
        yield registry._redis


class TestNames:
    def test_a_batch_is_found_by_id_folder_file_or_as_the_last_one(
        self, batches: Batches, tmp_path: Path
    ) -> None:
        first = submitted(batches, tmp_path, 1)
        second = submitted(batches, tmp_path, 2)
        file, folder = tmp_path / "in.jsonl", tmp_path / f"in.jsonl.{second.id}"
        for name in (second.id, str(folder), str(file), None):
            assert batches.folder(name).path == folder
            assert batches.status(name).id == second.id
        assert batches.folder(first.id).read().batch.id == first.id
        assert [r.batch.id for r in batches.reports()] == [second.id, first.id]

    def test_the_last_one_is_the_one_submitted_last_whoever_reports(
        self, batches: Batches, settings: Settings, tmp_path: Path
    ) -> None:
        """A `cancel` without a name must not meet an older one because its runner is at work."""
        first, second = submitted(batches, tmp_path, 1), submitted(batches, tmp_path, 2)
        with Registry(settings) as registry:
            registry.tell(registry.find(first.id))
        assert batches.status().id == second.id
        assert batches.folder().read().batch.id == second.id
        assert [r.batch.id for r in batches.reports()] == [second.id, first.id]

    def test_one_that_lies_elsewhere_is_known_but_not_read(
        self, batches: Batches, tmp_path: Path
    ) -> None:
        batch = submitted(batches, tmp_path, 1)
        folder = batches.folder(batch.id).path
        folder.rename(tmp_path / "moved")
        assert batches.status(batch.id).id == batch.id
        with pytest.raises(BatchNotFound, match=" is in "):
            batches.folder(batch.id)
        with pytest.raises(BatchNotFound):
            batches.status("batch_none")

    def test_one_that_lies_here_is_known_without_redis(
        self, batches: Batches, tmp_path: Path
    ) -> None:
        batch = submitted(batches, tmp_path, 1)
        away = Client(settings=load_settings(redis__url="unix:///nowhere.sock")).batches
        report = away.report(str(batches.folder(batch.id).path))
        assert (report.batch, report.running) == (batch, False)
        with pytest.raises(QueueUnavailable):
            away.report(batch.id)

    def test_one_that_lies_here_is_known_with_a_wrong_password(
        self, batches: Batches, tmp_path: Path, local_redis: LocalRedis
    ) -> None:
        batch = submitted(batches, tmp_path, 1)
        url = local_redis.url.replace("unix://", "unix://nobody:wrong@")
        refused = Client(settings=load_settings(redis__url=url)).batches
        assert refused.report(str(batches.folder(batch.id).path)).batch == batch
        with pytest.raises(WrongCredentials):
            refused.report(batch.id)

    def test_without_redis_nothing_is_written(self, tmp_path: Path) -> None:
        batches = Client(settings=load_settings(redis__url="unix:///nowhere.sock")).batches
        with pytest.raises(QueueUnavailable):
            submitted(batches, tmp_path, 1)
        assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


class TestClients:
    @pytest.mark.usefixtures("redis_client")
    def test_a_client_submits_waits_and_reads(
        self, local_redis: LocalRedis, tmp_path: Path
    ) -> None:
        """Its runner is a process of its own."""
        path = write_lines(tmp_path / "in.jsonl", map(simulated_line, range(1, 41)))
        with InProcessWorker(local_redis.url, rate=1000), Client(local_redis.url) as client:
            batch = client.batches.submit(path)
            assert client.batches.wait(batch.id, timeout=30).status == "completed"
            check_simulated(list(client.batches.results(batch.id)), range(1, 41))
            assert list(client.batches.errors(batch.id)) == []
            assert client.batches.resume(batch.id).status == "completed"

    @pytest.mark.usefixtures("redis_client")
    async def test_the_async_client(self, local_redis: LocalRedis, tmp_path: Path) -> None:
        path = write_lines(tmp_path / "in.jsonl", map(simulated_line, range(1, 41)))
        with InProcessWorker(local_redis.url, rate=1000):
            async with AsyncClient(local_redis.url) as client:
                batch = await client.batches.submit(path)
                assert (await client.batches.wait(batch.id, timeout=30)).status == "completed"
                check_simulated(list(await client.batches.results(batch.id)), range(1, 41))
