"""How the size of a prefill chunk follows the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from mlx_serving.worker.engine.scheduling.chunk import (
    DECODES,
    ChunkSize,
    ChunkStep,
    step_seconds,
)

if TYPE_CHECKING:
    from collections.abc import Callable


class Steps:
    """An engine's steps as its chunk size learns of them."""

    def __init__(self, size: ChunkSize) -> None:
        self.size, self.now = size, 1000.0

    def waited(self, seconds: float, tokens: int) -> None:
        self._note(seconds, tokens, waited=True)

    def launched(self, seconds: float, tokens: int = 0) -> None:
        """With decoding rows: what is waited for is the step before."""
        self._note(seconds, tokens, waited=False)

    def decodes(self, seconds: float) -> None:
        """As often as it takes to be believed."""
        for _ in range(DECODES):
            self.launched(seconds)

    def other(self, seconds: float) -> None:
        """Let time pass between two steps: another engine's step, a slice of a load, a pause."""
        self.now += seconds

    def _note(self, seconds: float, tokens: int, *, waited: bool) -> None:
        began = self.now
        self.now += seconds
        self.size.note(ChunkStep(began, self.now, tokens, waited=waited))


def prefill(size: ChunkSize, tokens: int, seconds_of: Callable[[int, int], float]) -> list[float]:
    """Compute one prompt with nothing beside it; return the seconds of each step."""
    seen, done, steps = [], 0, Steps(size)
    while done < tokens:
        chunk = min(size.tokens, tokens - done)
        seen.append(seconds_of(chunk, done))
        steps.waited(seen[-1], chunk)
        done += chunk
    return seen


def test_it_begins_small_and_doubles_up_to_the_most() -> None:
    size = ChunkSize(512)
    steps, seen = Steps(size), []
    for _ in range(6):
        seen.append(size.tokens)
        steps.waited(0.001 * size.tokens, size.tokens)
    assert seen == [64, 128, 256, 512, 512, 512]


def test_the_most_is_the_most() -> None:
    assert ChunkSize(40).tokens == 40
    assert ChunkSize(512, first=512).tokens == 512


def test_it_does_not_double_into_a_step_that_would_be_too_long() -> None:
    size = ChunkSize(512)
    steps = Steps(size)
    steps.waited(0.6, 64)
    assert size.tokens == 64
    steps.waited(0.49, 64)
    assert size.tokens == 128


def test_it_halves_where_a_step_took_longer_than_a_second_down_to_a_floor() -> None:
    size = ChunkSize(512)
    steps = Steps(size)
    seen = []
    for _ in range(4):
        steps.waited(1.1, size.tokens)
        seen.append(size.tokens)
    assert seen == [32, 16, 16, 16]


def test_a_slow_first_use_does_not_leave_it_small() -> None:
    size = ChunkSize(512)
    steps = Steps(size)
    steps.waited(20.0, 64)
    for _ in range(5):
        steps.waited(0.001 * size.tokens, size.tokens)
    assert size.tokens == 512


def test_a_few_tokens_that_take_long_say_nothing_of_the_size() -> None:
    """So is a model warmed up, whose first steps compile."""
    size = ChunkSize(512)
    steps = Steps(size)
    for tokens in (4, 5, 15):
        steps.waited(12.0, tokens)
    assert size.tokens == 64


def test_a_chunk_that_was_far_from_full_teaches_no_growth() -> None:
    size = ChunkSize(512)
    steps = Steps(size)
    steps.waited(0.01, 32)
    assert size.tokens == 64
    steps.waited(0.01, 33)
    assert size.tokens == 128


