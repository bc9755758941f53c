"""A slow device, in simulated time: no step with a part of a prompt stays far beyond a second."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from mlx_serving.worker.engine.engine_set import EngineSet
from mlx_serving.worker.engine.interface import Request, SamplingParams
from mlx_serving.worker.engine.scheduling.limits import SchedulerLimits
from mlx_serving.worker.engine.scheduling.scheduler import Scheduler
from mlx_serving.worker.engine.simulated import SimulatedEngine, SimulatedOptions, SimulatedRunner

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mlx_serving.common.queues import Lane
    from mlx_serving.worker.engine.row import SampledToken
    from mlx_serving.worker.engine.scheduling.chunk import PrefillChunk

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


def prompt(
    name: str, tokens: int, answer: int = 2, lane: Lane = "default", model: str = ""
) -> Request:
    return Request(name, (1,) * tokens, PARAMS, answer, lane=lane, model=model)


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


class Queue:
    """A device that computes in order what it was given, for all who wait and all who don't."""

    def __init__(self) -> None:
        self.now = self.idle_at = 0.0

    def launch(self, seconds: float) -> None:
        self.idle_at = max(self.idle_at, self.now) + seconds

    def wait(self, until: float) -> None:
        self.now = max(self.now, until)


class QueuedRunner(SimulatedRunner):
    """Waits as the model's runner does: with decoding rows, for the step before."""

    def __init__(self, options: SimulatedOptions, queue: Queue) -> None:
        super().__init__(options, queue.launch)
        self._queue, self._launched = queue, 0.0

    def prefill(self, chunk: PrefillChunk) -> None:
        super().prefill(chunk)
        if not self._rows:
            self._queue.wait(self._queue.idle_at)

    def decode(self) -> list[SampledToken]:
        before = self._launched
        tokens = super().decode()
        self._launched = self._queue.idle_at
        self._queue.wait(before)
        return tokens


class TwoModels:
    """One device, two engines; `a` has a row that decodes, `b` has none."""

    def __init__(self, options: SimulatedOptions) -> None:
        self.queue, self.set = Queue(), EngineSet()
        self.steps: list[float] = []
        self._ended = 0.0
        self.set.on_stepped = self._stepped
        self.engines = {m: self._engine(m, options) for m in "ab"}
        self.set.add(prompt("decodes", 1, 100_000, "interactive", "a"))
        self.run(4)

    def _engine(self, model: str, options: SimulatedOptions) -> SimulatedEngine:
        runner = QueuedRunner(options, self.queue)
        engine = SimulatedEngine(options, clock=lambda: self.queue.now, runner=runner)
        self.set.put(model, engine)
        return engine

    def _stepped(self) -> None:
        self.steps.append(self.queue.now - self._ended)
        self._ended = self.queue.now

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.set.step()

    def prompts(self, tokens: int) -> None:
        """Compute a long prompt of each."""
        for model in "ab":
            self.set.add(prompt(f"of {model}", tokens, model=model))
        while self.set.waiting:
            self.run(1)

    def size(self, model: str) -> int:
        return self.engines[model]._scheduler.chunk_size.tokens


@pytest.mark.parametrize("depth", [0, 1000])
@pytest.mark.parametrize("speed", [30.0, 60.0, 150.0, 600.0])
def test_a_models_chunk_that_is_paid_in_anothers_step_stays_small(speed: float, depth: int) -> None:
    two = TwoModels(SimulatedOptions(50.0, speed, double_depth_tokens=depth))
    two.prompts(4000)
    first, deepest = 2 * 64 / speed, 2 * 16 / speed * 5  # where none knew; where none is smaller
    assert max(two.steps) < 1.1 * max(2.1, first, deepest if depth else 0)


def test_two_models_on_a_fast_device_are_both_at_the_most() -> None:
    two = TwoModels(SimulatedOptions(50.0, 20_000.0))
    two.prompts(4000)
    assert (two.size("a"), two.size("b")) == (512, 512)
