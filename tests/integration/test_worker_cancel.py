"""Cancel, timeout, deadline of running jobs (D8), measured; and what ends with a stated reason."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING

import pytest

from mlx_serving.common.events import decode
from mlx_serving.common.protocol.fields import JobField
from mlx_serving.worker.delivery import holdings
from tests.support.helpers import wait_until
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
    from tests.support.protocol_driver import Driver

RATE = 50.0
STEP_SECONDS = 1 / RATE
FLUSH_SECONDS = 0.02


@pytest.fixture
def worker(settled_redis: LocalRedis) -> Iterator[InProcessWorker]:
    with InProcessWorker(settled_redis.url, rate=RATE) as worker:
        yield worker


@pytest.mark.usefixtures("worker")
class TestCancel:
    @pytest.mark.quiet
    def test_a_running_job_ends_within_two_steps_50_ms_and_a_flush(self, client: Client) -> None:
        handles = submit(client, 16, 5000)
        wait_until_decoded(client, handles)
        waits = []
        for handle in handles[:12]:
            cancelled_at = time.monotonic()
            client.cancel(handle.id)
            wait_until(lambda h=handle: client.status(h.id).state.value == "cancelled")  # type: ignore[misc]
            waits.append(time.monotonic() - cancelled_at)
        bound = 2 * STEP_SECONDS + 0.05 + FLUSH_SECONDS
        assert statistics.median(waits) <= bound
        assert max(waits) <= bound + 0.1  # two shared cores
        for handle in handles[12:]:
            client.cancel(handle.id)

    def test_what_was_generated_is_kept_and_others_go_on(self, client: Client) -> None:
        long, short = submit(client, 1, 5000), submit(client, 4, 60)
        wait_until_decoded(client, long, 11)
        client.cancel(long[0].id)
        result = client.result(long[0].id, timeout=5)
        assert result.state.value == "cancelled"
        assert len(result.token_ids) > 10
        assert result.text == counted(len(result.token_ids))
        deltas = [d for e in job_events(client, long[0].id) for d in e.choices]
        assert [t for d in deltas for t in d.token_ids] == result.token_ids
        check_answers(client, short, 60)

    def test_it_works_without_the_hint(self, client: Client, driver: Driver) -> None:
        """The flag is in the control hash; pub/sub only speeds it up."""
        (handle,) = submit(client, 1, 5000)
        wait_until_decoded(client, [handle])
        driver.redis.hset(f"mlxs:job:{handle.id}", JobField.CANCEL_REASON, "because")
        result = client.result(handle.id, timeout=2)
        assert result.error is not None
        assert (result.state.value, result.error.message) == ("cancelled", "because")

    def test_a_hint_alone_cancels_nothing(
        self, client: Client, driver: Driver, worker: InProcessWorker
    ) -> None:
        """Who can publish may speed a cancel up, not order one."""
        handles = submit(client, 1, 60)
        wait_until_decoded(client, handles)
        driver.redis.publish(driver.keys.control(worker.name), f"cancel {handles[0].id}")
        check_answers(client, handles, 60)

    def test_the_reason_arrives_with_the_hint(self, client: Client, driver: Driver) -> None:
        (handle,) = submit(client, 1, 5000)
        wait_until_decoded(client, [handle])
        driver.cancel(handle.id, "deadline_exceeded")
        result = client.result(handle.id, timeout=2)
        assert result.error is not None
        assert (result.state.value, result.error.code) == ("expired", "deadline_exceeded")


@pytest.mark.usefixtures("worker")
class TestTime:
    @pytest.mark.parametrize(
        ("field", "code"), [("timeout", "timeout"), ("deadline", "deadline_exceeded")]
    )
    def test_a_job_over_its_time_expires_with_its_text(
        self, client: Client, field: str, code: str
    ) -> None:
        (handle,) = submit(client, 1, 5000, **{field: 0.6})
        result = client.result(handle.id, timeout=5)
        assert result.error is not None
        assert (result.state.value, result.error.code) == ("expired", code)
        assert 10 < len(result.token_ids) < 50
        assert result.text == counted(len(result.token_ids))

    def test_a_job_nobody_listens_to_is_given_up(self, client: Client) -> None:
        (handle,) = submit(client, 1, 5000, abandon_after=0.3)
        wait_until(lambda: client.status(handle.id).state.value == "expired", timeout=5)
        result = client.result(handle.id)
        assert result.error is not None
        assert result.error.code == "abandoned"

    def test_a_job_somebody_listens_to_is_not(self, client: Client) -> None:
        (handle,) = submit(client, 1, 60, abandon_after=0.3)
        assert "".join(client.stream(handle.id, text=True)) == counted(60)


def test_a_deadline_passes_while_no_worker_has_room(
    client: Client, settled_redis: LocalRedis
) -> None:
    with InProcessWorker(settled_redis.url, rate=RATE, batch__max_rows=1):
        (running,) = submit(client, 1, 120)
        (waiting,) = submit(client, 1, 10, deadline=0.5)
        result = client.result(waiting.id, timeout=5)
        assert result.error is not None
        assert (result.state.value, result.error.code) == ("expired", "deadline_exceeded")
        assert result.token_ids == []
        check_answers(client, [running], 120)


def test_jobs_that_do_not_stream_publish_no_tokens_and_commit_by_the_batch(
    client: Client, driver: Driver, settled_redis: LocalRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D11: every 16 tokens, or 500 ms, which a slow machine must not be mistaken for here."""
    monkeypatch.setattr(holdings, "BULK_SECONDS", 60.0)
    with (
        InProcessWorker(settled_redis.url, rate=200),
        driver.redis.pubsub(ignore_subscribe_messages=True) as pubsub,
    ):
        pubsub.psubscribe("mlxs:ch:*")
        pubsub.get_message(timeout=1)
        handles = submit(client, 4, 160, stream=False)
        check_answers(client, handles, 160)
        said = Counter(
            decode(message["data"]).type for message in iter(partial(pubsub.get_message, 0.1), None)
        )
        assert said == {"attempt": 4, "end": 4}
        for handle in handles:
            sizes = [
                len(e.choices[0].token_ids) for e in job_events(client, handle.id) if e.choices
            ]
            assert all(size >= 16 for size in sizes[1:-1])
            assert len(sizes) <= 12
