"""A device that is slow is not hung (D6): what it computes ends on its first attempt."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.figures import show
from tests.support.worker_process import Hacks, WorkerProcess, check_answers, submit

if TYPE_CHECKING:
    from mlx_serving import Client
    from mlx_serving.common.redis.local import LocalRedis

STALL_SECONDS = 2.5
SLOW = Hacks(prefill_rate=120)  # a chunk of 512 takes over 4 s, one of 64 half a second


@pytest.mark.parametrize(
    ("jobs", "words"),
    [pytest.param(1, 500, id="a long prompt"), pytest.param(12, 40, id="short prompts at once")],
)
def test_prompts_on_a_slow_device_end_on_their_first_attempt(
    server: LocalRedis, client: Client, jobs: int, words: int
) -> None:
    with WorkerProcess(
        server.url, "slow", 200, SLOW, engine__stall_seconds=STALL_SECONDS, metrics__port=0
    ) as worker:
        worker.serving()
        check_answers(client, submit(client, 1, 3), 3)  # from here on no step is the first
        prompts = [" ".join([f"{n}", *["word"] * (words - 1)]) for n in range(jobs)]
        handles = [submit(client, 1, 10, prompt=prompt)[0] for prompt in prompts]
        check_answers(client, handles, 10)
        results = [client.result(handle.id) for handle in handles]
        assert {result.attempts for result in results} == {1}
        assert "engine_stalled" not in worker.whole_log()
        assert "child_died" not in worker.whole_log()
        ends = [result.timings.finished_ms or 0 for result in results]
        began = min(result.timings.enqueued_ms or 0 for result in results)
        show(f"{jobs} x {words} tokens: {(max(ends) - began) / 1000:.1f} s")
        worker.terminate()
        assert worker.exit_status() == 0


def test_a_models_first_step_may_take_longer_than_the_stall_time(
    server: LocalRedis, client: Client
) -> None:
    """As where a kernel is compiled: leases are kept, and nothing is red or dead."""
    with WorkerProcess(
        server.url, "first", 200, Hacks(slow_first_step=4.0), engine__stall_seconds=1.0
    ) as worker:
        worker.serving()
        handles = submit(client, 4, 10)
        check_answers(client, handles, 10)
        assert {client.result(handle.id).attempts for handle in handles} == {1}
        assert "engine_stalled" not in worker.whole_log()
        worker.terminate()
        assert worker.exit_status() == 0
