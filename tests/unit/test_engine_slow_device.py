"""A slow device, in simulated time: no step with a part of a prompt stays far beyond a second."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from mlx_serving.worker.engine.scheduling.limits import SchedulerLimits
from mlx_serving.worker.engine.scheduling.scheduler import Scheduler
from mlx_serving.worker.engine.sequence import Request, SamplingParams
from mlx_serving.worker.engine.simulated import SimulatedEngine, SimulatedOptions

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mlx_serving.common.jobs import Lane

PARAMS = SamplingParams()


class SlowDevice:
    """An engine whose clock is what its device sleeps."""

    def __init__(self, **options: float) -> None:
        self.now = 0.0
        self.steps: list[float] = []
        chosen = SimulatedOptions(**options)  # type: ignore[arg-type]
        self.engine = SimulatedEngine(chosen, self._sleep, lambda: self.now)

    def _sleep(self, seconds: float) -> None:
        self.now += seconds

    def run(self, requests: Iterable[Request]) -> None:
        for request in requests:
            self.engine.add(request)
        while self.engine.has_work:
            began = self.now
            self.engine.step()
            self.steps.append(self.now - began)

    @property
    def size(self) -> int:
        return self.engine._scheduler.chunk_size.tokens


def prompt(name: str, tokens: int, answer: int = 2, lane: Lane = "default") -> Request:
    return Request(name, (1,) * tokens, PARAMS, answer, lane=lane)


def test_a_long_prompt_on_a_slow_device_comes_in_small_chunks() -> None:
    device = SlowDevice(prefill_tokens_per_second=100.0, double_depth_tokens=1000)
    device.run([prompt("a", 4000)])
    assert max(device.steps) < 2
    assert device.size < 64  # found in the middle of the prompt


def test_short_prompts_that_arrive_together_share_no_chunk_beyond_it() -> None:
    device = SlowDevice(prefill_tokens_per_second=60.0)
    device.run([prompt(f"{n}", 30 + n) for n in range(12)])
    assert max(device.steps) < 1.2


def test_a_fast_device_is_at_the_most_after_three_chunks() -> None:
    device = SlowDevice(prefill_tokens_per_second=20_000.0)
    device.run([prompt("a", 1 + 64 + 128 + 256)])
    assert device.size == 512


def test_beside_decoding_rows_it_is_the_same() -> None:
    device = SlowDevice(prefill_tokens_per_second=100.0, tokens_per_second=20.0)
    for number in range(4):
        device.engine.add(prompt(f"d{number}", 4, 400, "interactive"))
    device.run([prompt("a", 1500), *(prompt(f"s{n}", 20, lane="bulk") for n in range(8))])
    assert max(device.steps) < 1.2


def test_the_next_prompt_of_a_device_that_was_slow_once_grows_again() -> None:
    device = SlowDevice(prefill_tokens_per_second=10_000.0)
    device.engine._scheduler.chunk_size.tokens = 16
    device.run([prompt("a", 2000)])
    assert device.size == 512


@pytest.mark.parametrize("size", [16, 64, 100])
def test_a_prompt_by_itself_comes_in_chunks_of_the_size_of_now(size: int) -> None:
    limits = SchedulerLimits(SimulatedOptions().batch, 10_000, 512)
    scheduler = Scheduler(limits)
    scheduler.chunk_size.tokens = size
    (row,) = scheduler.add(prompt("a", 201))
    chunks = scheduler.chunks_of((row,))
    assert [chunk.start for chunk in chunks] == list(range(0, 200, size))
    assert sum(chunk.length for chunk in chunks) == 200
    assert max(chunk.length for chunk in chunks) == size
