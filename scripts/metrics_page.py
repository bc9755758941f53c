"""Writes docs/reference/metrics.md: every metric of a worker.

    python scripts/metrics_page.py          # writes the page
    python scripts/metrics_page.py --print  # shows it

Names, kinds, labels and meanings come from the collector. This file adds only which metrics vLLM
has too. `tests/unit/house/test_operations.py` compares the page with this.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from mlx_serving.worker.status.health import HealthLimits
from mlx_serving.worker.status.metrics import PREFIX, WorkerCollector
from mlx_serving.worker.status.status import StatusTracker

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

PAGE: Final = Path(__file__).parents[1] / "docs" / "reference" / "metrics.md"
SUFFIX: Final = {"counter": "_total", "info": "_info"}

VLLM_HAS: Final = (
    "time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds",
    "request_queue_time_seconds", "num_requests_running", "num_requests_waiting",
    "kv_cache_usage_perc", "prompt_tokens", "generation_tokens",
    "request_success",
)  # fmt: skip
"""Metrics that mean the same as vLLM's of this name, without prefix and suffix."""

_HEAD: Final = f"""\
# Metrics

What `/metrics` of a worker answers, as Prometheus text or OpenMetrics. How to switch it on, and
what to do about an alert: [operations](../how-to/operations.md). All samples also have the label
`model_name`. `vllm` in the last column: vLLM has a metric of the same meaning, named `vllm:…` for
`{PREFIX}…`.

This page is written by `python scripts/metrics_page.py` from the collector.

| metric | kind | labels | meaning | |
|---|---|---|---|---|
"""


def page() -> str:
    """The page's text."""
    collector = WorkerCollector(StatusTracker(), HealthLimits(), "tally", "w")
    return _HEAD + "".join(sorted(map(_row, collector.collect())))


def full_name(metric: Metric) -> str:
    """The name as a scraper sees it."""
    return f"{metric.name}{SUFFIX.get(metric.type, '')}"


def _row(metric: Metric) -> str:
    labels = [f"`{one}`" for one in getattr(metric, "_labelnames", ()) if one != "model_name"]
    shared = "vllm" if metric.name.removeprefix(PREFIX) in VLLM_HAS else ""
    cells = (f"`{full_name(metric)}`", metric.type, ", ".join(labels), metric.documentation, shared)
    return f"| {' | '.join(cells)} |\n"


if __name__ == "__main__":
    if "--print" in sys.argv:
        print(page())
    else:
        PAGE.write_text(page(), encoding="utf-8")
