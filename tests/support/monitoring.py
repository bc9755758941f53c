"""Asks a worker's parent how it is."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any, Self

from prometheus_client.parser import text_string_to_metric_families

from tests.support.helpers import wait_until

if TYPE_CHECKING:
    from tests.support.worker_process import WorkerProcess


class Probe:
    """`/healthz` and `/metrics` of one worker process, which has `metrics__port=0`."""

    def __init__(self, worker: WorkerProcess) -> None:
        self._worker = worker
        self.port = wait_until(self._listening_port, timeout=30, what="listens")

    def _listening_port(self) -> int:
        """0 while it does not listen."""
        said = re.search(r"monitor_listens.*port=(\d+)", self._worker.whole_log())
        return int(said[1]) if said else 0

    def get(self, path: str) -> tuple[int, str]:
        url = f"http://127.0.0.1:{self.port}{path}"
        try:
            with urllib.request.urlopen(url, timeout=5) as reply:
                return reply.status, reply.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def health(self) -> dict[str, Any]:
        """Body of /healthz, with the HTTP status as `http`."""
        code, body = self.get("/healthz")
        return {"http": code, **json.loads(body)}

    def ok(self) -> Self:
        """Wait until it says that it is."""
        wait_until(lambda: self.status() == "ok", timeout=30, what="ok")
        return self

    def status(self) -> str:
        return str(self.health()["status"])

    def metrics(self) -> dict[str, float]:
        """Sample by `name` or `name{value of each label but the model's}`."""
        return parse(self.get("/metrics")[1])

    def metric(self, name: str) -> float:
        return self.metrics()[name]


def parse(text: str) -> dict[str, float]:
    """Read an exposition, strictly enough that a broken one fails."""
    samples: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation
        for sample in family.samples:
            assert sample.labels["model_name"] == "tally"
            labels = [v for k, v in sorted(sample.labels.items()) if k != "model_name"]
            name = sample.name.removeprefix("mlx_serving_")
            key = f"{name}{{{','.join(labels)}}}" if labels else name
            assert key not in samples
            samples[key] = sample.value
    return samples
