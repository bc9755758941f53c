"""A worker's record: the hash says all of it, and others read it back as it was."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from mlx_serving.common.worker_record import MODEL_CHARS, TEXT_CHARS, WorkerRecord

MOST_BYTES = 3 * 1024

RECORD = WorkerRecord(
    name="studio", model="tally,big,third", revision="tally=abc", device="gpu: Apple M4 Max",
    acceleration="sampler: native; detokenizer: twin (why)", memory_bytes=64 << 30, batch_rows=64,
    protocol=1, version="0.1.0", pid=17, state="paused", reasons=("hot", "memory_short"), held=13,
    rows=12, waiting=1, parked=2, kv_tokens_used=450, kv_tokens_capacity=1000,
    tokens_per_second=812.5, lease_age_ms=0, lease_failing=True, memory_active_bytes=5,
    memory_limit_bytes=9, resident=("tally",), loading="third",
    unloadable=("big: FileNotFoundError: config.json: missing",), capacities={"tally": 1000},
)  # fmt: skip


def hashed(record: WorkerRecord) -> dict[bytes, bytes]:
    """The hash as Redis replies with it."""
    return {name.encode(): value.encode() for name, value in record.to_hash().items()}


def test_it_is_read_as_it_was_written() -> None:
    assert WorkerRecord.from_hash("studio", hashed(RECORD)) == RECORD


def test_one_that_does_nothing_is_read_as_it_was_written() -> None:
    idle = WorkerRecord(name="idle")
    assert WorkerRecord.from_hash("idle", hashed(idle)) == idle


def test_the_hash_has_every_field_but_the_name() -> None:
    assert set(RECORD.to_hash()) == {field.name for field in fields(WorkerRecord)} - {"name"}


def test_no_hash_no_worker() -> None:
    assert WorkerRecord.from_hash("gone", {}) is None


def test_what_is_missing_has_its_default_and_what_is_unknown_is_left_out() -> None:
    read = WorkerRecord.from_hash("w", {b"state": b"serving", b"new": b"?"})
    assert read == WorkerRecord(name="w", state="serving")


def test_bytes_that_are_no_text_do_no_harm() -> None:
    read = WorkerRecord.from_hash("w", {b"device": b"\xff\xfe", b"\xff": b""})
    assert read is not None
    assert read.device == "\ufffd\ufffd"


def test_it_is_bounded() -> None:
    long = "x" * 10_000
    record = replace(
        RECORD, model=long, revision=long, device=long, acceleration=long, version=long,
        unloadable=(f"big: {long}",), held=10**9, rows=10**9,
    )  # fmt: skip
    values = record.to_hash()
    assert len(values["model"]) == MODEL_CHARS
    assert max(len(text) for name, text in values.items() if name != "model") == TEXT_CHARS
    assert sum(len(name) + len(value) for name, value in values.items()) <= MOST_BYTES


@pytest.mark.parametrize(
    ("model", "tokens"), [("tally", 1000), ("big", 0), ("third", None), ("another", 0)]
)
def test_kv_tokens_of_a_model(model: str, tokens: int | None) -> None:
    assert RECORD.kv_capacity(model) == tokens


def test_a_model_that_failed_after_it_had_been_loaded_keeps_its_capacity() -> None:
    failed = replace(RECORD, unloadable=("tally: gone",))
    assert failed.kv_capacity("tally") == 1000
    assert failed.able == ["big", "third"]


@pytest.mark.parametrize(
    ("asked", "holds"),
    [
        (("tally", 1000, 1), True),
        (("tally", 1001, 1), False),
        (("tally", 1000, 64), True),
        (("tally", 1000, 65), False),
        (("third", 10**9, 2), True),
        (("big", 1, 1), False),
        (("another", 1, 1), False),
    ],
)
def test_what_it_could_hold(asked: Any, holds: bool) -> None:  # noqa: FBT001
    assert RECORD.could_hold(*asked) is holds


def test_only_a_worker_that_serves_takes_jobs() -> None:
    assert not RECORD.is_serving
    assert replace(RECORD, state="serving").is_serving
