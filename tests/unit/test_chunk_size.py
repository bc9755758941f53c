"""How the size of a prefill chunk follows the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from mlx_serving.worker.engine.scheduling.chunk_size import ChunkSize, ChunkStep

if TYPE_CHECKING:
    from collections.abc import Callable


def waited(seconds: float, tokens: int) -> ChunkStep:
    return ChunkStep(seconds, tokens, waited=True)


def prefill(size: ChunkSize, tokens: int, seconds_of: Callable[[int, int], float]) -> list[float]:
    """Compute one prompt with nothing beside it; return the seconds of each step."""
    steps, done = [], 0
    while done < tokens:
        chunk = min(size.tokens, tokens - done)
        steps.append(seconds_of(chunk, done))
        size.note(waited(steps[-1], chunk))
        done += chunk
    return steps


def test_it_begins_small_and_doubles_up_to_the_most() -> None:
    size, seen = ChunkSize(512), []
    for _ in range(6):
        seen.append(size.tokens)
        size.note(waited(0.001 * size.tokens, size.tokens))
    assert seen == [64, 128, 256, 512, 512, 512]


def test_the_most_is_the_most() -> None:
    assert ChunkSize(40).tokens == 40
    assert ChunkSize(512, first=512).tokens == 512


def test_it_does_not_double_into_a_step_that_would_be_too_long() -> None:
    size = ChunkSize(512)
    size.note(waited(0.6, 64))
    assert size.tokens == 64
    size.note(waited(0.5, 64))
    assert size.tokens == 128


def test_it_halves_where_a_step_took_longer_than_a_second_down_to_a_floor() -> None:
    size = ChunkSize(512)
    seen = []
    for _ in range(4):
        size.note(waited(1.1, size.tokens))
        seen.append(size.tokens)
    assert seen == [32, 16, 16, 16]


def test_a_slow_first_use_does_not_leave_it_small() -> None:
    size = ChunkSize(512)
    size.note(waited(20.0, 64))
    for _ in range(5):
        size.note(waited(0.001 * size.tokens, size.tokens))
    assert size.tokens == 512


def test_a_few_tokens_that_take_long_say_nothing_of_the_size() -> None:
    """So is a model warmed up, whose first steps compile."""
    size = ChunkSize(512)
    for tokens in (4, 5, 15):
        size.note(waited(12.0, tokens))
    assert size.tokens == 64


def test_a_chunk_that_was_far_from_full_teaches_no_growth() -> None:
    size = ChunkSize(512)
    size.note(waited(0.01, 32))
    assert size.tokens == 64
    size.note(waited(0.01, 33))
    assert size.tokens == 128


@pytest.mark.parametrize("length", range(1, 65))
def test_a_burst_of_prompts_alike_leaves_no_size_stuck(length: int) -> None:
    """As many as fit are always more than half of it, where one fits at all."""
    size = ChunkSize(512, first=16)
    for _ in range(8):
        rows = max(1, size.tokens // length)
        size.note(waited(0.0001, rows * length if rows > 1 else min(length, size.tokens)))
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
    size.note(ChunkStep(0.01, 64))
    assert size.tokens == 64  # only launched
    size.note(ChunkStep(0.1, 64))
    assert size.tokens == 128
    size.note(ChunkStep(0.1, 128))
    size.note(ChunkStep(1.5))
    assert size.tokens == 64


def test_one_slow_chunk_halves_once() -> None:
    size = ChunkSize(512, first=512)
    size.note(ChunkStep(0.01, 512))
    size.note(ChunkStep(1.5, 512))
    assert size.tokens == 256
    size.note(ChunkStep(1.5, 256))  # waits for the second of 512
    assert size.tokens == 256
    size.note(ChunkStep(0.8))
    assert size.tokens == 256


def test_a_decode_step_that_is_slow_by_itself_leaves_prompts_their_part() -> None:
    size = ChunkSize(512)
    for _ in range(4):
        size.note(ChunkStep(1.5))
        size.note(ChunkStep(1.5, 64))
        size.note(ChunkStep(2.1))
    assert size.tokens == 64
    size.note(ChunkStep(1.5))
    size.note(ChunkStep(1.5, 64))
    size.note(ChunkStep(2.4))
    assert size.tokens == 32


def test_what_a_decode_step_took_does_not_excuse_a_chunk_with_nothing_beside_it() -> None:
    size = ChunkSize(512)
    size.note(ChunkStep(12.0))  # compiles
    size.note(waited(1.2, 64))
    assert size.tokens == 32
