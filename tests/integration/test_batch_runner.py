"""Bulk files through a real Redis and the simulated engine: whole, once, bounded, resumable."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest

from mlx_serving import Client, InvalidBatch
from mlx_serving.common.redis.local import LocalRedis
from mlx_serving.common.settings import load_settings
from mlx_serving.producer.batch import runner as runner_module
from mlx_serving.producer.batch.objects import LineError
from mlx_serving.producer.batch.results import Results
from mlx_serving.producer.batch.store import JobStore
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
    from collections.abc import Sequence
    from pathlib import Path

    import redis

    from mlx_serving.common.settings import Settings
    from mlx_serving.producer.batch.api import Batches


pytestmark = pytest.mark.usefixtures("quick_batches")


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

    def test_a_line_whose_job_in_redis_has_another_payload_is_an_error_line(
        self, batches: Batches, settings: Settings, local_redis: LocalRedis, tmp_path: Path
    ) -> None:
        """As if its runner had died and the file been changed in its place."""
        batch = submitted(batches, tmp_path, 30)
        job = {"model": "tally", "prompt": "the old line", "lane": "bulk", "result_ttl": 60}
        with Client(settings=settings) as client:
            client.submit(job | {"idempotency_key": f"{batch.id}:7"})
        with InProcessWorker(local_redis.url, rate=1000):
            batch = batches.run(batch.id)
        assert batch.request_counts.failed == 1
        check_simulated(output(batches, batch), [i for i in range(1, 31) if i != 7])
        (line,) = errors(batches, batch)
        assert line["custom_id"] == "r-7"
        assert line["error"]["code"] == "idempotency_key_reused"
        with local_redis.client() as client:
            client.flushall()

    def test_a_job_goes_only_when_its_line_is_on_disk(
        self, batches: Batches, local_redis: LocalRedis, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        batch = submitted(batches, tmp_path, 100)
        path, forget = batches.folder(batch.id).output, JobStore.forget
        forgotten: list[str] = []

        def forgetting(store: JobStore, job_ids: Sequence[str]) -> None:
            written = path.read_text()
            assert [job_id for job_id in job_ids if job_id not in written] == []
            forgotten.extend(job_ids)
            forget(store, job_ids)

        monkeypatch.setattr(JobStore, "forget", forgetting)
        with InProcessWorker(local_redis.url, rate=1000):
            batches.run(batch.id)
        assert len(set(forgotten)) == 100

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
        small = Client(settings=settings.replace(jobs__max_bytes=1024)).batches
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
        batches = Client(settings=settings).batches
        batch = submitted(batches, tmp_path, 2)
        with running(batches, batch), Client(settings=settings) as client:
            first = wait_until(lambda: _first_of_two(redis_client))
            client.cancel(first)
            with InProcessWorker(local_redis.url, rate=1000):
                batches.wait(batch.id, timeout=20)
        (error,) = errors(batches, batch)
        assert error["error"]["code"] == "cancelled"
        assert error["mlx_serving"]["job"] == first

    def test_keys_that_somebody_mangled_stop_nobody(
        self, batches: Batches, redis_client: redis.Redis, local_redis: LocalRedis, tmp_path: Path
    ) -> None:
        batch = submitted(batches, tmp_path, 6, order="file")
        with running(batches, batch):
            wait_until(lambda: redis_client.llen(f"rq:queue:{QUEUE}") == 6)
            ids: list[Any] = redis_client.lrange(f"rq:queue:{QUEUE}", 0, -1)
            first, second, third = (raw.decode() for raw in ids[:3])
            redis_client.set(f"mlxs:job:{first}", "rubbish", ex=60)
            redis_client.hset(f"mlxs:job:{second}", "seq", "rubbish")
            redis_client.set(f"mlxs:ev:{third}", "rubbish", ex=60)
            with InProcessWorker(local_redis.url, rate=1000):
                batches.wait(batch.id, timeout=20)
        codes = {line["custom_id"]: line["error"]["code"] for line in errors(batches, batch)}
        assert (codes["r-1"], codes["r-2"]) == ("corrupt_job", "corrupt_job")
        ended = [line["custom_id"] for line in output(batches, batch)]
        assert {"r-4", "r-5", "r-6"} <= set(ended)
        assert sorted([*ended, *codes]) == [f"r-{i}" for i in range(1, 7)]

    def test_a_new_runner_submits_only_what_has_not_ended(
        self, batches: Batches, redis_client: redis.Redis, tmp_path: Path
    ) -> None:
        batch = submitted(batches, tmp_path, 30)
        results = Results(batches.folder(batch.id), batch.id)
        for line in range(5, 15):
            results.failed_line(line, f"r-{line}", LineError(code="c", message="m", line=line))
        results.close()
        with running(batches, batch):
            wait_until(lambda: redis_client.llen(f"rq:queue:{QUEUE}") == 20)
            batches.cancel(batch.id)

    def test_each_model_is_fed_on_its_own_redis(
        self, settings: Settings, redis_client: redis.Redis, tmp_path: Path
    ) -> None:
        lines = [simulated_line(index) for index in range(1, 13)]
        for line in lines[:5]:
            line["body"]["model"] = "large"
        path = write_lines(tmp_path / "in.jsonl", lines)
        with LocalRedis() as other, other.client() as client:
            split = settings.replace(redis__by_model={"large": other.url})
            batches = Client(settings=split).batches
            batch = batches.submit(path, start=False)
            with running(batches, batch):
                wait_until(lambda: client.llen("rq:queue:large:bulk") == 5)
                wait_until(lambda: redis_client.llen(f"rq:queue:{QUEUE}") == 7)
                batches.cancel(batch.id)
            assert job_keys(client) == job_keys(redis_client) == []

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


def _first_of_two(client: redis.Redis) -> str:
    ids: list[Any] = client.lrange(f"rq:queue:{QUEUE}", 0, -1)
    return ids[0].decode() if len(ids) == 2 else ""


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
            batches = Client(settings=load_settings(redis__url=server.url)).batches
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
