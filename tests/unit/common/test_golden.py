"""Golden fixtures: what was released is read for ever, and written byte for byte the same.

Each file under `tests/fixtures/golden/v1` is what that release put on the wire. A test that fails
here means that jobs, events or results already in somebody's Redis would break: add a new file
beside the old ones, never change one.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from mlx_serving.common import events, results
from mlx_serving.common.job.schema import GenerationJob
from mlx_serving.common.protocol.client import parse_record
from mlx_serving.common.states import JobState
from tests.support.paths import ROOT

if TYPE_CHECKING:
    from pathlib import Path

GOLDEN = ROOT / "tests" / "fixtures" / "golden" / "v1"
JOBS = sorted((GOLDEN / "jobs").glob("*.json"))
EVENTS = sorted((GOLDEN / "events").glob("*.json"))
RESULTS = sorted((GOLDEN / "results").glob("*.json"))
CONTROLS = sorted((GOLDEN / "control").glob("*.json"))


def compact(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def test_every_form_has_a_fixture() -> None:
    kinds = {json.loads(path.read_bytes())["type"] for path in EVENTS}
    assert kinds >= events.KNOWN_TYPES
    assert {json.loads(path.read_bytes())["state"] for path in RESULTS} >= {
        "finished",
        "failed",
        "cancelled",
        "expired",
        "dead",
    }
    assert {json.loads(path.read_bytes())["st"] for path in CONTROLS} == {*JobState}
    used = {key for path in JOBS for key in json.loads(path.read_bytes())}
    assert used >= set(GenerationJob.model_fields) - UNSUPPORTED_AS_YET


UNSUPPORTED_AS_YET = {"adapter", "kind"}


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_jobs_are_read_and_written_the_same(path: Path) -> None:
    released = path.read_text().rstrip("\n")
    assert compact(GenerationJob.from_wire(json.loads(released)).to_wire()) == released


def test_the_defaults_that_the_wire_leaves_out_are_the_released_ones() -> None:
    released = json.loads((GOLDEN / "defaults.json").read_bytes())
    job = GenerationJob.from_wire({"v": 1, "min_protocol": 1, "model": "m", "prompt": "p"})
    now = job.model_dump(mode="json")
    assert {field: now[field] for field in released} == released


@pytest.mark.parametrize("path", EVENTS, ids=lambda path: path.stem)
def test_events_are_read_and_written_the_same(path: Path) -> None:
    released = path.read_bytes().rstrip(b"\n")
    assert events.encode(events.decode(released)) == released


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_results_are_read_and_written_the_same(path: Path) -> None:
    released = path.read_bytes().rstrip(b"\n")
    assert results.encode_result(results.decode_result(released)) == released


@pytest.mark.parametrize("path", CONTROLS, ids=lambda path: path.stem)
def test_control_hashes_are_read(path: Path) -> None:
    fields: dict[str, str] = json.loads(path.read_bytes())
    record = parse_record("job", {name.encode(): value.encode() for name, value in fields.items()})
    assert record is not None
    assert record.state.value == fields["st"]
    assert (record.queue, record.owner) == (fields["q"], fields["ow"])
    assert (record.seq, record.epoch) == (int(fields["seq"]), int(fields["ep"]))
    assert record.stream is (fields["sm"] == "1")
    assert record.cancel_reason == fields["ca"]
    assert (record.enqueued_ms, record.finished_ms) == (
        int(fields["en"]),
        int(fields.get("fi", 0)),
    )
    assert (record.error_code, record.message) == (fields.get("err", ""), fields.get("msg", ""))
    if "res" in fields:
        assert results.decode_result(record.result).state is record.state
