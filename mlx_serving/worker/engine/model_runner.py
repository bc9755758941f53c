"""The model on the device: prefills prompts, decodes the batch, one step ahead of the host.

The last token of a prompt is not prefilled: it enters the decode batch, and its logits there
give the row's first token. So lm_head never runs over a prompt, the one sampler makes every
token, and a row's first token costs no forward pass beside the step its batch-mates do anyway.

Pipelining: step t + 1 is launched on the sampled tokens of step t while they are still on the
device; only then does the host read step t. A row that turns out to have ended at t is taken
out after the launch, and its token of t + 1 is dropped with it.

A batch with constrained rows can't sample t + 1 before the host has read t: there t is read
first. Then the masks are computed while the forward pass is launched and the device works on it,
and the sampling is launched at last.
"""

from collections.abc import Iterable
from typing import Any, Final, cast

import mlx.core as mx

from mlx_serving.worker.engine import kv_cache
from mlx_serving.worker.engine.cache_choice import CacheChoice, choose_cache
from mlx_serving.worker.engine.decode_cache import Prefilled
from mlx_serving.worker.engine.kv_cache import LanguageModel
from mlx_serving.worker.engine.prefix.cache import PrefixCache
from mlx_serving.worker.engine.sampling import (
    BatchSampler,
    Logprobs,
    MakeDraw,
    ReferenceDraw,
    RowSampling,
    read_logprobs,
    token_words,
)
from mlx_serving.worker.engine.scheduler import Group, PrefillChunk
from mlx_serving.worker.engine.sequence import SampledToken, Sequence, TokenLogprobs
from mlx_serving.worker.engine.structured_output import BatchMasks, Matcher, advance_rows

TRIM_EVERY_LAUNCHES: Final = 512  # freed buffers go back to the system, as in mlx-lm


_LaunchLogprobs = tuple[list[Sequence], Logprobs] | None


