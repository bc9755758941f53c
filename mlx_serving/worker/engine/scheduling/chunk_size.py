"""How many tokens of prompts one step computes: what the device does in a second. Pure.

Nobody knows a device's speed before it has computed something, so the first chunk is small. It
doubles while a chunk of twice the size can be expected to leave its step within a second, and
halves where a step took longer. A token costs more the deeper it stands in its prompt, so it may
halve in the middle of one.
"""

from dataclasses import dataclass
from typing import Final

FIRST_TOKENS: Final = 64
LEAST_TOKENS: Final = 16
STEP_SECONDS: Final = 1.0  # what a step with a chunk may take
DECODE_SECONDS: Final = 2.0  # a decode step's own part is not believed to be more: it may compile
FILLED: Final = 0.5  # of the size: a smaller chunk says little of one that is full


@dataclass(frozen=True, slots=True)
class ChunkStep:
    """A step as it was measured.

    `tokens` of prompts were in it, padding included; 0: it had none. `waited`: it waited for the
    device to compute them, else the next step does.
    """

    seconds: float
    tokens: int = 0
    waited: bool = False


_IDLE: Final = ChunkStep(0.0)


class ChunkSize:
    """The size of a prefill chunk, `tokens`, padding included; one an engine."""

    def __init__(self, most: int, first: int = FIRST_TOKENS) -> None:
        """Begin with `first`; it never exceeds `most`."""
        self.most, self.tokens = most, min(first, most)
        self._least = min(LEAST_TOKENS, self.tokens)
        self._before = _IDLE  # the step before, where it left its chunk to the next one
        self._decode_seconds = 0.0  # of the last step that no prompt had a part in

    def note(self, step: ChunkStep) -> None:
        """Learn from a step."""
        before, self._before = self._before, _IDLE if step.waited else step
        if not (step.tokens or before.tokens):
            self._decode_seconds = step.seconds
            return
        decode = 0.0 if step.waited else min(self._decode_seconds, DECODE_SECONDS)
        allowed = _allowed(decode)
        if step.seconds - decode > allowed:
            self._shrink(max(step.tokens, before.tokens))  # either may have been what took so long
        elif step.waited:
            self._grow(step.tokens, step.seconds / allowed)
        else:
            longest = max(before.seconds, step.seconds)
            self._grow(before.tokens, (longest - decode) / allowed)

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


def _allowed(decode_seconds: float) -> float:
    """Return what prompts may add to a decode step, in seconds.

    With that step a second in all; where it takes long by itself, half as much again, or prompts
    would hardly go on.
    """
    return max(STEP_SECONDS - decode_seconds, decode_seconds / 2)
