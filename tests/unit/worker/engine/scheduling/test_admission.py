"""Admission by KV tokens: rows x widest row, never by hope."""

import pytest

from mlx_serving.worker.engine.interface import (
    Request,
    RequestChoice,
    RequestRefusedError,
    SamplingParams,
)
from mlx_serving.worker.engine.scheduling.limits import BatchSize, SchedulerLimits
from mlx_serving.worker.engine.scheduling.scheduler import Scheduler


def request(name: str, prompt: int = 10, max_tokens: int = 10, committed: int = 0) -> Request:
    choices = (RequestChoice(0, (2,) * committed),)
    return Request(name, (1,) * prompt, SamplingParams(), max_tokens, choices=choices)


def scheduler(rows: int = 4, capacity: int = 100, chunk: int = 16, overhead: int = 0) -> Scheduler:
    return Scheduler(SchedulerLimits(BatchSize(rows), capacity, chunk, overhead))


def test_committed_tokens_are_part_of_max_tokens() -> None:
    assert request("a", prompt=10, max_tokens=10, committed=4).kv_tokens == [20]


def test_rows_are_bounded() -> None:
    batch = scheduler(rows=2)
    batch.add(request("a"))
    batch.add(request("b"))
    assert not batch.can_add(request("c"))
    with pytest.raises(RequestRefusedError) as refusal:
        batch.add(request("c"))
    assert refusal.value.code == "no_room"


def test_every_row_reserves_as_much_as_the_widest() -> None:
    """mlx-lm pads each row of a batch to the longest one."""
    batch = scheduler(capacity=100)
    batch.add(request("wide", prompt=30, max_tokens=20))
    assert batch.kv_tokens_used == 50
    batch.add(request("narrow", prompt=1, max_tokens=1))
    assert batch.kv_tokens_used == 100
    assert not batch.can_add(request("third", prompt=1, max_tokens=1))
    batch.remove(batch.find("wide")[0])
    assert batch.kv_tokens_used == 2
    assert batch.can_add(request("third", prompt=1, max_tokens=1))


def test_what_can_never_fit_is_told_apart_from_what_must_wait() -> None:
    batch = scheduler(capacity=100)
    assert not batch.fits(request("huge", prompt=95, max_tokens=6))
    assert batch.fits(request("exact", prompt=95, max_tokens=5))
    with pytest.raises(RequestRefusedError, match="needs 101 KV tokens") as refusal:
        batch.add(request("huge", prompt=95, max_tokens=6))
    assert refusal.value.code == "too_large"
    assert not batch.has_work


def test_rows_in_blocks_reserve_their_own_blocks() -> None:
    batch = Scheduler(
        SchedulerLimits(BatchSize(4), 100, 16, kv_row_overhead_tokens=2, kv_block_tokens=8)
    )
    batch.add(request("wide", prompt=30, max_tokens=20))
    assert batch.kv_tokens_used == 56
    batch.add(request("narrow", prompt=1, max_tokens=5))
    assert batch.kv_tokens_used == 64
    assert batch.can_add(request("third", prompt=14, max_tokens=16))
    assert not batch.can_add(request("third", prompt=14, max_tokens=19))
    batch.remove(batch.find("wide")[0])
    assert batch.kv_tokens_used == 8


def test_overhead_of_each_row_counts() -> None:
    batch = scheduler(capacity=100, overhead=81)
    assert not batch.fits(request("a"))
    assert scheduler(capacity=100, overhead=80).fits(request("a"))


def test_a_choice_is_admitted_once() -> None:
    batch = scheduler()
    batch.add(request("a"))
    with pytest.raises(RequestRefusedError, match="choice 0 of request a") as refusal:
        batch.add(request("a"))
    assert refusal.value.code == "duplicate_request"
    assert batch.waiting == 1


@pytest.mark.parametrize(("rows", "chunk"), [(0, 16), (4, 0)])
def test_limits_under_which_nothing_runs_are_refused(rows: int, chunk: int) -> None:
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        SchedulerLimits(BatchSize(rows), 100, chunk)