class ModelRunner:
    """Owns the model, the cache of the prompt being prefilled, and the decode batch.

    Only one thread may call it: MLX binds unevaluated work to the thread that built it.
    """

    def __init__(self, model: LanguageModel, choice: CacheChoice | None = None) -> None:
        """Measure the model's cache; `choice` None: the best that this device is proven to do.

        Raises:
            UnsupportedModelError: a layer's cache can't join a batch.
        """
        self.cost = kv_cache.measure(model)
        self.choice = choose_cache(model) if choice is None else choice
        self._model = model
        self._words = token_words(self.cost.vocab_size)
        mx.eval(self._words)
        self._prefill_cache: list[Any] = []
        self._gathered = False  # it reads blocks of the decode batch's cache
        self._cache = self.choice.make()
        self._rows: list[Sequence] = []
        # Launch number (may be negative) at which the row's position was 0.
        self._origins: list[int] = []
        self._launches = 0
        self._last_launch = 0  # the launch that gives the last row its last token
        self._joined = 0  # rows at the end whose pending token is not a sampled one
        self._pending = mx.array([], dtype=mx.int32)  # [B], what the next step takes in
        self._make_draw: MakeDraw = ReferenceDraw
        self._sampler: BatchSampler | None = None  # None: rows changed
        self._batch_masks: BatchMasks | None = None  # the same
        self._constrained = False  # whether some row follows a grammar
        # Log probabilities of `_pending`, and the rows as they stood at its launch.
        self._logprobs: _LaunchLogprobs = None

    @property
    def logits_dtype(self) -> mx.Dtype:
        """What the model's logits are; nothing is computed for it."""
        token = mx.zeros((1, 1), dtype=mx.int32)
        return self._model(token, cache=kv_cache.new_cache(self._model, 1)).dtype

    def use_sampler(self, make_draw: MakeDraw) -> None:
        """Sample by another implementation than the reference from the next launch on."""
        self._make_draw = make_draw
        self._sampler = None

    def limit_kv(self, tokens: int) -> None:
        """Bound what the decode batch's cache may hold, where it can tell."""
        self._cache.limit(tokens)

    def use_prefixes(self, prefixes: PrefixCache) -> None:
        """Let prompts begin with what `prefixes` knows of them; only for a cache of blocks."""
        self._cache.use_prefixes(prefixes)

    def prefill(self, chunk: PrefillChunk) -> None:
        """Compute one chunk; several prompts are padded on the right to the longest."""
        if chunk.start == 0:
            self._prefill_cache = self._begin_prefill(chunk)
        if chunk.length:
            end = chunk.start + chunk.length
            contexts = [
                row.context(row.found + chunk.start, row.found + end) for row in chunk.leaders
            ]
            self._cache.forward_prompts(contexts, self._prefill_cache)
        # With nothing to decode there is nothing to overlap with: wait, so that a step that
        # returns has done its work.
        evaluate = mx.async_eval if self._rows else mx.eval
        evaluate(kv_cache.states(self._prefill_cache))

    def _begin_prefill(self, chunk: PrefillChunk) -> list[Any]:
        found = chunk.leaders[0].found
        self._gathered = found > 0
        if self._gathered:
            return self._cache.gather([row.prefix for row in chunk.leaders], found)
        return self._cache.new_prompts(len(chunk.groups))

    def drop_prefill(self) -> None:
        """Forget the prompt being prefilled."""
        self._prefill_cache = []
        if self._gathered:
            mx.synchronize()  # the blocks that it reads may be given to others now

    def join(self, groups: Iterable[Group]) -> None:
        """Move the rows whose prefill is complete into the decode batch.

        `groups` are those of the chunk that completed it.
        """
        prompts = list(groups)
        joining = [row for group in prompts for row in group]
        layers, self._prefill_cache = self._prefill_cache, []
        lengths = [group[0].context_length for group in prompts]
        copies = [index for index, group in enumerate(prompts) for _ in group]
        keys = [group[0].context_key for group in prompts]
        self._cache.join(Prefilled(layers, lengths, copies, keys))
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
        for index, row in enumerate(self._rows):
            if row in leaving:
                self._cache.remember(index, None if row.failed else row.known_key)
        self._joined = sum(index >= len(self._rows) - self._joined for index in kept)
        self._rows = [self._rows[index] for index in kept]
        self._origins = [self._origins[index] for index in kept]
        self._cache.keep(kept)
        if kept:
            self._pending = self._pending[mx.array(kept, dtype=mx.int32)]
        else:
            self._pending = mx.array([], dtype=mx.int32)
            mx.clear_cache()
        self._rows_changed()

    def decode(self) -> list[SampledToken]:
        """Launch the next step and return the tokens of the one before it, row by row.

        A row that joined since the last call has no token yet.
        """
        if not self._rows:
            return []
        previous, logprobs = self._pending, self._logprobs
        sampled = self._rows[: len(self._rows) - self._joined]
        launching = self._launches < self._last_launch
        logits = self._forward() if launching else None
        if self._constrained:
            return self._decode_masked(sampled, previous, logprobs, logits)
        if logits is not None:
            self._sample(logits)
        return self._read(sampled, previous, logprobs)

    def _decode_masked(
        self,
        sampled: list[Sequence],
        previous: mx.array,
        logprobs: _LaunchLogprobs,
        logits: mx.array | None,
    ) -> list[SampledToken]:
        """Decode a batch in which some rows follow a grammar; `logits` are built, not launched."""
        found = self._read(sampled, previous, logprobs)
        if logits is None:
            advance_rows(found)
        else:
            masks = self._masks().start(found)
            mx.async_eval(logits)
            self._sample(logits, masks.result())
        return found

    def _read(
        self, sampled: list[Sequence], previous: mx.array, logprobs: _LaunchLogprobs
    ) -> list[SampledToken]:
        """Wait for the tokens of a launch, and for what goes with them."""
        if not sampled:
            return []
        tokens = dict(zip(sampled, cast("list[int]", previous.tolist()), strict=False))
        self._cache.settle()
        for row, token in tokens.items():
            if row.history is not None:
                row.history.append(token)
        reports = _read_logprobs(tokens, *logprobs) if logprobs else {}
        return [SampledToken(row, token, reports.get(row)) for row, token in tokens.items()]

    def _masks(self) -> BatchMasks:
        if self._batch_masks is None:
            matchers = [cast("Matcher | None", row.matcher) for row in self._rows]
            self._batch_masks = BatchMasks(matchers, self.cost.vocab_size)
        return self._batch_masks

    def _forward(self) -> mx.array:
        """Build the step's logits, [B, V]; the rows' sampling is read as it stands now.

        What only a step after a change of rows has is launched by itself. MLX keeps what it
        launched by its operations (CUDA graphs of some 30): one more in front of a step would
        shift them all, and each would be built anew.
        """
        if self._sampler is None:
            mx.async_eval(self._pending)
        if self._sampler is None or self._sampler.needs_rebuild:
            self._sampler = BatchSampler(self._sampling(), self._words, self._make_draw)
        return self._cache.step(self._pending)

    def _sample(self, logits: mx.array, mask: mx.array | None = None) -> None:
        """Launch the step."""
        assert self._sampler is not None  # noqa: S101 - `_forward` made it
        draws = self._sampler.sample(logits, self._pending, mask)
        self._pending = draws.tokens
        self._logprobs = (list(self._rows), draws.logprobs) if draws.logprobs else None
        mx.async_eval(draws.arrays)
        self._joined = 0
        self._launches += 1
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
            RowSampling(
                row.request.sampling,
                row.request.choice,
                self._launches - origin,
                row.history or (),
                len(row.request.prompt),
                masked=row.matcher is not None,
            )
            for origin, row in zip(self._origins, self._rows, strict=True)
        ]


def _read_logprobs(
    tokens: dict[Sequence, int], rows: list[Sequence], logprobs: Logprobs
) -> dict[Sequence, TokenLogprobs]:
    """Read the log probabilities of those `rows`, as they stood at the launch, that asked."""
    asked = [
        (index, row, row.request.sampling.logprobs)
        for index, row in enumerate(rows)
        if row.request.sampling.logprobs is not None and row in tokens
    ]
    found = read_logprobs(logprobs, [(index, tokens[row], count) for index, row, count in asked])
    return dict(zip((row for _, row, _ in asked), found, strict=True))
