"""Each row's position in its grammar, and the masks of allowed tokens.

The grammar engine is llguidance. A mask has one bit for each token: whether the grammar allows it
next. It depends on the token before, which the device samples, so it can't be ready when a step is
launched. `model_runner` builds the forward pass and reads the last token; the masks are computed
here, in a thread of their own, while the forward pass is launched and the device works on it. They
are needed only for sampling the next token.
"""

import os
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, Final

import mlx.core as mx
import numpy as np

from mlx_serving.worker.engine.interface import INVALID_TOKEN
from mlx_serving.worker.engine.row import SampledToken

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher
    from numpy.typing import NDArray

ALLOW_ALL: Final = -1  # a word of ones
BITS: Final = 32  # tokens a word


class Matcher:
    """One row's position in its grammar; implements `interface.TokenMatcher`."""

    def __init__(self, matcher: "LLMatcher", mask_words: int) -> None:
        """Take an llguidance matcher of its own, and the length of its masks in words."""
        self.inner = matcher
        self.mask_words = mask_words

    def advance(self, token: int) -> None:
        """Take the token that was sampled for the row; a forbidden one is a failure."""
        self.inner.consume_token(token)

    def replay(self, tokens: Iterable[int]) -> None:
        """Take the tokens that earlier attempts decoded."""
        self.inner.consume_tokens(list(tokens))

    @property
    def ended(self) -> bool:
        """Whether the grammar is satisfied and only the end can follow."""
        return self.inner.is_stopped() and not self.inner.is_error()

    @property
    def failure(self) -> str | None:
        """Why the grammar can't be followed any further, as one of llguidance's codes; else None.

        The code quotes no text: the row's own may be anything.
        """
        return self.inner.stop_reason() if self.inner.is_error() else None


class CompiledGrammar:
    """A compiled grammar; implements `interface.Grammar`."""

    def __init__(self, template: "LLMatcher", vocab_size: int) -> None:
        """Take a matcher at the grammar's start, only to copy it, and its tokenizer's width."""
        self._template = template
        self._mask_words = words_of(vocab_size)

    def start(self) -> Matcher:
        """Return a new row's position: the start."""
        return Matcher(self._template.deep_copy(), self._mask_words)


class BatchMasks:
    """The masks of one batch, rebuilt when its rows change."""

    def __init__(self, matchers: SequenceOf[Matcher | None], vocab_size: int) -> None:
        """Take each row's matcher in order, None without a grammar; and the model's width."""
        found = [(matcher, row) for row, matcher in enumerate(matchers) if matcher is not None]
        self._rows = [(matcher.inner, row) for matcher, row in found]
        self._words = words_of(vocab_size)
        # The tokenizer may know more ids than the model has.
        words = max(self._words, *(matcher.mask_words for matcher, _ in found))
        self._bitmask: NDArray[np.int32] = np.full(
            (len(matchers), words), ALLOW_ALL, dtype=np.int32
        )

    def start(self, sampled: SequenceOf[SampledToken]) -> "Future[mx.array]":
        """Pass the sampled tokens on to the matchers and compute the next masks, in a thread.

        Until the result is there, the caller must not use these rows' matchers.
        """
        return _masks_thread().submit(self._advance_and_compute, sampled)

    def _advance_and_compute(self, sampled: SequenceOf[SampledToken]) -> mx.array:
        advance_rows(sampled)
        return self.compute()

    def compute(self) -> mx.array:
        """Return the masks of the allowed next tokens: int32 [B, ceil(V / 32)].

        Rows are computed in parallel, with the GIL released. For a row whose grammar failed, only
        the end of sequence is allowed.
        """
        rows, words = self._bitmask.shape
        address = self._bitmask.ctypes.data
        _executor().unsafe_compute_mask_ptr(self._rows, address, words * 4, rows)
        return mx.array(self._bitmask[:, : self._words])


@cache
def _executor() -> "LLExecutor":
    """Return the threads that compute masks, made for the first constrained row.

    They use half of the cores: the engine's thread launches the forward pass meanwhile.
    """
    from llguidance import LLExecutor

    return LLExecutor(max(1, (os.cpu_count() or 2) // 2))


@cache
def _masks_thread() -> ThreadPoolExecutor:
    """Return the thread for masks: the engine's thread is busy launching the step meanwhile."""
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="masks")


def words_of(vocab_size: int) -> int:
    """Return how many 32-bit words hold one bit for each token."""
    return -(-vocab_size // BITS)


def advance_rows(sampled: Iterable[SampledToken]) -> None:
    """Pass sampled tokens on to the matchers of those rows that have one."""
    for row, token, _ in sampled:
        if row.matcher is not None and token != INVALID_TOKEN:
            row.matcher.advance(token)
