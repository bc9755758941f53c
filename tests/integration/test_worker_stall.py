"""A hung engine and an orphaned child (D6): no lease is kept, no process stays."""

from __future__ import annotations

import os
import re
import signal
from typing import TYPE_CHECKING

import pytest

from mlx_serving.common.redis.local import LocalRedis
from tests.support.helpers import wait_until
from tests.support.worker_process import (
    Hacks,
    WorkerProcess,
    check_answers,
    decoded,
    submit,
    wait_until_decoded,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlx_serving import Client


JOBS = 32


@pytest.fixture
def server() -> Iterator[LocalRedis]:
    with LocalRedis(appendonly="always") as server:
        yield server


def test_a_hung_engine_ends_the_process_and_its_jobs_come_back(
    server: LocalRedis, client: Client
) -> None:
    stall = 1.5
    hacks = Hacks(block_at_step=10)
    with WorkerProcess(server.url, "hung", 50, hacks, engine__stall_seconds=stall) as hung:
        hung.serving()
        handles = submit(client, 4, 40)
        wait_until_decoded(client, handles)
        wait_until(lambda: not hung.child_lives(), timeout=stall + 2)
        assert '"event":"engine_stalled"' in hung.log()
        wait_until(lambda: re.search("child_died .*cause=stalled .*exit_code=69", hung.whole_log()))
        hung.kill()  # its parent has started another child, which would hang as well
        with WorkerProcess(server.url, "second", rate=200) as second:
            second.serving()
            check_answers(client, handles, 40)
        assert [client.status(handle.id).attempts for handle in handles] == [0] * 4


def test_what_was_decoded_before_a_stall_is_written(server: LocalRedis, client: Client) -> None:
    """No flush would be due for an hour; the stalled worker writes before it ends."""
    hacks = Hacks(block_at_step=10)
    with WorkerProcess(
        server.url, "hung", 50, hacks, engine__stall_seconds=1.5, worker__flush_interval_ms=1000
    ) as hung:
        hung.serving()
        (bulk,) = submit(client, 1, 40, lane="bulk", stream=False)
        wait_until(lambda: "engine_stalled" in hung.whole_log())
        wait_until(lambda: not hung.child_lives())
        hung.kill()
        (tokens,) = decoded(client, [bulk])
        assert tokens >= 7


def test_a_stalled_worker_waits_for_no_redis_that_is_away(
    server: LocalRedis, client: Client
) -> None:
    hacks = Hacks(block_at_step=10)
    with WorkerProcess(server.url, "hung", 50, hacks, engine__stall_seconds=2.0) as hung:
        hung.serving()
        handles = submit(client, 4, 40)
        wait_until_decoded(client, handles, 1)
        pid = server.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        try:
            wait_until(lambda: not hung.child_lives(), timeout=2.0 + 1.0)
        finally:
            os.kill(pid, signal.SIGCONT)
        assert "engine_stalled" in hung.whole_log()


@pytest.mark.chaos
def test_a_hung_engine_does_not_keep_its_leases(server: LocalRedis, client: Client) -> None:
    """The watchdog is slow here; the leases end by themselves, because nobody renews them."""
    hacks = Hacks(block_at_step=10)
    with WorkerProcess(server.url, "hung", 50, hacks, engine__stall_seconds=4) as hung:
        hung.serving()
        handles = submit(client, 4, 40)
        wait_until_decoded(client, handles)
        with WorkerProcess(server.url, "second", rate=200) as second:
            second.serving()
            check_answers(client, handles, 40)


def test_a_child_whose_parent_was_killed_hands_over_and_exits(
    server: LocalRedis, client: Client
) -> None:
    with WorkerProcess(server.url, "orphan", rate=50) as orphan:
        orphan.serving()
        handles = submit(client, 8, 100)
        wait_until_decoded(client, handles, 5)
        os.kill(orphan.process.pid, signal.SIGKILL)
        orphan.process.wait()
        wait_until(lambda: not orphan.child_lives(), timeout=8)
        assert {client.status(h.id).state.value for h in handles} == {"queued"}
        assert {client.status(h.id).attempts for h in handles} == {0}
        with WorkerProcess(server.url, "second", rate=200) as second:
            second.serving()
            check_answers(client, handles, 100)
