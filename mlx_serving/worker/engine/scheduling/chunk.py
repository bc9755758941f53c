"""What one forward pass of prefill computes: which tokens, and how many a second allow. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from mlx_serving.worker.engine.row import Row

if TYPE_CHECKING:
    from mlx_serving.common.queues import Lane

Group = tuple[Row, ...]  # rows with one context, never empty


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """One forward pass of prefill: tokens [start, start + length) of what each group must compute.

    That is its context after what was `found` of it in the prefix cache, which is as much in each
    group of a chunk. Rows of a group have one context, which is computed once: they are choices
    of one request. More than one group only where all that each of them must compute fits.
    The first group's lane is the chunk's; prompts of lower lanes may ride along. A lane has at most
    one prefill under way, and a chunk of several prompts ends in the step that it begins in.

    A mixed chunk has no pass of its own: the decode step computes it with its rows' own tokens. It
    has all that each of its prompts must compute, which may differ in what was found of them.
    """

    groups: tuple[Group, ...]
    start: int
    length: int
    mixed: bool = False

    @property
    def rows(self) -> tuple[Row, ...]:
        """Every row of the chunk, in order of arrival."""
        return tuple(row for group in self.groups for row in group)

    @property
    def leaders(self) -> tuple[Row, ...]:
        """One row of each group: the ones that are computed."""
        return tuple(group[0] for group in self.groups)

    @property
    def computed_tokens(self) -> int:
        """Tokens that are computed, padding included."""
        if self.mixed:
            return sum(row.context_length - row.found for row in self.leaders)
        return self.length * len(self.groups)

    @property
    def lane(self) -> Lane:
        """The lane that the chunk is for: its first rows'."""
        return self.groups[0][0].request.lane

    @property
    def completes(self) -> bool:
        """Whether the rows' contexts are in the cache after this chunk."""
        end = self.start + self.length
        return all(row.found + end >= row.context_length for row in self.leaders)


FIRST_TOKENS: Final = 64


LEAST_TOKENS: Final = 16


STEP_SECONDS: Final = 1.0  # what a step with a chunk may take


STALL_PART: Final = 0.2  # of the stall time, which it may not be more than


DECODE_STEPS: Final = 2.0  # such steps' time: a decode step is not believed to take more


DECODES: Final = 3  # steps without a chunk, of which the shortest is believed: one may compile


FILLED: Final = 0.5  # of the size: a smaller chunk says little of one that is full


@dataclass(frozen=True, slots=True)
class ChunkStep:
    """A step as it was measured: when it began and ended, by one clock for all, in seconds.

    `tokens` of prompts were in it, padding included; 0: it had none. `waited`: it waited for the
    device to compute them, else the next step does.
    """

    began: float
    ended: float
    tokens: int = 0
    waited: bool = False

    @property
    def seconds(self) -> float:
        """What it took."""
        return self.ended - self.began

    @property
    def left(self) -> int:
        """Tokens that it launched and did not wait for."""
        return 0 if self.waited else self.tokens


class ChunkSize:
    """The size of a prefill chunk, `tokens`, padding included; one an engine."""

    def __init__(
        self, most: int, first: int = FIRST_TOKENS, step_seconds: float = STEP_SECONDS
    ) -> None:
        """Begin with `first`; it never exceeds `most`. A step may take `step_seconds`."""
        self.most, self.tokens = most, min(first, most)
        self._least = min(LEAST_TOKENS, self.tokens)
        self._step_seconds = step_seconds
        self._before = ChunkStep(0.0, 0.0)
        self._decodes = deque([0.0] * DECODES, DECODES)  # seconds of those that no prompt was in

    def note(self, step: ChunkStep) -> None:
        """Learn from a step."""
        before, self._before = self._before, step
        since = step.ended - before.ended
        if not (step.tokens or before.left):
            if not step.waited:
                self._decodes.append(since)
            return
        decode = 0.0 if step.waited else min(*self._decodes, DECODE_STEPS * self._step_seconds)
        allowed = self._allowed(decode)
        took = since if before.left and not step.waited else step.seconds
        if took - decode > allowed:
            self._shrink(max(step.tokens, before.left))  # either may have been what took so long
        elif step.waited:
            self._grow(step.tokens, took / allowed)
        else:
            self._grow(before.left, (max(before.seconds, took) - decode) / allowed)

    def _allowed(self, decode_seconds: float) -> float:
        """Return what prompts may add to a decode step, in seconds.

        With that step a second in all; where it takes long by itself, half as much again, or
        prompts would hardly go on.
        """
        return max(self._step_seconds - decode_seconds, decode_seconds / 2)

    def _shrink(self, tokens: int) -> None:
        """Halve where a chunk of this size, or a smaller one, took too long.

        It may have been a larger one, of before. One below the least size says nothing of sizes:
        what it took was something else.
        """
        if self._least <= tokens <= self.tokens:
            self.tokens = max(self._least, self.tokens // 2)

    def _grow(self, tokens: int, part: float) -> None:
        """Double where tokens that took so large a part of what is allowed say that it fits."""
        if tokens > FILLED * self.tokens and part * 2 * self.tokens <= tokens:
            self.tokens = min(self.most, 2 * self.tokens)


def step_seconds(stall_seconds: float) -> float:
    """Return what a step with a chunk may take where one of `stall_seconds` counts as hung."""
    return min(STEP_SECONDS, STALL_PART * stall_seconds)
