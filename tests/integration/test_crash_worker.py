"""Deaths of real engine children (D6, D7): who is charged, and what the parent does."""

from __future__ import annotations

import os
import re
import signal
import time
from typing import TYPE_CHECKING

import pytest

from mlx_serving.common.redis.local import LocalRedis
from mlx_serving.common.results import UnsuccessfulJob
from mlx_serving.worker.models.loading import SIMULATED_BYTES
from tests.support.figures import show
from tests.support.helpers import wait_until
from tests.support.poison import POISON, Poison
from tests.support.worker_process import (
    Hacks,
    WorkerProcess,
    check_answers,
    submit,
    wait_until_decoded,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from mlx_serving import Client
    from mlx_serving.producer.handles import JobHandle


@pytest.fixture
def server() -> Iterator[LocalRedis]:
    with LocalRedis() as server:
        yield server


def crashes(client: Client, handles: list[JobHandle]) -> list[int]:
    return [client.status(handle.id).attempts for handle in handles]


def code(client: Client, handle: JobHandle) -> str:
    result = client.result(handle.id, timeout=60)
    assert result.state.value == "dead"
    assert result.error is not None
    return result.error.code


@pytest.mark.parametrize(
    ("how", "after_tokens"),
    [
        pytest.param("abort", None, marks=pytest.mark.chaos),
        ("segfault", 6),
        pytest.param("exception", 6, marks=pytest.mark.chaos),
    ],
)
def test_the_poison_dies_and_its_mates_live(
    server: LocalRedis,
    client: Client,
    how: str,
    after_tokens: int | None,
) -> None:
    hacks = Hacks(poison=Poison(how, after_tokens))
    with WorkerProcess(server.url, "w", 200, hacks, engine__stall_seconds=1.0) as worker:
        good = submit(client, 3, 25)
        (bad,) = submit(client, 1, 25, prompt=POISON)
        assert code(client, bad) == "poison"
        check_answers(client, good, 25)
        worker.terminate()
        assert worker.exit_status() == 0


def test_a_row_without_memory_even_alone_fails_and_kills_nothing(
    server: LocalRedis, client: Client
) -> None:
    hacks = Hacks(poison=Poison("memory", after_tokens=6))
    with WorkerProcess(server.url, "w", 200, hacks) as worker:
        good = submit(client, 3, 25)
        (bad,) = submit(client, 1, 25, prompt=POISON)
        check_answers(client, good, 25)
        result = client.result(bad.id, timeout=20)
        assert result.state.value == "failed"
        assert result.error is not None
        assert result.error.code == "out_of_memory"
        assert "child_died" not in worker.whole_log()


def test_an_exception_in_a_prefill_is_the_rows_own_and_kills_nothing(
    server: LocalRedis, client: Client
) -> None:
    with WorkerProcess(server.url, "w", 200, Hacks(poison=Poison("memory"))) as worker:
        good = submit(client, 3, 25)
        (bad,) = submit(client, 1, 25, prompt=POISON)
        check_answers(client, good, 25)
        assert client.result(bad.id, timeout=20).state.value == "failed"
        assert "child_died" not in worker.whole_log()


def test_a_dead_job_raises_what_it_is(server: LocalRedis, client: Client) -> None:
    with WorkerProcess(server.url, "w", 200, Hacks(poison=Poison("abort"))):
        (bad,) = submit(client, 1, 25, prompt=POISON, max_attempts=1)
        with pytest.raises(UnsuccessfulJob, match="crashed the engine while it ran alone"):
            client.result(bad.id, timeout=20).raise_for_state()


@pytest.mark.chaos
@pytest.mark.parametrize("kills", [2, 10])
def test_kill_9_charges_nobody_and_jobs_wait_for_no_lease(
    server: LocalRedis, client: Client, kills: int
) -> None:
    tokens, lease = 400, 60.0
    with WorkerProcess(server.url, "w", 100, worker__lease_seconds=lease) as worker:
        worker.serving()
        handles = submit(client, 8, tokens, max_attempts=1)
        started = time.monotonic()
        for kill in range(kills):
            wait_until_decoded(client, handles, 5 * (kill + 1))
            os.kill(worker.child_pid, signal.SIGKILL)
            worker.next_child()
        check_answers(client, handles, tokens)
        took = time.monotonic() - started
        show(f"{kills} x kill -9: {took:.1f} s, lease {lease:.0f} s")
        assert took < lease
        assert crashes(client, handles) == [0] * 8


def test_a_hang_ends_in_exit_69_each_time_and_charges_nobody(
    server: LocalRedis, client: Client
) -> None:
    hacks = Hacks(poison=Poison("hang", 3))
    with WorkerProcess(server.url, "w", 200, hacks, engine__stall_seconds=1.0) as worker:
        worker.serving()
        (bad,) = submit(client, 1, 25, prompt=POISON, max_attempts=1)
        wait_until(lambda: worker.whole_log().count("exit_code=69") == 3, timeout=30)
        assert crashes(client, [bad]) == [0]
        assert "job_dead" not in worker.whole_log()
        assert re.findall(r"pause_seconds=(\S+)", worker.whole_log())[:3] == ["0.5", "1.0", "2.0"]
        assert client.cancel(bad.id)
        worker.terminate()


def test_a_hang_that_does_not_come_again_costs_an_attempt_and_no_job(
    server: LocalRedis, client: Client, tmp_path: Path
) -> None:
    hacks = Hacks(poison=Poison("hang", 6, once=str(tmp_path / "hung")))
    with WorkerProcess(server.url, "w", 200, hacks, engine__stall_seconds=1.0) as worker:
        worker.serving()
        good = submit(client, 3, 25)
        (bad,) = submit(client, 1, 25, prompt=POISON)
        check_answers(client, [*good, bad], 25)
        assert crashes(client, [*good, bad]) == [0] * 4
        assert client.result(bad.id).attempts == 2
        assert worker.whole_log().count("child_died") == 1


def test_a_crash_that_no_job_is_to_blame_for_kills_no_job(
    server: LocalRedis, client: Client
) -> None:
    with WorkerProcess(server.url, "w", 100, spawned=True) as worker:
        worker.serving()
        handles = submit(client, 16, 100)
        wait_until_decoded(client, handles, 5)
        os.kill(worker.child_pid, signal.SIGSEGV)
        worker.next_child()
        check_answers(client, handles, 100)
        assert crashes(client, handles) == [1] * 16


def test_a_job_that_has_the_system_kill_the_engine_for_memory_dies(
    server: LocalRedis, client: Client
) -> None:
    hacks = Hacks(poison=Poison("kill"), memory_pressure=True)
    with WorkerProcess(server.url, "w", 200, hacks) as worker:
        good = submit(client, 3, 25)
        (bad,) = submit(client, 1, 25, prompt=POISON)
        assert code(client, bad) == "poison"
        check_answers(client, good, 25)
        assert "out of memory" in worker.whole_log()


def test_sigkill_without_a_sign_of_it_charges_no_one(server: LocalRedis, client: Client) -> None:
    with WorkerProcess(server.url, "w", 200, Hacks(poison=Poison("kill")), spawned=True) as worker:
        (bad,) = submit(client, 1, 25, prompt=POISON)
        wait_until(lambda: worker.whole_log().count("cause=killed") >= 3, timeout=30)
        assert client.status(bad.id).attempts == 0
        assert client.cancel(bad.id)
        worker.terminate()


def test_a_model_that_cannot_be_loaded_ends_the_parent_with_one_clear_error(
    server: LocalRedis,
) -> None:
    with WorkerProcess(server.url, "w", hacks=Hacks(load="missing")) as worker:
        assert worker.exit_status() == 78
        assert worker.whole_log().count("no such model") == 1
        assert "Traceback" not in worker.whole_log()


@pytest.mark.quiet
def test_a_crash_while_loading_is_tried_again_ever_more_slowly(server: LocalRedis) -> None:
    with WorkerProcess(server.url, "w", hacks=Hacks(load="abort")) as worker:
        wait_until(lambda: worker.whole_log().count("child_died") >= 3, timeout=30)
        assert re.findall(r"pause_seconds=(\S+)", worker.whole_log())[:3] == ["0.5", "1.0", "2.0"]
        before = time.monotonic()
        worker.terminate()
        assert worker.exit_status(timeout=5) == 0
        show(f"SIGTERM during back-off: {time.monotonic() - before:.2f} s to exit 0")
        assert time.monotonic() - before < 1.5


def test_the_verdict_waits_for_redis(server: LocalRedis, client: Client) -> None:
    """The jobs are its own again as soon as Redis is back, whatever is left of their leases."""
    with WorkerProcess(server.url, "w", 100, worker__lease_seconds=60.0) as worker:
        worker.serving()
        handles = submit(client, 8, 60)
        wait_until_decoded(client, handles, 5)
        pid = server.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        os.kill(worker.child_pid, signal.SIGSEGV)
        wait_until(lambda: "child_died" in worker.whole_log(), timeout=10)
        time.sleep(1.5)
        os.kill(pid, signal.SIGCONT)
        check_answers(client, handles, 60)
        assert crashes(client, handles) == [1] * 8


def test_no_child_outlives_its_parent_during_a_restart(server: LocalRedis) -> None:
    with WorkerProcess(server.url, "w") as worker:
        old = worker.child_pid
        os.kill(old, signal.SIGKILL)
        new = worker.next_child()
        assert new != old
        os.kill(worker.process.pid, signal.SIGKILL)
        worker.process.wait()
        wait_until(lambda: not worker.child_lives(), timeout=10)


@pytest.mark.chaos
def test_a_model_that_kills_the_process_that_loads_it_charges_no_job_and_is_left_alone(
    server: LocalRedis, client: Client
) -> None:
    hacks = Hacks(load="abort bad")
    others = {"big": "", "bad": "bad"}
    with WorkerProcess(
        server.url, "w", 50, hacks, others, worker__model_budget_bytes=2 * SIMULATED_BYTES
    ) as worker:
        worker.serving()
        running = submit(client, 3, 60)
        wait_until_decoded(client, running, 1)
        (left,) = submit(client, 1, 5, model="bad")
        worker.next_child()
        check_answers(client, running, 60)
        check_answers(client, submit(client, 2, 5, model="big"), 5)
        assert {client.result(job.id).attempts for job in running} == {2}
        assert client.status(left.id).state.value == "queued"
        assert worker.whole_log().count("child_died") == 1
