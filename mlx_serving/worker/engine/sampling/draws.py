"""What the sampler is given at a step, and what it gives back."""

from typing import NamedTuple, Protocol

import mlx.core as mx


class StepInputs(NamedTuple):
    """A call's own data.

    `step` counts the calls since the parameters were packed; `tokens` int32 [B] are what the
    model took in at this one. `state` int32 [B, C] holds, in each row, `step` and the tokens that
    the model took in at the calls before: with `tokens` they are what the packed history lacks.
    `mask` int32 [B, ceil(V / 32)]: bit t % 32 of word t / 32 is set where token t is allowed
    (llguidance's layout).
    """

    step: int
    tokens: mx.array
    state: mx.array
    mask: mx.array | None


class Logprobs(NamedTuple):
    """Natural log probabilities under the model's own distribution.

    `chosen` float32 [B]; `top_tokens` int32 [B, K] and `top` float32 [B, K], likeliest first and
    of equals the lowest id. A row's values beyond those it asked for mean nothing.
    """

    chosen: mx.array
    top_tokens: mx.array
    top: mx.array


class Draws(NamedTuple):
    """`tokens` int32 [B]; `logprobs` where any row asked; `state` to hand to the next call."""

    tokens: mx.array
    logprobs: Logprobs | None
    state: mx.array

    @property
    def arrays(self) -> list[mx.array]:
        """Everything to evaluate."""
        return [self.tokens, self.state, *(self.logprobs or ())]


class Draw(Protocol):
    """One implementation, made for one batch's parameters."""

    def __call__(self, logits: mx.array, inputs: StepInputs) -> Draws:
        """Draw a token a row from logits [B, V] of any float dtype."""
