"""The model on the device: prefills prompts, decodes the batch, one step ahead of the host.

The last token of a prompt is not prefilled: it enters the decode batch, and its logits there
give the row's first token. So lm_head never runs over a prompt, the one sampler makes every
token, and a row's first token costs no forward pass beside the step its batch-mates do anyway.

Pipelining: step t + 1 is launched on the sampled tokens of step t while they are still on the
device; only then does the host read step t. A row that turns out to have ended at t is taken
out after the launch, and its token of t + 1 is dropped with it.

A batch with constrained rows can't sample t + 1 before the host has read t: there the forward
pass is launched, t is read and the masks are computed while the device works, then the sampling
is launched.
"""

from collections.abc import Callable, Iterable
from typing import Any, Final, cast

import mlx.core as mx

from mlx_serving.worker.engine import kv_cache
from mlx_serving.worker.engine.kv_cache import LanguageModel
from mlx_serving.worker.engine.sampling import BatchSampler, RowSampling, token_words
from mlx_serving.worker.engine.scheduler import PrefillChunk
from mlx_serving.worker.engine.sequence import Sequence
from mlx_serving.worker.engine.structured_output import (
    BatchMasks,
    Matcher,
    advance_rows,
    apply_bitmask,
)

TRIM_EVERY_LAUNCHES: Final = 512  # freed buffers go back to the system, as in mlx-lm


