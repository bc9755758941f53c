"""A row: one choice of a request as a member of the batch, and how far it is. Imports no mlx."""

from array import array
from enum import Enum
from typing import NamedTuple

from msgspec import Struct
from msgspec.structs import replace

from mlx_serving.worker.engine.interface import (
    OutputParser,
    Request,
    RequestChoice,
    TokenLogprobs,
    TokenMatcher,
)
from mlx_serving.worker.engine.kv.prefix.index import PrefixKey


class Phase(Enum):
    """State of an admitted row; it moves down this list, or from any state to PARKED.

    A parked row continues as DECODING if its keys and values were kept, else as WAITING.
    """

    WAITING = "waiting"  # admitted, no prompt token computed
    PREFILLING = "prefilling"
    DECODING = "decoding"
    PARKED = "parked"  # out of the batch, in favour of a row of a higher lane


class Prefill(Struct, frozen=True):
    """How much of a row's context is in the KV cache.

    `cached_tokens` were in the prefix cache when the prefill began; `prefilled_tokens` are in the
    KV cache now, those included. `pinned_blocks` hold the cached tokens (of the last block, maybe
    only its first tokens) and can't be evicted until the row has blocks of its own: then there
    are none. `reported_cached_tokens` are the `cached_tokens` as of the row's first new token: a
    parked row may be prefilled once more, and that does not count.
    """

    pinned_blocks: list[int] = []
    cached_tokens: int = 0
    prefilled_tokens: int = 0
    reported_cached_tokens: int | None = None


class Row(Struct, eq=False):
    """One admitted row inside an engine: what the scheduler and the decode batch keep of it.

    Its context is what is prefilled: prompt + committed, and what a parked row had decoded,
    without the last token. That one token (`last_token`) enters the decode batch, and its logits
    there give the row's next token.
    """

    request: Request
    choice: RequestChoice
    order: int = 0  # of admission
    slot: int = -1  # of the detokenizer
    phase: Phase = Phase.WAITING
    prefill: Prefill = Prefill()
    decoded: int = 0  # tokens of the completion that the host has read, committed ones included
    tokens: list[int] = []  # decoded by this attempt, read by the host
    history: "array[int] | None" = None  # of rows with penalties: prompt, then completion so far
    matcher: TokenMatcher | None = None
    parser: OutputParser | None = None
    failed: bool = False  # its keys and values may be wrong: no other row may use them

    def __post_init__(self) -> None:
        """Start the history if the sampler needs one."""
        if self.request.sampling.penalised:
            self.history = array("i", self.request.prompt + self.choice.committed)

    @property
    def context_length(self) -> int:
        """Tokens to prefill."""
        return len(self.request.prompt) + len(self.choice.committed) + len(self.tokens) - 1

    @property
    def uncached_tokens(self) -> int:
        """Tokens of the context that were not in the prefix cache."""
        return self.context_length - self.prefill.cached_tokens

    @property
    def kv_tokens(self) -> int:
        """The most KV-cache tokens that the row can hold."""
        return self.request.kv_tokens_of(self.choice)

    @property
    def last_token(self) -> int:
        """The token that the row brings into the decode batch."""
        return (self.tokens or self.choice.committed or self.request.prompt)[-1]

    @property
    def cached_prompt_tokens(self) -> int:
        """Tokens of the prompt that the prefix cache had when the row first decoded."""
        reported = self.prefill.reported_cached_tokens
        cached = self.prefill.cached_tokens if reported is None else reported
        return min(cached, len(self.request.prompt))

    @property
    def context_key(self) -> PrefixKey:
        """The key of the row's context in the prefix cache."""
        tokens = array("i", self._all_tokens[:-1]).tobytes()
        return PrefixKey(self.request.salt.encode(), tokens)

    def context(self, start: int, stop: int) -> list[int]:
        """Return the tokens to prefill at [start, stop), never beyond `context_length`."""
        return list(self._all_tokens[start : min(stop, self.context_length)])

    def begin_prefill(self, cached_tokens: int) -> None:
        """Begin the prefill, for the first time or anew, after so many cached tokens."""
        self.prefill = replace(
            self.prefill, cached_tokens=cached_tokens, prefilled_tokens=cached_tokens
        )

    def append(self, token: int) -> None:
        """Take a decoded token that the host has read."""
        if self.prefill.reported_cached_tokens is None:
            self.prefill = replace(self.prefill, reported_cached_tokens=self.prefill.cached_tokens)
        self.decoded += 1
        self.tokens.append(token)

    @property
    def _all_tokens(self) -> tuple[int, ...]:
        """Prompt and completion; keys and values of the last token may not be computed yet."""
        return (*self.request.prompt, *self.choice.committed, *self.tokens)


class SampledToken(NamedTuple):
    """One row's next token; `INVALID_TOKEN`: the row's logits were not usable."""

    row: Row
    token: int
    logprobs: TokenLogprobs | None = None  # if the row asked for them
