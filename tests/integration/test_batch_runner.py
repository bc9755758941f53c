"""Bulk files through a real Redis and the simulated engine: whole, once, bounded, resumable."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from mlx_serving import AsyncClient, BatchNotFound, Client, InvalidBatch, QueueUnavailable
from mlx_serving.common.keys import Keys
from mlx_serving.common.local_redis import LocalRedis
from mlx_serving.common.settings import load_settings
from mlx_serving.producer.batch import runner as runner_module
from mlx_serving.producer.batch.api import Batches
from mlx_serving.producer.batch.runner import Runner
from tests.bulk_files import check_simulated, read_jsonl, simulated_line, write_lines
from tests.helpers import wait_until
from tests.worker_process import InProcessWorker

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import redis

    from mlx_serving.common.settings import Settings
    from mlx_serving.producer.batch.objects import Batch

QUEUE = "tally:bulk"


class Crash(Exception):  # noqa: N818 -- it is what happens
    """Stands in for a SIGKILL of the runner."""


@pytest.fixture
def batches(settings: Settings) -> Batches:
    return Batches(settings)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "SYNC_SECONDS", 0.1)
    monkeypatch.setattr(runner_module, "SHORTEST_PAUSE", 0.01)


@pytest.fixture(autouse=True)
def _forget(redis_client: redis.Redis) -> Iterator[None]:
    """Jobs that a test leaves queued on purpose are no leak."""
    yield
    redis_client.flushall()


def submitted(batches: Batches, tmp_path: Path, count: int, **options: Any) -> Batch:
    path = write_lines(tmp_path / "in.jsonl", map(simulated_line, range(1, count + 1)))
    return batches.submit(path, start=False, **options)


def output(batches: Batches, batch: Batch) -> list[dict[str, Any]]:
    return read_jsonl(batches.folder(batch.id).output)


def errors(batches: Batches, batch: Batch) -> list[dict[str, Any]]:
    return read_jsonl(batches.folder(batch.id).errors)


def job_keys(client: redis.Redis) -> list[bytes]:
    patterns = ("mlxs:job:*", "mlxs:ev:*", "rq:job:*", "rq:results:*")
    return [key for pattern in patterns for key in client.scan_iter(pattern)]


@contextmanager
def running(batches: Batches, batch: Batch) -> Iterator[list[Batch]]:
    """Run a batch in a thread; the list holds the batch once it has ended."""
    ended: list[Batch] = []
    thread = threading.Thread(target=lambda: ended.append(batches.run(batch.id)))
    thread.start()
    try:
        yield ended
    finally:
        thread.join(30)
    assert ended


def run_and_crash(batches: Batches, batch: Batch, turn: int, *, before: bool = False) -> None:
    """Run a batch until the runner dies in its nth turn, before or after what the turn does."""
    turns = iter(range(1, 1 << 30))
    real = Runner._turn

    def dying(self: Runner, results: Any) -> int:
        last = next(turns) == turn
        if last and before:
            raise Crash
        moved = real(self, results)
        if last:
            raise Crash
        return moved

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runner, "_turn", dying)
        with pytest.raises(Crash):
            batches.run(batch.id)


class TestRun:
    def test_every_line_is_answered_once_and_redis_is_left_empty(
        self, batches: Batches, redis_client: redis.Redis, local_redis: LocalRedis, tmp_path: Path
    ) -> None:
        batch = submitted(batches, tmp_path, 700, in_flight=300, depth=100)
        with InProcessWorker(local_redis.url, rate=1000):
            batch = batches.run(batch.id)
        assert (batch.status, batch.request_counts.completed) == ("completed", 700)
        lines = output(batches, batch)
        check_simulated(lines, range(1, 701))
        assert {line["mlx_serving"]["ignored"][0] for line in lines} == {"user"}
        assert batch.usage.output_tokens == sum(i % 7 + 1 for i in range(1, 701))
        assert job_keys(redis_client) == []
        assert redis_client.zcard(f"rq:finished:{QUEUE}") == 0
        assert batches.status(batch.id) == batch

    def test_the_window_bounds_what_is_in_redis(
        self, batches: Batches, redis_client: redis.Redis, tmp_path: Path
    ) -> None:
        batch = submitted(batches, tmp_path, 200, in_flight=70, depth=500)
        with running(batches, batch):
            wait_until(lambda: redis_client.llen(f"rq:queue:{QUEUE}") == 70)
            time.sleep(0.2)
            assert redis_client.llen(f"rq:queue:{QUEUE}") == 70
            batches.cancel(batch.id)

    def test_the_depth_bounds_what_waits(
        self, batches: Batches, redis_client: redis.Redis, tmp_path: Path
    ) -> None:
        batch = submitted(batches, tmp_path, 200, depth=40)
        with running(batches, batch):
            wait_until(lambda: redis_client.llen(f"rq:queue:{QUEUE}") == 40)
            time.sleep(0.2)
            assert redis_client.llen(f"rq:queue:{QUEUE}") == 40
            batches.cancel(batch.id)

    def test_a_line_that_is_refused_at_submit_is_an_error_line(
        self, settings: Settings, local_redis: LocalRedis, tmp_path: Path
    ) -> None:
        small = Batches(settings.model_copy(update={"max_payload_bytes": 1024}))
        lines = [simulated_line(1), simulated_line(2), simulated_line(3)]
        lines[1]["body"]["messages"][0]["content"] = "x" * 2000
        batch = small.submit(write_lines(tmp_path / "in.jsonl", lines), start=False)
        with InProcessWorker(local_redis.url, rate=1000):
            batch = small.run(batch.id)
        assert (batch.request_counts.completed, batch.request_counts.failed) == (2, 1)
        (error,) = errors(small, batch)
        assert (error["error"]["code"], error["custom_id"]) == ("payload_too_large", "r-2")

    def test_a_job_that_somebody_cancels_is_an_error_line(
        self, settings: Settings, redis_client: redis.Redis, local_redis: LocalRedis, tmp_path: Path
    ) -> None:
        batches = Batches(settings)
        batch = submitted(batches, tmp_path, 2)
        with running(batches, batch), Client(settings=settings) as client:
            (first, _) = wait_until(lambda: _two(redis_client))
            client.cancel(first)
            with InProcessWorker(local_redis.url, rate=1000):
                batches.wait(batch.id, timeout=20)
        (error,) = errors(batches, batch)
        assert error["error"]["code"] == "cancelled"
        assert error["mlx_serving"]["job"] == first

    def test_standard_input_is_copied(
        self, batches: Batches, local_redis: LocalRedis, tmp_path: Path
    ) -> None:
        path = write_lines(tmp_path / "x.jsonl", ["count", {"prompt": "more", "max_tokens": 2}])
        with path.open("rb") as file:
            batch = batches.submit(
                file, folder=tmp_path / "b", start=False, model="tally", max_tokens=3
            )
        path.unlink()
        with InProcessWorker(local_redis.url, rate=1000):
            batch = batches.run(batch.id)
        texts = {line["custom_id"]: line["response"]["body"]["choices"][0]["message"]["content"]
                 for line in output(batches, batch)}  # fmt: skip
        assert texts == {"line-1": "1 2 3", "line-2": "1 2"}


def _two(client: redis.Redis) -> list[str] | bool:
    ids = [raw.decode() for raw in client.lrange(f"rq:queue:{QUEUE}", 0, -1)]
    return ids if len(ids) == 2 else False


class TestCrash:
    @pytest.mark.parametrize("turn", [1, 3])
    @pytest.mark.parametrize("before", [True, False])
    def test_a_runner_that_died_is_followed_by_one_that_goes_on(
        self,
        batches: Batches,
        local_redis: LocalRedis,
        tmp_path: Path,
        turn: int,
        before: bool,  # noqa: FBT001 -- parametrized
    ) -> None:
        batch = submitted(batches, tmp_path, 400, in_flight=150, depth=60)
        with InProcessWorker(local_redis.url, rate=1000):
            run_and_crash(batches, batch, turn, before=before)
            batch = batches.run(batch.id)
        assert batch.status == "completed"
        check_simulated(output(batches, batch), range(1, 401))

    def test_results_that_expired_while_nobody_collected_are_made_again(
        self, batches: Batches, redis_client: redis.Redis, local_redis: LocalRedis, tmp_path: Path
    ) -> None:
        batch = submitted(batches, tmp_path, 50, result_ttl=1)
        run_and_crash(batches, batch, 1)
        assert redis_client.llen(f"rq:queue:{QUEUE}") == 50
        with InProcessWorker(local_redis.url, rate=1000):
            wait_until(lambda: job_keys(redis_client) == [], what="every result to expire")
            assert output(batches, batch) == []
            batch = batches.run(batch.id)
        check_simulated(output(batches, batch), range(1, 51))

    def test_jobs_that_redis_lost_are_made_again(
        self, batches: Batches, redis_client: redis.Redis, local_redis: LocalRedis,
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        monkeypatch.setattr(runner_module, "SWEEP_SECONDS", 0.2)
        batch = submitted(batches, tmp_path, 50)
        with running(batches, batch) as ended:
            wait_until(lambda: redis_client.llen(f"rq:queue:{QUEUE}") == 50)
            redis_client.flushall()
            with InProcessWorker(local_redis.url, rate=1000):
                wait_until(lambda: ended, timeout=20)
        assert ended[0].status == "completed"
        check_simulated(output(batches, batch), range(1, 51))

    def test_a_batch_killed_while_it_is_validated_is_validated_again(
        self, batches: Batches, local_redis: LocalRedis, tmp_path: Path
    ) -> None:
        batch = submitted(batches, tmp_path, 20)
        folder = batches.folder(batch.id)
        state = folder.read()
        state.batch.status, state.sections = "validating", []
        folder.write(state)
        folder.index.write_bytes(b"half an in")
        with InProcessWorker(local_redis.url, rate=1000):
            batch = batches.run(batch.id)
        check_simulated(output(batches, batch), range(1, 21))

    def test_a_changed_input_file_is_refused(self, batches: Batches, tmp_path: Path) -> None:
        batch = submitted(batches, tmp_path, 3)
        (tmp_path / "in.jsonl").write_text("{}\n")
        with pytest.raises(InvalidBatch, match="changed"):
            batches.run(batch.id)
        report = batches.report(batch.id)
        assert "changed" in report.problem
        assert not report.running

    def test_a_second_runner_is_refused(
        self, batches: Batches, redis_client: redis.Redis, tmp_path: Path
    ) -> None:
        batch = submitted(batches, tmp_path, 3)
        with running(batches, batch):
            wait_until(lambda: redis_client.llen(f"rq:queue:{QUEUE}") == 3)
            with pytest.raises(InvalidBatch, match="another process"):
                batches.run(batch.id)
            batches.cancel(batch.id)

    def test_a_redis_that_is_away_is_waited_for(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(runner_module, "AWAY_SECONDS", 0.1)
        with LocalRedis(appendonly="always") as server:
            batches = Batches(load_settings(redis_url=server.url))
            batch = submitted(batches, tmp_path, 300, depth=50)
            with InProcessWorker(server.url, rate=100), running(batches, batch) as ended:
                out = batches.folder(batch.id).output
                wait_until(lambda: out.exists() and out.stat().st_size, timeout=20)
                server.kill()
                time.sleep(1)
                server.start()
                wait_until(lambda: ended, timeout=60)
        assert ended[0].status == "completed"
        check_simulated(read_jsonl(out), range(1, 301))


class TestEnds:
    def test_expiry_keeps_what_finished(
        self, batches: Batches, redis_client: redis.Redis, local_redis: LocalRedis, tmp_path: Path
    ) -> None:
        batch = submitted(batches, tmp_path, 300, completion_window="3s", depth=20)
        with InProcessWorker(local_redis.url, rate=20, max_batch_rows=4):
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

    def test_what_finished_before_the_expiry_is_kept_over_a_crash(
        self, batches: Batches, redis_client: redis.Redis, local_redis: LocalRedis, tmp_path: Path
    ) -> None:
        batch = submitted(batches, tmp_path, 60, completion_window="2s", in_flight=50)
        with InProcessWorker(local_redis.url, rate=1000):
            run_and_crash(batches, batch, 1)
            wait_until(lambda: redis_client.zcard(f"rq:finished:{QUEUE}") == 50)
            time.sleep(2)
            batch = batches.run(batch.id)
        assert (batch.status, batch.request_counts.completed) == ("expired", 50)
        assert {e["error"]["code"] for e in errors(batches, batch)} == {"batch_expired"}

    def test_cancel_keeps_what_finished_and_ends_the_rest(
        self, batches: Batches, redis_client: redis.Redis, local_redis: LocalRedis, tmp_path: Path
    ) -> None:
        batch = submitted(batches, tmp_path, 300, depth=20)
        with (
            InProcessWorker(local_redis.url, rate=20, max_batch_rows=4),
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


@contextmanager
def batches_registry(batches: Batches) -> Iterator[Any]:
    from mlx_serving.producer.batch.registry import Registry

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

    def test_one_that_lies_elsewhere_is_known_but_not_read(
        self, batches: Batches, tmp_path: Path
    ) -> None:
        batch = submitted(batches, tmp_path, 1)
        folder = batches.folder(batch.id).path
        folder.rename(tmp_path / "moved")
        assert batches.status(batch.id).id == batch.id
        with pytest.raises(BatchNotFound, match="lies in"):
            batches.folder(batch.id)
        with pytest.raises(BatchNotFound):
            batches.status("batch_none")

    def test_without_redis_nothing_is_written(self, tmp_path: Path) -> None:
        batches = Batches(load_settings(redis_url="unix:///nowhere.sock"))
        with pytest.raises(QueueUnavailable):
            submitted(batches, tmp_path, 1)
        assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


class TestClients:
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

    async def test_the_async_client(self, local_redis: LocalRedis, tmp_path: Path) -> None:
        path = write_lines(tmp_path / "in.jsonl", map(simulated_line, range(1, 41)))
        with InProcessWorker(local_redis.url, rate=1000):
            async with AsyncClient(local_redis.url) as client:
                batch = await client.batches.submit(path)
                assert (await client.batches.wait(batch.id, timeout=30)).status == "completed"
                check_simulated(list(await client.batches.results(batch.id)), range(1, 41))
