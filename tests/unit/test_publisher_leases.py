"""How the publisher keeps leases: renewed with the engine's progress, and by commits."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
import redis

from mlx_serving.common.calls import RowReply
from tests.helpers import wait_until
from tests.publisher_bench import Bench, started
from tests.worker_fakes import held, output

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def bench() -> Iterator[Bench]:
    yield from started()


@pytest.mark.parametrize("status", ["OK", "FENCED"])
def test_a_failed_renewal_is_over_with_the_next_one(bench: Bench, status: str) -> None:
    """Also where nothing is held any more: a worker that calls itself failing claims no jobs."""
    bench.protocol.renew_faults = [redis.ConnectionError("lost")] * 3
    bench.protocol.renew_answers["a"] = RowReply(status)  # type: ignore[arg-type]
    bench.hold(held())
    wait_until(lambda: bench.publisher.failing)
    wait_until(lambda: not bench.publisher.failing)
    assert bench.protocol.renew_faults == []


def test_leases_are_renewed_while_the_engine_makes_progress(bench: Bench) -> None:
    bench.hold(held(), held("b"))
    wait_until(lambda: len(bench.protocol.renewals) >= 3)
    assert bench.protocol.renewals[0] == ["a", "b"]
    bench.alive = False
    seen = len(bench.protocol.renewals)
    time.sleep(0.3)  # three renewals' time
    assert len(bench.protocol.renewals) <= seen + 1


def test_what_a_commit_renewed_needs_no_renewal(bench: Bench) -> None:
    """A renewal is a round trip that the next flush would wait for."""
    busy, quiet = held("busy"), held("quiet")
    bench.hold(busy, quiet)
    until = time.monotonic() + 0.4  # a lease
    token = 0
    while time.monotonic() < until:
        bench.publisher.push([output(busy, [token := token + 1], "x")])
        time.sleep(0.005)
    assert bench.protocol.renewals
    assert all(renewed == ["quiet"] for renewed in bench.protocol.renewals[1:])
    bench.publisher.look()  # a hint of a cancel: now all are asked for
    wait_until(lambda: ["busy", "quiet"] in bench.protocol.renewals[1:])


def test_a_renewal_brings_the_reason_to_a_job_that_emits_nothing(bench: Bench) -> None:
    job = held()
    bench.hold(job)
    bench.protocol.renew_answers["a"] = RowReply("OK", "because")
    wait_until(lambda: bench.types()[-1:] == ["end"])


def test_a_renewal_that_is_fenced_drops_the_job(bench: Bench) -> None:
    job = held()
    bench.hold(job)
    bench.protocol.renew_answers["a"] = RowReply("FENCED")
    wait_until(lambda: bench.gone == [job.request_id])
    assert bench.publisher.held() == []
