"""One forward pass of prefill: which tokens it computes, and how many are quick enough. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from mlx_serving.worker.engine.row import Row

if TYPE_CHECKING:
    from mlx_serving.common.queues import Lane

RowGroup = tuple[Row, ...]  # rows with one context, never empty


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """One forward pass of prefill: tokens [start, start + length) of each group's uncached tokens.

    Those are the group's context without its `cached_tokens`, of which every group of a chunk has
    as many. The rows of a group are choices of one request: they have one context, which is
    computed once. A chunk has several groups only if it computes all uncached tokens of each, so
    it is done in one step. The chunk's lane is that of its first group; prompts of lower lanes may
    ride along. A lane has at most one prefill under way.

    A mixed chunk has no forward pass of its own: the decode step computes it beside its rows' own
    tokens. It computes all uncached tokens of each group; their `cached_tokens` may differ.
    """

    groups: tuple[RowGroup, ...]
    start: int
    length: int
    mixed: bool = False

    @property
    def rows(self) -> tuple[Row, ...]:
        """Every row of the chunk, in order of admission."""
        return tuple(row for group in self.groups for row in group)

    @property
    def leaders(self) -> tuple[Row, ...]:
        """The first row of each group: its context is the one that is computed."""
        return tuple(group[0] for group in self.groups)

    @property
    def computed_tokens(self) -> int:
        """Tokens that are computed, padding included."""
        if self.mixed:
            return sum(row.uncached_tokens for row in self.leaders)
        return self.length * len(self.groups)

    @property
    def lane(self) -> Lane:
        """The lane of the chunk: that of its first group."""
        return self.groups[0][0].request.lane

    @property
    def completes(self) -> bool:
        """Whether the rows' contexts are in the cache after this chunk."""
        end = self.start + self.length
        return all(end >= row.uncached_tokens for row in self.leaders)


FIRST_TOKENS: Final = 64  # size of an engine's first chunk
LEAST_TOKENS: Final = 16  # no chunk is made smaller than this
STEP_SECONDS: Final = 1.0  # the longest that a step with a chunk may take
STALL_PART: Final = 0.2  # of the stall time: an upper bound on that
DECODE_STEPS: Final = 2.0  # in `step_seconds`: an upper bound on the measured decode step
DECODES: Final = 3  # the shortest of so many decode steps is taken: any of them may have compiled
FILLED: Final = 0.5  # of the size: smaller chunks don't tell how long a full one takes


@dataclass(frozen=True, slots=True)
class ChunkStep:
    """A step as it was measured: when it began and ended, in seconds of one clock.

    `tokens`: how many prompt tokens it computed, padding included; 0: no chunk. `waited`: it
    waited until the device had computed them; else the next step waits for them.
    """

    began: float
    ended: float
    tokens: int = 0
    waited: bool = False

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.ended - self.began

    @property
    def unfinished_tokens(self) -> int:
        """Prompt tokens that it launched and did not wait for."""
        return 0 if self.waited else self.tokens


class ChunkSize:
    """The size of an engine's prefill chunks: `tokens`, padding included. It follows step times."""

    def __init__(
        self, most: int, first: int = FIRST_TOKENS, step_seconds: float = STEP_SECONDS
    ) -> None:
        """Begin with `first`; never exceed `most`. A step may take `step_seconds`."""
        self.most, self.tokens = most, min(first, most)
        self._least = min(LEAST_TOKENS, self.tokens)
        self._step_seconds = step_seconds
        self._before = ChunkStep(0.0, 0.0)
        self._decodes = deque([0.0] * DECODES, DECODES)  # seconds of the last steps without a chunk

    def note(self, step: ChunkStep) -> None:
        """Adapt the size to a measured step."""
        before, self._before = self._before, step
        since = step.ended - before.ended
        if not (step.tokens or before.unfinished_tokens):
            if not step.waited:
                self._decodes.append(since)
            return
        decode = 0.0 if step.waited else min(*self._decodes, DECODE_STEPS * self._step_seconds)
        allowed = self._allowed(decode)
        took = since if before.unfinished_tokens and not step.waited else step.seconds
        if took - decode > allowed:
            # Either of the two may have taken so long.
            self._shrink(max(step.tokens, before.unfinished_tokens))
        elif step.waited:
            self._grow(step.tokens, took / allowed)
        else:
            self._grow(before.unfinished_tokens, (max(before.seconds, took) - decode) / allowed)

    def _allowed(self, decode_seconds: float) -> float:
        """Return how long prompts may make a decode step, in seconds.

        Both together may take `step_seconds`. If the decode step alone takes almost as long,
        prompts may add half of its time: else they would hardly make progress.
        """
        return max(self._step_seconds - decode_seconds, decode_seconds / 2)

    def _shrink(self, tokens: int) -> None:
        """Halve the size if a chunk of this size or a smaller one took too long.

        A larger chunk is one from before the last change. A chunk below the least size was slow
        for another reason than its size.
        """
        if self._least <= tokens <= self.tokens:
            self.tokens = max(self._least, self.tokens // 2)

    def _grow(self, tokens: int, part: float) -> None:
        """Double the size if, by this measurement, such a chunk fits into the allowed time."""
        if tokens > FILLED * self.tokens and part * 2 * self.tokens <= tokens:
            self.tokens = min(self.most, 2 * self.tokens)


def step_seconds(stall_seconds: float) -> float:
    """Return how long a step with a chunk may take if one of `stall_seconds` counts as hung."""
    return min(STEP_SECONDS, STALL_PART * stall_seconds)