@pytest.mark.parametrize("length", range(1, 65))
def test_a_burst_of_prompts_alike_leaves_no_size_stuck(length: int) -> None:
    """As many as fit are always more than half of it, where one fits at all."""
    size = ChunkSize(512, first=16)
    steps = Steps(size)
    for _ in range(8):
        rows = max(1, size.tokens // length)
        steps.waited(0.0001, rows * length if rows > 1 else min(length, size.tokens))
    assert size.tokens == 512 or length * 2 <= size.tokens == 16


@pytest.mark.parametrize("speed", [20, 60, 100, 400, 2_000, 20_000])
def test_steps_of_a_deep_prompt_stay_near_a_second(speed: int) -> None:
    """A token at depth 2,000 costs thrice what it costs at the beginning."""
    size = ChunkSize(512)
    steps = prefill(size, 4000, lambda chunk, depth: chunk / speed * (1 + depth / 1000))
    assert max(steps[1:]) <= max(2.1, 2 * 16 / speed * 5)
    assert sum(step > 1.01 for step in steps) <= (8 if speed > 80 else len(steps))


def test_a_chunk_that_the_next_step_waits_for_is_known_by_that_step() -> None:
    size = ChunkSize(512)
    steps = Steps(size)
    steps.launched(0.01, 64)
    assert size.tokens == 64  # only launched
    steps.launched(0.1, 64)
    assert size.tokens == 128
    steps.launched(0.1, 128)
    steps.launched(1.5)
    assert size.tokens == 64


def test_one_slow_chunk_halves_once() -> None:
    size = ChunkSize(512, first=512)
    steps = Steps(size)
    steps.launched(0.01, 512)
    steps.launched(1.5, 512)
    assert size.tokens == 256
    steps.launched(1.5, 256)  # waits for the second of 512
    assert size.tokens == 256
    steps.launched(0.8)
    assert size.tokens == 256


def test_a_decode_step_that_is_slow_by_itself_leaves_prompts_their_part() -> None:
    size = ChunkSize(512)
    steps = Steps(size)
    for _ in range(4):
        steps.decodes(1.5)
        steps.launched(1.5, 64)
        steps.launched(2.1)
    assert size.tokens == 64
    steps.decodes(1.5)
    steps.launched(1.5, 64)
    steps.launched(2.4)
    assert size.tokens == 32


def test_what_a_decode_step_took_does_not_excuse_a_chunk_with_nothing_beside_it() -> None:
    size = ChunkSize(512)
    steps = Steps(size)
    steps.decodes(12.0)
    steps.waited(1.2, 64)
    assert size.tokens == 32


def test_one_decode_step_that_compiles_excuses_no_chunk() -> None:
    size = ChunkSize(512)
    steps = Steps(size)
    steps.launched(5.0)
    for _ in range(8):
        steps.launched(2.4, size.tokens)
    assert size.tokens == 16


def test_nor_does_one_among_others() -> None:
    size = ChunkSize(512, first=512)
    steps = Steps(size)
    steps.decodes(0.1)
    steps.launched(5.0)
    steps.launched(0.1, 512)
    steps.launched(2.4)
    assert size.tokens == 256


def test_a_chunk_that_was_waited_for_elsewhere_does_not_seem_free() -> None:
    """Another engine's step waits for all that the device has, this one's chunk included."""
    size = ChunkSize(512)
    steps = Steps(size)
    for _ in range(8):
        steps.launched(0.05, size.tokens)
        steps.other(size.tokens / 60)
    assert size.tokens <= 64


@pytest.mark.parametrize("speed", [20, 60, 400])
def test_nor_where_the_prompt_gets_deeper(speed: int) -> None:
    size, done, seen = ChunkSize(512), 0, []
    steps = Steps(size)
    while done < 4000:
        tokens = size.tokens
        seen.append(tokens / speed * (1 + done / 1000))
        steps.launched(0.01, tokens)
        steps.other(seen[-1])
        done += tokens
    assert max(seen[1:]) <= max(2.2, 2 * 16 / speed * 5)


def test_other_steps_that_are_short_keep_no_size_small() -> None:
    size = ChunkSize(512)
    steps = Steps(size)
    for _ in range(6):
        steps.other(0.1)
        steps.launched(0.05, size.tokens)
    assert size.tokens == 512


def test_other_steps_that_are_always_long_leave_prompts_their_part() -> None:
    """As a decode step that is slow: what a round takes without a chunk is not the chunk's."""
    size = ChunkSize(512, first=256)
    steps = Steps(size)
    for _ in range(DECODES + 1):
        steps.other(1.4)
        steps.launched(0.1)
    for _ in range(5):
        steps.other(1.4)
        steps.launched(0.2, 256)
    assert size.tokens == 512


def test_time_that_passes_with_no_chunk_under_way_says_nothing() -> None:
    size = ChunkSize(512)
    steps = Steps(size)
    for _ in range(3):
        steps.waited(0.9, 64)
        steps.other(3600)
        steps.launched(0.9, 64)
        steps.launched(0.9)
        steps.other(3600)
    assert size.tokens == 64


def test_a_short_stall_time_makes_short_steps() -> None:
    assert [step_seconds(stall) for stall in (1, 2.5, 5, 10, 3600)] == [0.2, 0.5, 1, 1, 1]
    size = ChunkSize(512, step_seconds=0.5)
    steps = Steps(size)
    steps.waited(0.6, 64)
    assert size.tokens == 32
    steps.waited(0.2, 32)
    assert size.tokens == 64
    steps.decodes(3.0)  # believed: 1 s, to which half of it may come
    steps.launched(0.1, 64)
    steps.launched(1.6)
    assert size.tokens == 32
