"""The child's list of what it holds, as its parent reads it after any death."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mlx_serving.worker.process.inflight_file import (
    SLOT_BYTES,
    InflightFile,
    InflightJobs,
    RowState,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

ID = "0123456789abcdef0123456789abcdef"


@pytest.fixture
def file() -> Iterator[InflightFile]:
    file = InflightFile(slots=8)
    yield file
    file.close()


def states(file: InflightFile) -> dict[str, str]:
    return {row.attempt.name: row.state.name for row in file.read()}


def test_a_new_file_holds_nothing(file: InflightFile) -> None:
    assert file.read() == []


def test_the_parent_reads_what_the_child_wrote_and_where_it_stood(file: InflightFile) -> None:
    child = InflightJobs.open(file.path)
    for job in ("a:1:0f", "b:12:0f", f"{ID}:3:0f", "d:1:0f"):
        child.hold(job)
    child.prefill(["b:12:0f", f"{ID}:3:0f"])
    child.mark("d:1:0f", RowState.PROVEN)
    assert states(file) == {
        "a:1:0f": "HELD", "b:12:0f": "ENTERING", f"{ID}:3:0f": "ENTERING", "d:1:0f": "PROVEN",
    }  # fmt: skip
    assert [row.attempt[:2] for row in file.read()] == [
        ("a", 1), ("b", 12), (ID, 3), ("d", 1),
    ]  # fmt: skip


def test_the_files_name_is_gone_once_the_child_has_it(file: InflightFile) -> None:
    child = InflightJobs.open(file.path)
    assert not Path(file.path).exists()
    child.hold("a:1:0f")
    assert states(file) == {"a:1:0f": "HELD"}


def test_a_file_that_no_child_opened_is_removed() -> None:
    file = InflightFile(slots=1)
    assert Path(file.path).exists()
    file.close()
    assert not Path(file.path).exists()


def test_a_prefill_ends_when_the_next_begins_or_the_step_is_over(file: InflightFile) -> None:
    child = InflightJobs.open(file.path)
    child.hold("a:1:0f")
    child.hold("b:1:0f")
    child.prefill(["a:1:0f"])
    child.prefill(["b:1:0f"])
    assert states(file) == {"a:1:0f": "RUNNING", "b:1:0f": "ENTERING"}
    child.prefill(())
    assert states(file) == {"a:1:0f": "RUNNING", "b:1:0f": "RUNNING"}


def test_rendering_a_prompt_counts_as_entering_only_meanwhile(file: InflightFile) -> None:
    child = InflightJobs.open(file.path)
    child.hold("a:1:0f")
    with child.entering("a:1:0f"):
        assert states(file) == {"a:1:0f": "ENTERING"}
    assert states(file) == {"a:1:0f": "HELD"}


def test_a_model_is_listed_while_a_slice_of_its_load_runs(file: InflightFile) -> None:
    child = InflightJobs.open(file.path)
    child.hold(f"{ID}:1:0f")
    with child.loading("org/big"):
        assert states(file) == {f"{ID}:1:0f": "HELD", "org/big:0:": "LOADING"}
    assert states(file) == {f"{ID}:1:0f": "HELD"}


def test_slots_are_used_again_and_the_order_of_claims_is_kept(file: InflightFile) -> None:
    child = InflightJobs.open(file.path)
    names = [f"job{n}:1:0f" for n in range(100)]
    for name in names:
        child.hold(name)
        child.hold(name)
        if name != "job95:1:0f":
            child.drop(name)
    child.hold("late:1:0f")
    child.drop("unknown:1:0f")
    child.mark("unknown:1:0f", RowState.RUNNING)
    assert [row.attempt.name for row in file.read()] == ["job95:1:0f", "late:1:0f"]


def test_what_finds_no_slot_is_left_to_its_lease(file: InflightFile) -> None:
    child = InflightJobs.open(file.path)
    for n in range(20):
        child.hold(f"{n}:1:0f")
    child.hold("x" * 300 + ":1:0f")
    assert len(file.read()) == 8


def test_an_older_attempt_of_the_same_job_is_another_row(file: InflightFile) -> None:
    child = InflightJobs.open(file.path)
    child.hold("a:1:0f")
    child.hold("a:2:0f")
    child.drop("a:1:0f")
    assert states(file) == {"a:2:0f": "HELD"}


def test_a_torn_record_is_not_read(file: InflightFile) -> None:
    """Whatever part of `hold` was written: the state byte comes last."""
    whole = bytearray(SLOT_BYTES * 8)
    InflightJobs(whole).hold("abcdef:1:0f")
    (at,) = [at for at in range(0, len(whole), SLOT_BYTES) if whole[at]]
    with Path(file.path).open("r+b") as raw:
        for length in range(1, SLOT_BYTES):
            raw.seek(at + 1)
            raw.write(whole[at + 1 : at + length])
            raw.flush()
            assert file.read() == []


def test_garbage_does_no_harm(file: InflightFile) -> None:
    noise = random.Random(1)
    with Path(file.path).open("r+b") as raw:
        for _ in range(200):
            raw.seek(0)
            raw.write(noise.randbytes(SLOT_BYTES * 8))
            raw.flush()
            for row in file.read():
                assert row.attempt.job_id
                assert row.attempt.epoch >= 0


def test_without_a_file_it_is_only_kept() -> None:
    inflight = InflightJobs()
    inflight.hold("a:1:0f")
    inflight.prefill(["a:1:0f"])
    inflight.drop("a:1:0f")
