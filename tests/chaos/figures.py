"""What a run measured."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tests.chaos.audit import Job
    from tests.chaos.trace import Attempt, Trace

Outages = list[tuple[int, int]]
Deaths = dict[int, tuple[int, str]]
SETTLED_NS = 1_000_000_000  # after a Redis restart, until things are as usual


def spread(values: Iterable[float], digits: int = 3) -> dict[str, float]:
    """Count, p50, p99 and the largest."""
    ordered = sorted(values)
    if not ordered:
        return {"n": 0}
    return {
        "n": len(ordered),
        "p50": round(percentile(ordered, 0.5), digits),
        "p99": round(percentile(ordered, 0.99), digits),
        "max": round(ordered[-1], digits),
    }


def percentile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def away(outages: Outages, start: int, end: int, settled: int = SETTLED_NS) -> bool:
    """Whether Redis was down at some time between, or had been shortly before."""
    return any(killed < end and start < up + settled for killed, up in outages)


def deaths_of(traces: list[Trace], killed: Deaths) -> list[tuple[Trace, int, str]]:
    """Every child that was killed: its trace, when (ns), and where."""
    found = []
    for trace in traces:
        if trace.suicide is not None:
            found.append((trace, *trace.suicide))
        elif trace.pid in killed:
            found.append((trace, *killed[trace.pid]))
    return found


def takeovers(
    traces: list[Trace], killed: Deaths, outages: Outages, lease: float
) -> tuple[list[float], list[float]]:
    """Seconds from a worker's death to the next attempt event of each job that it held.

    All of them; and those where the very next attempt came so far, with Redis up throughout and
    no restart so shortly before that reapers still waited (a lease and 2 s).
    """
    settled = int((lease + 3) * 1e9)
    opened: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
    for trace in traces:
        for c in trace.commits:
            if c.kind == "attempt" and c.status in {"OK", "DUP"}:
                opened[c.job_id].append((c.replied, c.epoch))
    every, plain = [], []
    for trace, died, _ in deaths_of(traces, killed):
        for job_id, epoch in trace.held_at_death():
            later = [o for o in sorted(opened[job_id]) if o[1] > epoch]
            if not later or later[0][0] <= died:
                continue  # ended by its last commit, or taken over before
            seconds = (later[0][0] - died) / 1e9
            every.append(seconds)
            if later[0][1] == epoch + 1 and not away(outages, died, later[0][0], settled):
                plain.append(seconds)
    return every, plain


def redecoded(
    traces: list[Trace], killed: Deaths, outages: Outages, jobs: dict[str, Job]
) -> list[int]:
    """Tokens that a killed worker had decoded and not committed, of each job it was decoding."""
    lost = []
    for trace, died, _ in deaths_of(traces, killed):
        if away(outages, min(trace.last_success(), died - SETTLED_NS), died):
            continue  # with Redis away it decodes on, to its bound
        lost += [
            trace.decoded[attempt] - jobs[attempt[0]].committed(attempt[1])
            for attempt in trace.held_at_death()
            if attempt in trace.decoded and attempt[0] in jobs
        ]
    return lost


def phases(traces: list[Trace], killed: Deaths) -> dict[str, int]:
    """How far the rows had come whose worker was killed."""
    counts: Counter[str] = Counter()
    for trace, _, _ in deaths_of(traces, killed):
        for attempt in trace.held_at_death():
            counts[_phase(trace, attempt)] += 1
        if trace.suicide and trace.suicide[1].endswith("finish"):
            counts["finish"] += 1
    return dict(counts)


def _phase(trace: Trace, attempt: Attempt) -> str:
    if attempt in trace.decoded:
        return "decode"
    return "prefill" if attempt in trace.prefills else "claim"


def resumes(consumers: list[dict[str, Any]], outages: Outages) -> dict[str, dict[str, float]]:
    """Milliseconds from a consumer's reconnect to the first event that it lacked."""
    groups: defaultdict[str, list[float]] = defaultdict(list)
    for consumer in consumers:
        for started, ms in consumer["resumes"]:
            groups["all"].append(ms)
            if not away(outages, started, started + int(ms * 1e6)):
                lossy = consumer["through_proxy"]
                groups["Redis up, lossy link" if lossy else "Redis up"].append(ms)
    return {name: spread(values, 1) for name, values in sorted(groups.items())}
