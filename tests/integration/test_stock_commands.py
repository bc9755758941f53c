"""What RQ does to a job in each state: the table in docs/reference/stock_commands.md."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from rq import Queue, Worker
from rq.command import send_stop_execution_command, send_stop_job_command
from rq.exceptions import InvalidJobOperation, NoSuchJobError
from rq.job import Job
from rq.registry import (
    CanceledJobRegistry,
    FailedJobRegistry,
    StartedJobRegistry,
)
from rq.serializers import JSONSerializer
from rq.suspension import resume, suspend

from mlx_serving.worker.delivery.sweeper import Sweeper
from tests.support.helpers import wait_until
from tests.support.paths import ROOT
from tests.support.protocol_driver import LANES, QUEUE, Driver, rq_fields
from tests.support.worker_process import (
    InProcessWorker,
    check_answers,
    counted,
    job_events,
    submit,
    wait_until_decoded,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlx_serving import Client
    from mlx_serving.common.redis.local import LocalRedis

DOCUMENT = ROOT / "docs" / "reference" / "stock_commands.md"
LONG = 5000
JSON = "rq.serializers.JSONSerializer"


class Stage:
    """A job in a wanted state, on a worker that goes on as long as the test."""

    def __init__(self, client: Client, driver: Driver, url: str) -> None:
        self.client, self.driver, self.url = client, driver, url
        self.redis = driver.redis
        self.queue = Queue(QUEUE, connection=self.redis, serializer=JSONSerializer)

    def job_in(self, state: str) -> str:
        if state == "queued":
            suspend(self.redis)
            wait_until(lambda: Worker.all(connection=self.redis)[0].get_state() == "suspended")
        if state == "failed":
            self.driver.enqueue("odd", rq_fields=rq_fields() | {"data": b"no payload"})
            assert self.client.result("odd", timeout=5).state.value == state
            return "odd"
        (handle,) = submit(self.client, 1, 20 if state == "finished" else LONG)
        if state == "finished":
            check_answers(self.client, [handle], 20)
        elif state != "queued":
            wait_until_decoded(self.client, [handle])
        if state == "cancelled":
            self.client.cancel(handle.id)
            self.client.result(handle.id, timeout=5)
        assert self.client.status(handle.id).state.value == state
        return handle.id

    def rq_job(self, job_id: str) -> Job:
        return Job.fetch(job_id, connection=self.redis, serializer=JSONSerializer)

    def sweep(self) -> None:
        """Reconcile as workers do; twice, because a count off once may be a job on its way."""
        sweeper = Sweeper(self.driver.protocol, LANES, lease_ms=2_000, reap_seconds=1)
        for _ in range(2):
            sweeper.reconcile(QUEUE)

    def go_on(self) -> None:
        """Let workers claim again, and show that they do."""
        resume(self.redis)
        check_answers(self.client, submit(self.client, 2, 5), 5)

    def ends_as(self, job_id: str, state: str) -> None:
        wait_until(lambda: self.client.status(job_id).state.value == state, timeout=5)
        assert [e.type for e in job_events(self.client, job_id)].count("end") == 1


@pytest.fixture
def stage(client: Client, driver: Driver, settled_redis: LocalRedis) -> Iterator[Stage]:
    with InProcessWorker(settled_redis.url, rate=100):
        wait_until(lambda: Worker.all(connection=driver.redis))
        yield Stage(client, driver, settled_redis.url)
        resume(driver.redis)


class TestCancel:
    """`job.cancel()`"""

    def test_queued_is_cancelled(self, stage: Stage) -> None:
        job_id = stage.job_in("queued")
        stage.rq_job(job_id).cancel()
        stage.sweep()
        stage.ends_as(job_id, "cancelled")
        stage.go_on()
        assert job_id in CanceledJobRegistry(queue=stage.queue)

    def test_running_stops_and_keeps_its_text(self, stage: Stage) -> None:
        job_id = stage.job_in("running")
        stage.rq_job(job_id).cancel()
        stage.ends_as(job_id, "cancelled")
        result = stage.client.result(job_id)
        assert result.text == counted(len(result.token_ids))
        assert len(result.token_ids) > 2
        assert job_id not in StartedJobRegistry(queue=stage.queue)

    @pytest.mark.parametrize("state", ["finished", "failed"])
    def test_ended_changes_the_view_only(self, stage: Stage, state: str) -> None:
        job_id = stage.job_in(state)
        stage.rq_job(job_id).cancel()
        assert stage.rq_job(job_id).get_status() == "canceled"
        assert stage.client.status(job_id).state.value == state
        assert stage.client.result(job_id).state.value == state

    def test_cancelled_is_refused_by_rq(self, stage: Stage) -> None:
        job_id = stage.job_in("cancelled")
        with pytest.raises(InvalidJobOperation):
            stage.rq_job(job_id).cancel()


class TestDelete:
    """`job.delete()`"""

    def test_queued_counts_as_cancelled(self, stage: Stage) -> None:
        job_id = stage.job_in("queued")
        stage.rq_job(job_id).delete()
        stage.sweep()
        stage.ends_as(job_id, "cancelled")
        stage.go_on()
        assert not stage.redis.exists(f"rq:job:{job_id}")

    def test_running_stops_and_its_rq_hash_stays_gone(self, stage: Stage) -> None:
        job_id = stage.job_in("running")
        stage.rq_job(job_id).delete()
        stage.ends_as(job_id, "cancelled")
        assert not stage.redis.exists(f"rq:job:{job_id}", f"rq:results:{job_id}")

    @pytest.mark.parametrize("state", ["finished", "failed", "cancelled"])
    def test_ended_leaves_our_result(self, stage: Stage, state: str) -> None:
        job_id = stage.job_in(state)
        stage.rq_job(job_id).delete()
        with pytest.raises(NoSuchJobError):
            stage.rq_job(job_id)
        assert stage.client.result(job_id).state.value == state


class TestRequeue:
    """`registry.requeue`, `job.requeue()`, `rq requeue --all`"""

    @pytest.mark.parametrize("how", ["registry", "rq requeue --all"])
    def test_failed_is_refused_and_shown_as_failed_again(self, stage: Stage, how: str) -> None:
        job_id = stage.job_in("failed")
        before = job_events(stage.client, job_id)
        if how == "registry":
            FailedJobRegistry(queue=stage.queue).requeue(job_id)
        else:
            rq(stage.url, "requeue", "--all", "--queue", QUEUE, "-S", JSON)
        wait_until(lambda: stage.rq_job(job_id).get_status() == "failed")
        assert job_id in FailedJobRegistry(queue=stage.queue)
        assert stage.driver.listed() == []
        assert job_events(stage.client, job_id) == before
        stage.go_on()

    @pytest.mark.parametrize("state", ["queued", "running", "finished", "cancelled"])
    def test_any_other_is_refused_by_rq(self, stage: Stage, state: str) -> None:
        job_id = stage.job_in(state)
        with pytest.raises(InvalidJobOperation):
            stage.rq_job(job_id).requeue()
        assert stage.client.status(job_id).state.value == state
        stage.client.cancel(job_id)


class TestEmpty:
    """`queue.empty()`, `rq empty`"""

    def test_queued_counts_as_cancelled(self, stage: Stage) -> None:
        job_id = stage.job_in("queued")
        assert stage.queue.empty() == 1
        stage.sweep()
        stage.ends_as(job_id, "cancelled")
        stage.go_on()

    @pytest.mark.parametrize("state", ["running", "finished", "failed", "cancelled"])
    def test_any_other_is_untouched(self, stage: Stage, state: str) -> None:
        job_id = stage.job_in(state)
        stage.queue.empty()
        stage.sweep()
        assert stage.client.status(job_id).state.value == state
        stage.client.cancel(job_id)


class TestDeleteQueue:
    """`queue.delete()`"""

    @pytest.mark.parametrize("delete_jobs", [True, False])
    def test_queued_comes_back_unless_its_job_was_deleted(
        self, stage: Stage, *, delete_jobs: bool
    ) -> None:
        job_id = stage.job_in("queued")
        stage.queue.delete(delete_jobs=delete_jobs)
        stage.sweep()
        if delete_jobs:
            stage.ends_as(job_id, "cancelled")
        else:
            assert stage.driver.listed() == [job_id]
            stage.client.cancel(job_id)
        stage.go_on()


class TestStop:
    """`send_stop_job_command`, `send_stop_execution_command`"""

    @pytest.mark.parametrize("command", ["stop-job", "stop-execution"])
    def test_running_stops_and_keeps_its_text(self, stage: Stage, command: str) -> None:
        job_id = stage.job_in("running")
        others = submit(stage.client, 3, 60)
        if command == "stop-job":
            send_stop_job_command(stage.redis, job_id, serializer=JSONSerializer)
        else:
            (execution,) = stage.rq_job(job_id).get_executions()
            send_stop_execution_command(stage.redis, job_id, execution.id)
        stage.ends_as(job_id, "cancelled")
        assert len(stage.client.result(job_id).token_ids) > 2
        check_answers(stage.client, others, 60)

    def test_queued_is_refused_by_rq(self, stage: Stage) -> None:
        job_id = stage.job_in("queued")
        with pytest.raises(InvalidJobOperation):
            send_stop_job_command(stage.redis, job_id, serializer=JSONSerializer)
        with pytest.raises(InvalidJobOperation):
            send_stop_execution_command(stage.redis, job_id, "1")
        assert stage.client.status(job_id).state.value == "queued"
        stage.client.cancel(job_id)

    @pytest.mark.parametrize("state", ["finished", "cancelled"])
    def test_ended_is_not_changed(self, stage: Stage, state: str) -> None:
        job_id = stage.job_in(state)
        before = job_events(stage.client, job_id)
        send_stop_job_command(stage.redis, job_id, serializer=JSONSerializer)
        stage.go_on()
        assert stage.client.status(job_id).state.value == state
        assert job_events(stage.client, job_id) == before


class TestSuspend:
    """`rq suspend`, `rq resume`"""

    def test_queued_waits_and_running_goes_on(self, stage: Stage) -> None:
        running = submit(stage.client, 2, 100)
        wait_until_decoded(stage.client, running)
        rq(stage.url, "suspend")
        check_answers(stage.client, running, 100)
        waiting = stage.job_in("queued")
        stage.client.cancel(waiting)
        rq(stage.url, "resume")
        stage.go_on()


def rq(url: str, *arguments: str) -> str:
    program = Path(sys.executable).parent / "rq"
    done = subprocess.run(
        [program, *arguments, "-u", url], capture_output=True, text=True, check=False, timeout=30
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_row_of_the_document_names_a_test_that_exists() -> None:
    named = set(re.findall(r"`(Test\w+\.test_\w+|test_\w+)`", DOCUMENT.read_text()))
    here = {name for name in globals() if name.startswith("test_")}
    here |= {
        f"{group}.{name}"
        for group, members in globals().items()
        if group.startswith("Test")
        for name in vars(members)
        if name.startswith("test_")
    }
    tools = Path(__file__).with_name("test_stock_tools.py").read_text()
    there = set(re.findall(r"^def (test_\w+)", tools, re.MULTILINE))
    assert named
    assert named <= here | there
