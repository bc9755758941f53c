"""Counting in the child, adding up in the parent, and the text that Prometheus reads."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest
import redis
from prometheus_client import CollectorRegistry, generate_latest

from mlx_serving.common.protocol.calls import ClaimReply, RowReply, Swept
from mlx_serving.common.protocol.client import Protocol
from mlx_serving.common.states import JobState
from mlx_serving.worker.delivery.measured_protocol import MeasuredProtocol
from mlx_serving.worker.models.loaded_models import ModelsStatus
from mlx_serving.worker.models.memory_keeper import MemoryState
from mlx_serving.worker.status.counters import BUCKETS, COMMIT, E2E, ITL, QUEUE_TIME, TTFT, Counters
from mlx_serving.worker.status.health import HealthLimits
from mlx_serving.worker.status.metrics import COUNTERS, GAUGES, HISTOGRAMS, WorkerCollector
from mlx_serving.worker.status.reporter import Snapshotter
from mlx_serving.worker.status.status import Snapshot, StatusTracker, decode, encode
from tests.support.monitoring import parse
from tests.support.worker_fakes import claim_of, held, output

if TYPE_CHECKING:
    from collections.abc import Callable


def counts(counters: Counters) -> dict[str, dict[str, float]]:
    return counters.read()[0]


def observed(counters: Counters, name: str) -> int:
    return sum(counters.read()[1][name][0])


def exposition(tracker: StatusTracker) -> dict[str, float]:
    registry = CollectorRegistry()
    registry.register(WorkerCollector(tracker, HealthLimits(), "tally", "w1"))
    return parse(generate_latest(registry).decode())


# -- counting ---------------------------------------------------------------------------


def test_a_steps_tokens_and_gaps() -> None:
    counters, jobs = Counters(), [held(f"j{n}") for n in range(3)]
    for job in jobs:
        job.add(output(job, [1]))
    counters.stepped([(job, output(job, [1])) for job in jobs])
    assert counts(counters) == {"generation_tokens": {"": 3}, "prompt_tokens": {"": 9}}
    assert (observed(counters, TTFT), observed(counters, ITL)) == (3, 0)
    counters.stepped([(job, output(job, [2, 3])) for job in jobs[:2]])
    counters.stepped([(jobs[2], output(jobs[2], [], "held back"))])
    assert counts(counters)["generation_tokens"][""] == 7
    assert observed(counters, ITL) == 2  # a gap an output, however many tokens it holds
    counters.stepped([(job, output(job, [4])) for job in jobs])
    assert observed(counters, ITL) == 5
    assert observed(counters, TTFT) == 3


def test_choices_have_gaps_each_and_one_prompt_together() -> None:
    counters, job = Counters(), held(choices=2)
    for token in (1, 2):
        step = [output(job, [token], choice=n) for n in (0, 1)]
        for each in step:
            job.add(each)
        counters.stepped([(job, each) for each in step])
    assert counts(counters) == {"generation_tokens": {"": 4}, "prompt_tokens": {"": 3}}
    assert (observed(counters, TTFT), observed(counters, ITL)) == (1, 2)


def test_a_gap_is_as_long_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    counters, job, clock = Counters(), held(), iter([10.0, 10.03])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    for _ in range(2):
        counters.stepped([(job, output(job, [1]))])
    buckets, total = counters.read()[1][ITL]
    assert total == pytest.approx(0.03)
    assert buckets[BUCKETS[ITL].index(0.05)] == 1  # above 0.025, not above 0.05


def test_time_to_first_token_is_the_first_attempts_and_since_the_enqueue() -> None:
    counters = Counters()
    first = held(enqueued_ms=1000, now_ms=1400)
    first.first_token_ms = 1500
    later = held("b", enqueued_ms=1000, now_ms=9000, first_token_ms=1500, epoch=2)
    counters.stepped([(first, output(first, [1])), (later, output(later, [1]))])
    buckets, total = counters.read()[1][TTFT]
    assert (sum(buckets), total) == (1, 0.5)


def test_only_a_finished_job_is_a_success() -> None:
    counters = Counters()
    for state, reason in (
        (JobState.FINISHED, "stop"), (JobState.FINISHED, "length"), (JobState.FAILED, "error"),
        (JobState.CANCELLED, None), (JobState.EXPIRED, None),
    ):  # fmt: skip
        job = held()
        job.choices[0].finish_reason = reason
        counters.ended(job, state)
    assert counts(counters)["request_success"] == {"stop": 1, "length": 1}
    ended = counts(counters)["jobs_ended"]
    assert ended == {"finished": 2, "failed": 1, "cancelled": 1, "expired": 1}
    assert observed(counters, E2E) == 2


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[Counters, str, Any], None]:
    """Have a call of the protocol answered, or fail."""

    def run(counters: Counters, name: str, reply: Any) -> None:
        def answer(*_: object) -> Any:
            if isinstance(reply, Exception):
                raise reply
            return reply

        monkeypatch.setattr(Protocol, "run", answer)
        protocol = MeasuredProtocol.__new__(MeasuredProtocol)
        protocol._counters = counters
        protocol.run(type("Call", (), {"script": name}))  # type: ignore[arg-type]

    return run


def test_what_redis_says_is_counted(script: Callable[[Counters, str, Any], None]) -> None:
    counters = Counters()
    statuses = ["OK", "DUP", "FENCED", "GAP", "ERROR", "FENCED"]
    rows = [RowReply(s) for s in statuses]  # type: ignore[arg-type]
    script(counters, "commit", rows)
    script(counters, "renew", [RowReply("OK"), RowReply("FENCED")])
    claims = [claim_of(epoch=1, enqueued_ms=1000, started_ms=3000), claim_of("b", epoch=2)]
    script(counters, "claim", ClaimReply(suspended=False, jobs=claims, dropped=[]))
    script(counters, "release", ["OK", "OK", "DUP", "FENCED"])
    script(counters, "reap", Swept(outcomes=[("a", "requeued"), ("b", "expired")]))
    assert counts(counters) == {
        "fenced_writes": {"": 3}, "refused_writes": {"gap": 1, "error": 1},
        "claims": {"first": 1, "later": 1}, "hand_offs": {"": 2},
        "takeovers": {"requeued": 1, "expired": 1},
    }  # fmt: skip
    assert counters.read()[1][QUEUE_TIME][1] == 2.0
    assert observed(counters, COMMIT) == 1


def test_a_call_that_fails_is_no_answer(script: Callable[[Counters, str, Any], None]) -> None:
    counters = Counters()
    counters.redis_answered_at = 0.0
    with pytest.raises(redis.ConnectionError):
        script(counters, "commit", redis.ConnectionError())
    assert (counters.redis_failed, counters.redis_answered_at) == (True, 0.0)
    assert counts(counters) == {"redis_errors": {"": 1}}
    assert observed(counters, COMMIT) == 0
    script(counters, "renew", [])
    assert not counters.redis_failed
    assert counters.redis_answered_at > 0


# -- adding up --------------------------------------------------------------------------


def snapshot(tokens: int, gaps: int = 0, **fields: Any) -> Snapshot:
    buckets = [gaps, *[0] * len(BUCKETS[ITL])]
    told = Snapshot(
        phase="serving", counts={"generation_tokens": {"": tokens}},
        histograms={ITL: (buckets, gaps * 0.0005)}, **fields,
    )  # fmt: skip
    return decode(encode(told))


def test_counters_survive_their_child() -> None:
    tracker = StatusTracker()
    for last in (5, 20, 1):  # each child counts from zero, and reports its sum so far
        tracker.begin()
        tracker.receive(snapshot(0))
        tracker.receive(snapshot(last, gaps=last))
        tracker.end("killed", restarts=True)
    samples = exposition(tracker)
    assert samples["generation_tokens_total"] == 26
    assert samples["inter_token_latency_seconds_count"] == 26
    assert samples["inter_token_latency_seconds_sum"] == pytest.approx(0.013)
    assert samples["engine_restarts_total"] == 2
    assert samples["engine_exits_total{killed}"] == 3
    tracker.begin()
    assert exposition(tracker)["generation_tokens_total"] == 26
    tracker.receive(snapshot(4))
    assert exposition(tracker)["generation_tokens_total"] == 30


def test_what_a_dead_child_held_is_not_held_any_more() -> None:
    tracker = StatusTracker()
    tracker.begin()
    tracker.receive(snapshot(1, held=4, running=4, backlog=9, kv_used=5, kv_capacity=10))
    assert exposition(tracker)["kv_cache_usage_perc"] == 0.5
    assert exposition(tracker)["leases_held"] == 4
    tracker.end("crashed", restarts=True)
    samples = exposition(tracker)
    assert {samples[name] for name in GAUGES} == {0.0}
    assert samples["health_status{red}"] == 1
    assert samples["health_reason{child_restarting}"] == 1


def test_every_series_is_there_before_anything_happens() -> None:
    """An alert on a counter that appears with its first count would miss that one."""
    samples = exposition(StatusTracker())
    for name, (kind, _, values) in COUNTERS.items():
        for label in values or (("tally",) if kind == "model" else ("",)):
            key = f"{name}_total{{{label}}}" if label else f"{name}_total"
            assert samples[key] == 0
    for name in HISTOGRAMS:
        assert samples[f"{name}_count"] == 0
        assert samples[f"{name}_bucket{{+Inf}}"] == 0
    assert samples["crash_verdicts_total{dead}"] == 0


def test_buckets_are_cumulative_and_hold_all() -> None:
    counters = Counters()
    for seconds in (0.005, 0.02, 0.02, 99_999.0):
        counters.observe(TTFT, seconds)
    tracker = StatusTracker()
    tracker.begin()
    _, histograms = counters.read()
    tracker.receive(Snapshot(phase="serving", histograms=histograms))
    samples = exposition(tracker)
    found = [samples[f"{TTFT}_bucket{{{float(b)}}}"] for b in BUCKETS[TTFT]]
    assert found == [1, *[3] * (len(found) - 1)]
    assert samples[f"{TTFT}_bucket{{+Inf}}"] == samples[f"{TTFT}_count"] == 4


def test_every_measure_has_a_metric_and_the_other_way_round() -> None:
    assert set(BUCKETS) == set(HISTOGRAMS)
    assert all(list(bounds) == sorted(set(bounds)) for bounds in BUCKETS.values())


def test_queues_info_and_verdicts() -> None:
    tracker = StatusTracker()
    tracker.begin()
    tracker.receive(
        Snapshot(
            phase="serving",
            info={"device": "cpu", "acceleration": 'detokenizer: "twin"'},
            queues={"tally:bulk": (3, 1.5)},
        )
    )
    tracker.add_verdicts({"charged": 3, "dead": 1})
    samples = exposition(tracker)
    assert samples["queue_depth{tally:bulk}"] == 3
    assert samples["queue_oldest_age_seconds{tally:bulk}"] == 1.5
    assert samples['engine_info{detokenizer: "twin",cpu,w1}'] == 1
    assert samples["crash_verdicts_total{charged}"] == 3


# -- looking at the parts ---------------------------------------------------------------


class Part:
    """Stands in for the runner, its engine and the publisher."""

    def __init__(self, **fields: Any) -> None:
        vars(self).update(fields)

    def held(self) -> list[int]:
        return [1, 2]

    def unadmitted(self) -> list[int]:
        return [1]

    def is_alive(self) -> bool:
        return bool(vars(self)["alive"])

    def is_set(self) -> bool:
        return True


class Models:
    """Stands in for the loaded models."""

    def status(self) -> ModelsStatus:
        return ModelsStatus(resident=("tally",), info={"device": "cpu"})


def snapshotter(counters: Counters, *, alive: bool = True, failing: bool = False) -> Snapshotter:
    engine = Part(running=3, waiting=2, parked=1, kv_tokens_used=10, kv_tokens_capacity=40)
    runner = Part(engine=engine, failure=None, stalled_for=0.25, stall_seconds=10.0, ready=Part())
    publisher = Part(backlog=5, failing=failing, ident=1, alive=alive)
    parts: Any = runner, publisher, Part(state=MemoryState(), due="hours"), Models()
    return Snapshotter(counters, *parts)


def test_a_snapshot_is_what_the_parts_say() -> None:
    told = decode(encode(snapshotter(Counters()).snapshot()))
    assert told.stall_seconds == 10.0
    assert (told.phase, told.engine_age, told.held, told.running) == ("serving", 0.25, 2, 3)
    assert (told.waiting, told.kv_used, told.kv_capacity, told.backlog) == (3, 10, 40, 5)
    assert told.parked == 1
    assert (told.engine_dead, told.publisher_dead, told.info) == (False, False, {"device": "cpu"})
    assert (told.redis_failing, told.redis_age < 1, told.main_age < 1) == (0.0, True, True)
    assert (told.resident, told.recycling) == (("tally",), "")


def test_a_worker_that_drains_says_so_and_why_it_is_replaced() -> None:
    counters = Counters()
    counters.draining = True
    told = snapshotter(counters).snapshot()
    assert (told.phase, told.recycling) == ("draining", "hours")


def test_a_dead_publisher_is_told_unless_it_was_to_end() -> None:
    looked = snapshotter(Counters(), alive=False)
    assert looked.snapshot().publisher_dead
    looked.stop()
    assert not looked.snapshot().publisher_dead


def test_how_long_redis_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    counters = Counters()
    clock = [50.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    looked = snapshotter(counters)
    counters.redis_failed = True
    assert looked.snapshot().redis_failing == 0.0
    clock[0] += 3.0
    assert looked.snapshot().redis_failing == 3.0
    counters.answered()
    assert looked.snapshot().redis_failing == 0.0
