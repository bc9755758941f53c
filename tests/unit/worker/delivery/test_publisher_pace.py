"""The publisher's pace: leases, and what a kill may lose. Without Redis."""

from __future__ import annotations

import threading
import time
from itertools import pairwise
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Self

import pytest
import redis

from mlx_serving.common.protocol.calls import RowReply
from mlx_serving.worker.delivery import publisher
from mlx_serving.worker.delivery.held import EVENT_TOKENS
from mlx_serving.worker.delivery.publisher import BACK_OFF_SECONDS
from tests.support.helpers import wait_until
from tests.support.publisher_bench import FLUSH, Bench
from tests.support.worker_fakes import FakeProtocol, held, output

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlx_serving.common.protocol.calls import Call


@pytest.fixture
def bench() -> Iterator[Bench]:
    with Bench() as bench:
        yield bench


@pytest.mark.parametrize("status", ["OK", "FENCED"])
def test_a_failed_renewal_is_over_with_the_next_one(bench: Bench, status: str) -> None:
    """Also where nothing is held any more: a worker that calls itself failing claims no jobs."""
    bench.protocol.renew_faults = [redis.ConnectionError("lost")] * 10_000
    bench.protocol.renew_answers["a"] = RowReply(status)  # type: ignore[arg-type]
    bench.hold(held())
    wait_until(lambda: bench.publisher.failing)
    bench.protocol.renew_faults.clear()
    wait_until(lambda: not bench.publisher.failing)


def test_leases_are_renewed_while_the_engine_makes_progress(bench: Bench) -> None:
    bench.hold(held(), held("b"))
    wait_until(lambda: len(bench.protocol.renewals) >= 3)
    assert bench.protocol.renewals[0] == ["a", "b"]
    bench.alive = False
    seen = len(bench.protocol.renewals)
    time.sleep(0.3)  # three renewals' time
    assert len(bench.protocol.renewals) <= seen + 1


def test_a_job_that_the_engine_lost_keeps_no_lease() -> None:
    """One that is still being prepared does, and one that the engine has."""
    with Bench(lease_ms=400) as bench:
        jobs = [held(name) for name in ("lost", "prepared", "computed")]
        bench.hold(*jobs)
        bench.publisher.placed([jobs[0], jobs[2]])
        wait_until(lambda: ["lost", "prepared", "computed"] in bench.protocol.renewals)
        bench.missing = {jobs[0].request_id, jobs[1].request_id}
        seen = len(bench.protocol.renewals)
        wait_until(lambda: len(bench.protocol.renewals) >= seen + 3)
        assert all(each == ["prepared", "computed"] for each in bench.protocol.renewals[seen + 1 :])


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


# What a kill loses (D4): the flush under way and what was decoded meanwhile. So a flush takes all
# that is pending, and the next one goes as soon as the reply is there.

ROUND_TRIP = 0.06


class SlowProtocol(FakeProtocol):
    """Answers after a round trip's time; notes when each commit came and was answered."""

    def __init__(self) -> None:
        super().__init__()
        self.spans: list[tuple[float, float]] = []

    def run(self, call: Call[Any]) -> Any:
        came = time.monotonic()
        time.sleep(ROUND_TRIP)
        try:
            return super().run(call)
        finally:
            if call.script == "commit":
                self.spans.append((came, time.monotonic()))


class Stalls:
    """A thread that asks for a millisecond's sleep all the time: what it gets beyond that is the
    machine's doing, and the publisher, a thread of the same process, gets it too.
    """

    def __init__(self) -> None:
        self._stalls: list[tuple[float, float]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        asked = time.monotonic()
        while not self._over.wait(0.001):
            woke = time.monotonic()
            if woke - asked > 0.005:
                self._stalls.append((asked + 0.001, woke))
            asked = time.monotonic()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def within(self, begin: float, end: float) -> float:
        """Seconds of that time in which the machine stood still."""
        return sum(max(0.0, min(end, b) - max(begin, a)) for a, b in self._stalls)


@pytest.mark.parametrize("faults", [0, 3])
def test_a_kill_loses_no_more_than_the_flush_under_way_and_what_was_decoded_meanwhile(
    faults: int,
) -> None:
    bench = Bench(SlowProtocol(), lease_ms=10_000, flush_seconds=0.01)
    protocol = bench.protocol
    assert isinstance(protocol, SlowProtocol)
    jobs = [held(f"j{n}") for n in range(64)]
    bench.hold(*jobs)
    pushed: list[float] = []  # when token n of every job was handed over
    protocol.faults = [redis.ConnectionError("lost")] * faults
    with Stalls() as stalls, bench:
        for token in range(300):
            bench.publisher.push([output(job, [token], "x") for job in jobs])
            pushed.append(time.monotonic())
            time.sleep(0.002)
        wait_until(lambda: bench.publisher.backlog == 0 and not bench.publisher.pending)
    first, *others = protocol.spans
    came = [first[0], *(at for at, _ in others[faults:])]  # a fault sends the first one again
    taken = 0
    for at, rows in zip(came, protocol.commits, strict=True):
        events = [event for job_id, event, _ in rows if job_id == "j0"]
        tokens = [t for event in events for c in event.choices for t in c.token_ids]
        assert tokens == list(range(taken, taken + len(tokens)))
        taken += len(tokens)
        # It holds all that was handed over before it was sent.
        sent = at - 0.01 - stalls.within(at - 0.5, at)
        assert sum(before < sent for before in pushed) <= taken
    pauses = [
        after - before - stalls.within(before, after)
        for (_, before), (after, _) in pairwise(protocol.spans)
    ]
    assert max(pauses[:faults], default=0) < BACK_OFF_SECONDS[-1] + 0.1
    assert sorted(pauses[faults:])[len(pauses[faults:]) // 2] < 0.01 + 0.02
    assert max(pauses[faults:]) < 0.01 + 0.1


def test_a_fast_rows_events_stay_small(bench: Bench) -> None:
    job = held()
    bench.hold(job)
    bench.publisher.push([output(job, [0])])
    wait_until(lambda: len(bench.protocol.commits) == 1)
    began = time.monotonic()
    for token in range(1, EVENT_TOKENS + 1):
        bench.publisher.push([output(job, [token])])
    wait_until(lambda: len(bench.protocol.commits) == 2)
    assert time.monotonic() - began < FLUSH
    assert len(bench.protocol.events[-1].choices[0].token_ids) == EVENT_TOKENS


@pytest.mark.parametrize(
    ("step", "steps"),
    [(0.003, 3), (0.0049, 2), (0.006, 2), (0.007, 1), (0.0083, 1), (0.02, 1)],
)
def test_flushes_go_with_the_steps_that_end_nearest_to_the_interval(
    monkeypatch: pytest.MonkeyPatch, step: float, steps: int
) -> None:
    """However late the interpreter lets the flush take its rows."""
    now = [100.0]
    monkeypatch.setattr(publisher, "time", SimpleNamespace(monotonic=lambda: now[0]))
    bench, job = Bench(lease_ms=10_000, flush_seconds=0.01), held()
    bench.hold(job)
    flushed = []
    for number in range(40):
        now[0] = 100 + number * step
        bench.publisher.push([output(job, [number], "x")])
        if bench.publisher._in_haste():
            flushed.append(number)
            now[0] += 0.6 * step
            assert bench.publisher._collect()
    assert {after - before for before, after in pairwise(flushed)} == {steps}
