"""How `top` shows a fleet: a table on a terminal, lines or JSON elsewhere. No I/O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from mlx_serving.cli.console import harmless

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType
    from rich.table import Table

    from mlx_serving.cli.overview import Overview, QueueView
    from mlx_serving.common.worker_record import WorkerRecord

WIDE: Final = 120  # columns from which on there is room for device, memory and version
STYLES: Final = {"serving": "green", "paused": "yellow", "suspended": "yellow"}
BYTES_A_GIB: Final = 1 << 30
LATE_LEASE_MS: Final = 5000  # half a lease: renewals come four times a lease


@dataclass(frozen=True, slots=True)
class FleetTotals:
    """Sums over all workers and queues."""

    workers: int
    rows: int
    batch_rows: int
    queued: int
    running: int
    tokens_per_second: float

    @classmethod
    def of(cls, overview: Overview) -> FleetTotals:
        """Add up."""
        workers, queues = overview.workers, overview.queues
        return cls(
            len(workers), sum(w.rows for w in workers), sum(w.batch_rows for w in workers),
            sum(q.queued for q in queues), sum(q.running for q in queues),
            round(sum(w.tokens_per_second for w in workers), 1),
        )  # fmt: skip

    def __str__(self) -> str:
        return (
            f"{self.workers} workers, rows {self.rows}/{self.batch_rows}, {self.queued:,} queued, "
            f"{self.running:,} running, {self.tokens_per_second:,.1f} tokens/s"
        )


def span(seconds: float | None) -> str:
    """A time to read: 0.3 s, 12 s, 5 min, 3.2 h; '' for None."""
    if seconds is None:
        return ""
    if seconds < 120:  # noqa: PLR2004 -- two minutes
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"  # noqa: PLR2004
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"  # noqa: PLR2004


def state_of(worker: WorkerRecord) -> str:
    """Its state, and why it is paused."""
    return f"{worker.state}: {', '.join(worker.reasons)}" if worker.reasons else worker.state


def models_of(worker: WorkerRecord) -> str:
    """Its models: first those in memory, then the others in brackets, and what it loads now."""
    away = [model for model in worker.models if model not in worker.resident]
    names = [*worker.resident, *(f"({model})" for model in away if model != worker.loading)]
    return " ".join(names + ([f"{worker.loading}…"] if worker.loading else []))


def failures_of(overview: Overview) -> list[str]:
    """Models that workers could not load, a line each."""
    return [f"{w.name} can't load {why}" for w in overview.workers for why in w.unloadable]


def lease_of(worker: WorkerRecord) -> str:
    """Age of its last renewal, and whether renewals fail."""
    age = "" if worker.lease_age_ms is None else span(worker.lease_age_ms / 1000)
    return f"{age} failing".strip() if worker.lease_failing else age


def _rows(worker: WorkerRecord) -> str:
    parked = f", {worker.parked} parked" if worker.parked else ""
    return f"{worker.rows}/{worker.batch_rows}{parked}"


def _kv(worker: WorkerRecord) -> str:
    capacity = worker.kv_tokens_capacity
    return f"{worker.kv_tokens_used / capacity:.0%}" if capacity else ""


def _memory(worker: WorkerRecord) -> str:
    return f"{worker.memory_bytes / BYTES_A_GIB:.0f} GiB" if worker.memory_bytes else ""


def by_model(overview: Overview) -> list[WorkerRecord]:
    """All workers, sorted by model."""
    return sorted(overview.workers, key=lambda w: (w.model, w.name))


def lines(overview: Overview, at: str) -> Iterator[str]:
    """One line of totals, one a worker, one a queue."""
    yield f"{at} {FleetTotals.of(overview)}" + (" SUSPENDED" if overview.suspended else "")
    for w in by_model(overview):
        yield (
            f"worker {w.name} {models_of(w)}: {state_of(w)}, rows {_rows(w)}, KV {_kv(w)}, "
            f"{w.tokens_per_second:,.1f} tokens/s, lease {lease_of(w) or '-'}, {w.device}"
        )
    yield from failures_of(overview)
    for q in overview.queues:
        oldest = span(q.oldest_seconds) or "-"
        yield f"queue {q.name}: {q.queued:,} queued, {q.running:,} running, oldest {oldest}"


def frame(overview: Overview, at: str, *, width: int, notice: str = "") -> RenderableType:
    """The whole screen; `notice` is an error since the last read."""
    from rich.console import Group
    from rich.text import Text

    head = Text(f"mlx-serving  {at}  {FleetTotals.of(overview)}", "bold", no_wrap=True)
    parts: list[RenderableType] = [head]
    if overview.suspended:
        parts.append(Text("RQ is suspended: no worker takes a job until `rq resume`", "yellow"))
    if overview.odd_keys or overview.quarantined_keys:
        text = "keys of a wrong type were found: `mlx-serving status` names them"
        parts.append(Text(text, "yellow"))
    if notice:
        parts.append(Text(harmless(notice), "bold red"))
    parts += [Text(harmless(failure), "yellow") for failure in failures_of(overview)]
    parts += [Text(), _workers(by_model(overview), wide=width >= WIDE), Text()]
    return Group(*parts, _queues(overview.queues), Text("q ends", "dim"))


def _table(*columns: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", expand=True)
    for name in columns:
        right = name.removeprefix(">")
        table.add_column(right, justify="left" if name == right else "right", no_wrap=True)
    return table


def _workers(workers: list[WorkerRecord], *, wide: bool) -> Table:
    from rich.text import Text

    more = ("device", ">memory", "version") if wide else ()
    table = _table("worker", "model", "state", ">rows", ">KV", ">tokens/s", ">lease", *more)
    for w in workers:
        late = w.lease_failing or (w.lease_age_ms or 0) > LATE_LEASE_MS
        cells = [
            Text(harmless(w.name)), Text(harmless(models_of(w))),
            Text(harmless(state_of(w)), STYLES.get(w.state, "")), Text(_rows(w)), Text(_kv(w)),
            Text(f"{w.tokens_per_second:,.1f}"), Text(lease_of(w), "bold red" if late else ""),
        ]  # fmt: skip
        if wide:
            cells += [Text(harmless(w.device)), Text(_memory(w)), Text(harmless(w.version))]
        table.add_row(*cells)
    return table


def _queues(queues: list[QueueView]) -> Table:
    from rich.text import Text

    table = _table("model", "lane", ">queued", ">running", ">oldest")
    for q in queues:
        model, _, lane = q.name.rpartition(":")
        cells = (model, lane, f"{q.queued:,}", f"{q.running:,}", span(q.oldest_seconds))
        table.add_row(*(Text(harmless(cell)) for cell in cells))
    return table
