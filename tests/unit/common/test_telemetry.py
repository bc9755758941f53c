"""Logs: prompts and outputs never show, whatever way they are handed in."""

from __future__ import annotations

import json
import logging
from io import StringIO
from typing import TYPE_CHECKING, Any

import pytest
import structlog

from mlx_serving.common.events import ChoiceDelta, tokens_event
from mlx_serving.common.job.schema import GenerationJob
from mlx_serving.common.telemetry import (
    PRIVATE_KEYS,
    configure_logging,
    get_logger,
    job_context,
    trace_id,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

HUSH = "hush-hush"
JOB = GenerationJob.build(model="tally", prompt=HUSH)
EVENT = tokens_event(attempt=1, seq=2, choices=[ChoiceDelta(0, HUSH, [1])])
TRACE = f"00-{'a' * 32}-{'b' * 16}-01"


@pytest.fixture(params=["json", "console"])
def log(request: pytest.FixtureRequest) -> Iterator[StringIO]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    stream = StringIO()
    configure_logging(log_format=request.param, stream=stream)
    yield stream
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.parametrize("key", sorted(PRIVATE_KEYS))
def test_private_keys_are_redacted(key: str, log: StringIO) -> None:
    get_logger("t").warning("said", **{key: HUSH, "kept": "visible"})
    logged = log.getvalue()
    assert HUSH not in logged
    assert "visible" in logged
    assert "[redacted]" in logged


@pytest.mark.parametrize(
    "value",
    [
        JOB,
        EVENT,
        [JOB],
        {"a": {"Content": HUSH}},
        {"a": [{"messages": [{"content": HUSH}]}]},
        {"a": [[[[[HUSH]]]]]},
        HUSH.encode(),
        (EVENT,),
    ],
    ids=str,
)
def test_values_that_hold_them_are_not_shown(value: object, log: StringIO) -> None:
    get_logger("t").warning("said", thing=value)
    logged = log.getvalue()
    assert "said" in logged
    assert HUSH not in logged


@pytest.mark.parametrize("value", [JOB, EVENT, {"text": HUSH}, [JOB], HUSH.encode()])
def test_arguments_are_not_shown(value: object, log: StringIO) -> None:
    get_logger("t").warning("said %s to %d", value, 3)
    logging.getLogger("rq.worker").warning("done %s in %d", value, 4)
    logged = log.getvalue()
    assert "in 4" in logged
    assert HUSH not in logged


def test_named_arguments_are_not_shown(log: StringIO) -> None:
    logging.getLogger("rq.worker").warning("done %(job)s", {"job": JOB})
    assert "done <GenerationJob>" in log.getvalue()


def test_tracebacks_show_no_local_variables(log: StringIO) -> None:
    local = HUSH.upper().lower()
    try:
        _ = [][len(local)]
    except IndexError:
        get_logger("t").exception("failed")
    logged = log.getvalue()
    assert "IndexError" in logged
    assert HUSH not in logged


def test_counts_by_a_private_name_are_shown(log: StringIO) -> None:
    get_logger("t").warning("flushed", tokens=4711)
    assert "4711" in log.getvalue()


def test_records_inside_a_job_name_it(log: StringIO) -> None:
    with job_context("job-1", attempt=2, traceparent=TRACE):
        get_logger("t").warning("inside")
        logging.getLogger("other").warning("inside too")
    get_logger("t").warning("outside")
    lines = log.getvalue().splitlines()
    assert all("job-1" in line and "a" * 32 in line for line in lines[:2])
    assert "job-1" not in lines[2]


def test_the_trace_id_is_the_second_part() -> None:
    assert trace_id(TRACE) == "a" * 32


def test_json_lines_are_json(log: StringIO) -> None:
    configure_logging(log_format="json", level="debug", stream=log)
    get_logger("t").debug("said", n=1, odd=object())
    record: dict[str, Any] = json.loads(log.getvalue())
    assert (record["event"], record["n"], record["level"]) == ("said", 1, "debug")
    assert record["logger"] == "t"


def test_the_level_is_kept(log: StringIO) -> None:
    get_logger("t").debug("too much")
    assert log.getvalue() == ""