class ModelRunner:
    """Owns the model, the cache of the prompt being prefilled, and the decode batch.

    Only one thread may call it: MLX binds unevaluated work to the thread that built it.
    """

    def __init__(self, model: LanguageModel) -> None:
        """Measure the model's cache.

        Raises:
            UnsupportedModelError: a layer's cache can't join a batch.
        """
        self.cost = kv_cache.measure(model)
        self._model = model
        self._words = token_words(self.cost.vocab_size)
        mx.eval(self._words)
        self._prefill_cache: list[Any] = []
        self._cache: list[Any] = []
        self._rows: list[Sequence] = []
        # Launch number (may be negative) at which the row's position was 0.
        self._origins: list[int] = []
        self._launches = 0
        self._last_launch = 0  # the launch that gives the last row its last token
        self._joined = 0  # rows at the end whose pending token is not a sampled one
        self._pending = mx.array([], dtype=mx.int32)  # [B], what the next step takes in
        self._sampler: Callable[[mx.array], mx.array] | None = None  # None: rows changed
        self._batch_masks: BatchMasks | None = None  # the same
        self._constrained = False  # whether some row follows a grammar

    def prefill(self, chunk: PrefillChunk) -> None:
        """Compute one chunk; rows of several prompts are padded on the right to the longest."""
        if chunk.start == 0:
            self._prefill_cache = kv_cache.new_cache(self._model, len(chunk.rows))
        if chunk.length:
            self._forward_prompts(chunk)
        if chunk.completes and len(chunk.rows) == 1:
            self._prefill_cache = kv_cache.as_batch(self._prefill_cache)
        # With nothing to decode there is nothing to overlap with: wait, so that a step that
        # returns has done its work.
        evaluate = mx.async_eval if self._rows else mx.eval
        evaluate(kv_cache.states(self._prefill_cache))

    def _forward_prompts(self, chunk: PrefillChunk) -> None:
        contexts = [row.context(chunk.start, chunk.start + chunk.length) for row in chunk.rows]
        lengths = [len(context) for context in contexts]
        padding = [chunk.length - length for length in lengths]
        padded = any(padding)
        if padded:
            contexts = [c + [0] * pad for c, pad in zip(contexts, padding, strict=True)]
            for layer in self._prefill_cache:
                layer.prepare(lengths=lengths, right_padding=padding)
        self._model(mx.array(contexts, dtype=mx.int32), cache=self._prefill_cache)
        if padded:
            for layer in self._prefill_cache:
                layer.finalize()

    def drop_prefill(self) -> None:
        """Forget the prompt being prefilled."""
        self._prefill_cache = []

    def join(self, rows: Iterable[Sequence]) -> None:
        """Move the rows whose prefill is complete into the decode batch."""
        joining = list(rows)
        cache, self._prefill_cache = self._prefill_cache, []
        if self._rows:
            kv_cache.extend(self._cache, cache)
        else:
            self._cache = cache
        self._rows += joining
        self._origins += [self._launches - len(row.request.committed) for row in joining]
        last_tokens = mx.array([row.last_token for row in joining], dtype=mx.int32)
        self._pending = mx.concatenate([self._pending, last_tokens])
        self._joined += len(joining)
        self._rows_changed()

    def remove(self, rows: Iterable[Sequence]) -> None:
        """Take rows out of the decode batch; rows that are not in it are ignored."""
        leaving = set(rows)
        kept = [index for index, row in enumerate(self._rows) if row not in leaving]
        if len(kept) == len(self._rows):
            return
        self._joined = sum(index >= len(self._rows) - self._joined for index in kept)
        self._rows = [self._rows[index] for index in kept]
        self._origins = [self._origins[index] for index in kept]
        if kept:
            kv_cache.keep_rows(self._cache, kept, max(self._lengths()))
            self._pending = self._pending[mx.array(kept, dtype=mx.int32)]
        else:
            self._cache = []
            self._pending = mx.array([], dtype=mx.int32)
            mx.clear_cache()
        self._rows_changed()

    def decode(self) -> list[tuple[Sequence, int]]:
        """Launch the next step and return the tokens of the one before it, row by row.

        `INVALID_TOKEN` says that the row's logits were not usable. A row
        that joined since the last call has no token yet.
        """
        if not self._rows:
            return []
        previous = self._pending
        sampled = self._rows[: len(self._rows) - self._joined]
        launching = self._launches < self._last_launch
        if self._constrained:
            return self._decode_masked(previous, sampled, launching=launching)
        if launching:
            self._sample(self._forward())
        return _pairs(sampled, previous)

    def _decode_masked(
        self, previous: mx.array, sampled: list[Sequence], *, launching: bool
    ) -> list[tuple[Sequence, int]]:
        """Decode a batch in which some rows follow a grammar."""
        logits = None
        if launching:
            logits = self._forward()
            mx.async_eval(logits)
        pairs = _pairs(sampled, previous)
        advance_rows(pairs)
        if logits is not None:
            self._sample(apply_bitmask(logits, self._masks().compute()))
        return pairs

    def _masks(self) -> BatchMasks:
        if self._batch_masks is None:
            matchers = [cast("Matcher | None", row.matcher) for row in self._rows]
            self._batch_masks = BatchMasks(matchers, self.cost.vocab_size)
        return self._batch_masks

    def _forward(self) -> mx.array:
        """Launch nothing yet: the logits of the next token, [B, V], and the caches moved on."""
        if self._sampler is None:
            self._sampler = BatchSampler(self._sampling(), self._words)
        logits = self._model(self._pending[:, None], cache=self._cache)
        self._joined = 0
        self._launches += 1
        return logits[:, -1]

    def _sample(self, logits: mx.array) -> None:
        assert self._sampler is not None  # noqa: S101 - `_forward` made it
        self._pending = self._sampler(logits)
        mx.async_eval(self._pending)
        if self._launches % TRIM_EVERY_LAUNCHES == 0:
            mx.clear_cache()

    def _rows_changed(self) -> None:
        self._sampler = self._batch_masks = None
        self._constrained = any(row.matcher is not None for row in self._rows)
        ends = zip(self._origins, self._rows, strict=True)
        self._last_launch = max(
            (origin + row.request.max_tokens for origin, row in ends), default=0
        )

    def _sampling(self) -> list[RowSampling]:
        return [
            RowSampling(row.request.sampling, row.request.choice, self._launches - origin)
            for origin, row in zip(self._origins, self._rows, strict=True)
        ]

    def _lengths(self) -> list[int]:
        """Tokens of each row in the KV cache."""
        return [
            len(row.request.prompt) - 1 + self._launches - origin
            for origin, row in zip(self._origins, self._rows, strict=True)
        ]


def _pairs(rows: list[Sequence], tokens: mx.array) -> list[tuple[Sequence, int]]:
    """Read the tokens; rows at the end that have none yet are left out."""
    if not rows:
        return []
    return list(zip(rows, cast("list[int]", tokens.tolist()), strict=False))
