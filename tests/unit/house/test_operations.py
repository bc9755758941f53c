"""The pages on operations and metrics, and the alert rules, name what there is."""

import importlib.util
import re
from inspect import getsource

import pytest

from mlx_serving.common.setting_tables import ConditionSettings
from mlx_serving.common.settings import Settings
from mlx_serving.worker.status import conditions, health
from mlx_serving.worker.status.metrics import WorkerCollector
from mlx_serving.worker.status.status import StatusTracker
from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "how-to" / "operations.md").read_text()
METRICS_PAGE = (ROOT / "docs" / "reference" / "metrics.md").read_text(encoding="utf-8")
RULES = (ROOT / "ops" / "prometheus" / "mlx-serving.rules.yml").read_text()


def metrics() -> set[str]:
    suffix = {"counter": "_total", "info": "_info"}
    collector = WorkerCollector(StatusTracker(), health.HealthLimits(), "tally", "w")
    return {family.name + suffix.get(family.type, "") for family in collector.collect()}


def test_every_metric_is_in_the_table_and_no_other() -> None:
    assert set(re.findall(r"^\| `(mlx_serving_\w+)`", METRICS_PAGE, re.MULTILINE)) == metrics()
    assert set(re.findall(r"mlx_serving_[a-z]\w*", PAGE)) <= metrics()


def test_the_page_of_metrics_is_what_the_collector_says() -> None:
    path = ROOT / "scripts" / "metrics_page.py"
    spec = importlib.util.spec_from_file_location("metrics_page", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.page() == METRICS_PAGE, "run scripts/metrics_page.py"


def test_rules_ask_for_metrics_that_there_are() -> None:
    asked = {name.removesuffix("_bucket") for name in re.findall(r"mlx_serving_\w+", RULES)}
    assert asked
    assert asked <= metrics()


def test_every_alert_has_its_line_in_the_runbook() -> None:
    alerts = re.findall(r"alert: (\w+)", RULES)
    assert len(alerts) == len(set(alerts)) >= 10
    assert set(alerts) == set(re.findall(r"^\| (MlxServing\w+) \|", PAGE, re.MULTILINE))


def test_every_reason_is_explained() -> None:
    reasons = set(re.findall(r'"([a-z]+_[a-z]+)"', getsource(health.assess)))
    reasons |= set(re.findall(r'yield "(\w+)"', getsource(health)))
    reasons |= set(conditions.REASONS)
    kinds = "red|degraded|paused"
    explained = re.findall(rf"^\| ((?:`\w+`(?:, )?)+) \| (?:{kinds}) \|", PAGE, re.MULTILINE)
    assert reasons == {name for cell in explained for name in re.findall(r"\w+", cell)}
    assert all(f"| `{status}` | " in PAGE for status in health.STATUSES)


def test_settings_and_their_defaults_are_as_written() -> None:
    settings = Settings()
    assert (settings.metrics.port, settings.metrics.host) == (None, "127.0.0.1")
    assert f"({settings.worker.buffer_tokens:,})" in PAGE
    assert settings.engine.stall_seconds == 10.0


def test_the_settings_that_keep_a_worker_from_work_are_in_the_table() -> None:
    named = set(re.findall(r"^\| `conditions\.(\w+)` \|", PAGE, re.MULTILINE))
    assert named == set(ConditionSettings.model_fields)


def test_the_rules_are_rules() -> None:
    yaml = pytest.importorskip("yaml")
    (group,) = yaml.safe_load(RULES)["groups"]
    for rule in group["rules"]:
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["expr"].strip()
        assert rule["labels"]["severity"] in {"page", "ticket"}
        assert rule["annotations"]["summary"]
        assert rule["expr"].count("(") == rule["expr"].count(")")
