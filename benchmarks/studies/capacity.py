"""How many Macs one Redis carries, from what `benchmarks.contract.scale` measured.

The page is docs/explanation/scale.md.

    python -m benchmarks.studies.capacity scale.json

Redis runs all scripts on one core, so its share of that core is what fills up. It is taken to be
linear, share = workers * per_worker + events/s * per_event: the stages of streams give both, by
least squares; the bulk stage gives what a commit costs that nobody listens to.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.lib.process_cpu import BUSY

FLUSH_SECONDS: Final = 0.01  # worker.flush_interval_ms: a flush goes with the step nearest to it
BULK_COMMITS: Final = 2.0  # a second and row: each 500 ms …
BULK_TOKENS: Final = 16  # … or so many tokens


@dataclass(frozen=True)
class Cost:
    """What Redis's core spends: seconds a second for each worker, seconds for each event."""

    per_worker: float
    per_event: float
    per_commit: float  # of a bulk job's row

    @classmethod
    def fit(cls, points: Sequence[dict[str, Any]]) -> "Cost":
        """From the stages of a run."""
        streams = [p for p in points if p["events"] and "AOF" not in p["name"]]
        per_worker, per_event = _least_squares(
            [(p["workers"], p["events"], p["loads"]["redis"]["share"]) for p in streams]
        )
        (bulk,) = (p for p in points if not p["events"])
        row_rate = bulk["tokens"] / bulk["streams"]
        commits = bulk["streams"] * commits_a_row(row_rate)
        share = bulk["loads"]["redis"]["share"] - bulk["workers"] * per_worker
        return cls(per_worker, per_event, share / commits)


def _least_squares(rows: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """Solve z = a x + b y; neither below 0."""
    xx, xy, yy = (sum(r[i] * r[j] for r in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    xz, yz = (sum(r[i] * r[2] for r in rows) for i in (0, 1))
    determinant = xx * yy - xy * xy
    a, b = (xz * yy - yz * xy) / determinant, (yz * xx - xz * xy) / determinant
    return (a, b) if a >= 0 else (0.0, yz / yy)


def events_a_row(row_rate: float) -> float:
    """Events a second of a live stream at so many tokens a second: one a flush."""
    return row_rate / max(1, math.ceil(row_rate * FLUSH_SECONDS - 0.5))


def commits_a_row(row_rate: float) -> float:
    """Commits a second of a bulk job's row."""
    return min(row_rate, max(BULK_COMMITS, row_rate / BULK_TOKENS))


@dataclass(frozen=True)
class Mac:
    """A Mac that decodes `tokens` a second over all of its `rows`."""

    tokens: float
    rows: int

    def streams_load(self, cost: Cost) -> float:
        """Share of Redis's core, all rows streamed live."""
        return cost.per_worker + cost.per_event * self.rows * events_a_row(self.tokens / self.rows)

    def bulk_load(self, cost: Cost) -> float:
        """The same of bulk jobs."""
        return cost.per_worker + cost.per_commit * self.rows * commits_a_row(
            self.tokens / self.rows
        )


MACS: Final = (Mac(100, 8), Mac(400, 16), Mac(800, 32), Mac(1600, 64), Mac(1000, 5))


def table(cost: Cost) -> list[str]:
    """Lines of the page's table: how many such Macs fill 70% of a core."""
    lines = ["| a Mac | streams live | bulk |", "|---|---|---|"]
    for mac in MACS:
        streams, bulk = (int(BUSY / load) for load in (mac.streams_load(cost), mac.bulk_load(cost)))
        lines.append(f"| {mac.tokens:,.0f} tokens/s over {mac.rows} rows | {streams} | {bulk} |")
    return lines


def main() -> None:
    """Print what was fitted, and the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("report", type=Path, help="what benchmarks.contract.scale wrote")
    cost = Cost.fit(json.loads(parser.parse_args().report.read_text())["points"])
    print(
        f"a worker {cost.per_worker:.3%} of a core; an event {cost.per_event * 1e6:.1f} µs;"
        f" a bulk commit {cost.per_commit * 1e6:.1f} µs"
    )
    print("\n".join(table(cost)))


if __name__ == "__main__":
    main()
