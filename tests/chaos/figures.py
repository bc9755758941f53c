"""What a run measured."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tests.chaos.audit import Job
    from tests.chaos.trace import Attempt, Trace

Outages = list[tuple[int, int]]
Moment = tuple[int, float, float]  # ns, ms that a sleep was late, ms of a PING; see `probe`
Lateness = list[tuple[int, float]]  # ns at which the consumers' event loop was due, ms it was late
Deaths = dict[int, tuple[int, str]]
SLOW_RESUME_MS = 50
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
    traces: list[Trace], killed: Deaths, outages: Outages, jobs: dict[str, Job], lease: float
) -> dict[str, dict[str, float]]:
    """Seconds from a worker's death on, for each job that it held.

    Until the next attempt event; and where Redis was up throughout, and had not restarted so
    shortly before that reapers waited still (a lease and 2 s): until the job was on its list
    again, and until the very next attempt's event, by lane.
    """
    settled = int((lease + 3) * 1e9)
    opened, queued = _openings(traces), _requeues(traces)
    groups: defaultdict[str, list[float]] = defaultdict(list)
    for trace, died, _ in deaths_of(traces, killed):
        for job_id, epoch in trace.held_at_death():
            later = [o for o in opened[job_id] if o[1] > epoch]
            if not later or later[0][0] <= died:
                continue  # ended by its last commit, or taken over before
            at, next_epoch = later[0]
            groups["to the next attempt"].append((at - died) / 1e9)
            if next_epoch != epoch + 1 or away(outages, died, at, settled):
                continue
            lane = jobs[job_id].lane if job_id in jobs else ""
            groups[f"to the next attempt, Redis up, {lane}"].append((at - died) / 1e9)
            back = next((t for t in queued[job_id] if died < t < at), None)
            if back is not None:
                groups["to its queue, Redis up"].append((back - died) / 1e9)
    return {name: spread(values) for name, values in sorted(groups.items())}


def _openings(traces: list[Trace]) -> defaultdict[str, list[tuple[int, int]]]:
    """When each job's attempts were opened, in order: ns and epoch."""
    opened: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
    for trace in traces:
        for c in trace.commits:
            if c.kind == "attempt" and c.status in {"OK", "DUP"}:
                opened[c.job_id].append((c.replied, c.epoch))
    for moments in opened.values():
        moments.sort()
    return opened


def _requeues(traces: list[Trace]) -> defaultdict[str, list[int]]:
    queued: defaultdict[str, list[int]] = defaultdict(list)
    for at, job_id in sorted(r for trace in traces for r in trace.requeues):
        queued[job_id].append(at)
    return queued


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


def slow_resumes(
    consumers: list[dict[str, Any]], outages: Outages, late: Lateness, moments: list[Moment]
) -> dict[str, Any]:
    """Where the time of slow resumes went, Redis up, over a link that loses nothing.

    For each of them the longest wait of the consumers' event loop for its turn, and that of a
    process that only sends PING (for its turn and for Redis), while the resume was under way.
    """
    slow = [
        (start, start + int(ms * 1e6))
        for consumer in consumers
        if not consumer["through_proxy"]
        for start, ms in consumer["resumes"]
        if ms >= SLOW_RESUME_MS and not away(outages, start, start + int(ms * 1e6))
    ]
    pings = [(at, max(turn, ping)) for at, turn, ping in moments]
    waits = [(_longest(late, *each), _longest(pings, *each)) for each in slow]
    told = [((end - start) / 1e6, *wait) for (start, end), wait in zip(slow, waits, strict=True)]
    return {
        f"of >= {SLOW_RESUME_MS} ms": len(slow),
        "at least half of it the event loop's": sum(loop >= ms / 2 for ms, loop, _ in told),
        "at least half of it anybody's": sum(ping >= ms / 2 for ms, _, ping in told),
        "ms, event loop, PING": [tuple(map(round, each)) for each in told],
    }


def _longest(waits: Iterable[tuple[int, float]], start: int, end: int) -> float:
    """The longest wait that overlaps with a span."""
    return max((ms for at, ms in waits if at < end and at + ms * 1e6 > start), default=0.0)


def prompt_tokens(jobs: Iterable[Job]) -> dict[str, int]:
    """How many there were, and how many of them the prefix cache knew."""
    usages = [usage for job in jobs if (usage := job.usage)]
    known = (u.prompt_tokens_details.cached_tokens for u in usages if u.prompt_tokens_details)
    return {"all": sum(usage.prompt_tokens for usage in usages), "from the cache": sum(known)}
