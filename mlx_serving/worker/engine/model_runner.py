"""The model on the device: prefills prompts and decodes the batch, one step ahead of the host.

The last token of a prompt is not prefilled: it enters the decode batch, and its logits there give
the row's first token. So lm_head never runs over a prompt, one sampler samples every token, and a
row's first token needs no forward pass of its own.

Pipelining: step t + 1 is launched on the sampled tokens of step t while they are still on the
device; then the host reads step t. A row that ended at t is taken out after the launch, and its
token of t + 1 is dropped.

If rows follow a grammar, t + 1 can't be sampled before the host has read t: the host reads t first.
Then the masks are computed while the forward pass is launched and the device works on it, and the
sampling is launched last.
"""

from collections.abc import Callable, Collection, Container, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, cast

import mlx.core as mx

from mlx_serving.common.queues import Lane
from mlx_serving.worker.engine.batch_runner import StepNotBuiltError
from mlx_serving.worker.engine.failures import LaunchedWorkError, beside_step, launched_work
from mlx_serving.worker.engine.interface import TokenLogprobs
from mlx_serving.worker.engine.kv import padded
from mlx_serving.worker.engine.kv.choice import CacheChoice, choose_cache
from mlx_serving.worker.engine.kv.interface import BlockCache, ParkedRow, Prefilled, Prompt
from mlx_serving.worker.engine.kv.padded import LanguageModel
from mlx_serving.worker.engine.kv.paged.pools import wait_for_launched
from mlx_serving.worker.engine.kv.prefix.cache import PrefixCache
from mlx_serving.worker.engine.memory.recovery import is_out_of_memory
from mlx_serving.worker.engine.row import Row, SampledToken
from mlx_serving.worker.engine.sampling.logprobs import read_logprobs
from mlx_serving.worker.engine.sampling.noise import token_words
from mlx_serving.worker.engine.sampling.parameters import Logprobs, RowSampling
from mlx_serving.worker.engine.sampling.reference import ReferenceDraw
from mlx_serving.worker.engine.sampling.sampler import BatchSampler, MakeDraw
from mlx_serving.worker.engine.scheduling.chunk import PrefillChunk
from mlx_serving.worker.engine.structured.masks import BatchMasks, Matcher, advance_rows

TRIM_EVERY_LAUNCHES: Final = 512  # freed buffers are given back to the system, as in mlx-lm

_LaunchLogprobs = tuple[list[Row], Logprobs] | None


@dataclass(frozen=True, slots=True)
class _PromptCache:
    """The cache of a chunk's prompts; `gathered`: it reads blocks of the decode batch's cache."""

    cache: list[Any]
    gathered: bool


class ModelRunner:
    """Owns the model, the caches of prompts being prefilled, the decode batch, and parked rows.

    Only one thread may call it: MLX binds unevaluated work to the thread that built it.
    """

    def __init__(self, model: LanguageModel, choice: CacheChoice | None = None) -> None:
        """Measure the model's cache; `choice` None: see `choose_cache`.

        Raises:
            UnsupportedModelError: a layer's cache can't join a batch.
        """
        self.choice = choose_cache(model) if choice is None else choice
        self.cost = self.choice.cost(model)
        self._model = model
        self._words = token_words(self.cost.vocab_size)
        mx.eval(self._words)
        self._prefills: dict[Lane, _PromptCache] = {}
        self._cache = self.choice.make()
        self._blocks = self._cache if isinstance(self._cache, BlockCache) else None
        self._rows: list[Row] = []
        self._parked: dict[Row, ParkedRow] = {}
        # Launch number (may be negative) at which the row's position was 0.
        self._origins: list[int] = []
        self._launches = 0
        self._last_launch = 0  # the launch that gives the last row its last token
        self._joined = 0  # rows at the end whose pending token was not sampled here
        self._pending = mx.array([], dtype=mx.int32)  # [B], the next step's input tokens
        self._make_draw: MakeDraw = ReferenceDraw
        self._sampler: BatchSampler | None = None  # None: rows changed
        self._batch_masks: BatchMasks | None = None  # the same
        self._constrained = False  # whether a row follows a grammar
        # Log probabilities of `_pending`, and the rows in the order of its launch.
        self._logprobs: _LaunchLogprobs = None
        self.on_launch: Callable[[], None] = lambda: None

    @property
    def logits_dtype(self) -> mx.Dtype:
        """The dtype of the model's logits; computes nothing."""
        token = mx.zeros((1, 1), dtype=mx.int32)
        return self._model(token, cache=padded.new_cache(self._model, 1)).dtype

    def use_sampler(self, make_draw: MakeDraw) -> None:
        """From the next launch on, sample by another implementation than the reference."""
        self._make_draw = make_draw
        self._sampler = None

    @property
    def kv_bytes(self) -> int:
        """Bytes of the decode batch's cache, of prompts being prefilled and of parked copies."""
        layers = [layer for prefill in self._prefills.values() for layer in prefill.cache]
        layers += [part for parked in self._parked.values() for part in parked.state]
        beside: int = sum(getattr(layer, "nbytes", 0) for layer in layers)  # blocks: in the cache
        return self._cache.nbytes + beside

    def shrink(self) -> None:
        """Give back memory that no row and no cached prefix uses."""
        self._cache.shrink()

    def reset(self) -> None:
        """Drop the decode batch and the prompt being prefilled, after a step that failed."""
        self._prefills, self._parked = {}, {}
        self._rows, self._origins, self._joined = [], [], 0
        self._pending, self._logprobs = mx.array([], dtype=mx.int32), None
        self._rows_changed()
        with suppress(LaunchedWorkError):  # the rest of the step may fail too
            wait_for_launched()
        self._cache.reset()
        mx.clear_cache()

    def limit_kv(self, tokens: int) -> None:
        """Limit the decode batch's cache, if it has limits."""
        self._cache.limit(tokens)

    def use_prefixes(self, prefixes: PrefixCache) -> None:
        """Let prompts begin with their cached prefixes; only for a cache of blocks."""
        self._block_cache.use_prefixes(prefixes)

    @property
    def _block_cache(self) -> BlockCache:
        """The cache, if it keeps blocks: only then are prefixes cached and steps mixed."""
        assert self._blocks is not None  # noqa: S101 - see above
        return self._blocks

    def prefill(self, chunk: PrefillChunk) -> None:
        """Compute one chunk; several prompts are padded on the right to the longest."""
        with beside_step(decoding=bool(self._rows)):
            self._compute(chunk)

    def _compute(self, chunk: PrefillChunk) -> None:
        if chunk.start == 0:
            self._prefills[chunk.lane] = self._begin_prefill(chunk)
        layers = self._prefills[chunk.lane].cache
        if chunk.length:
            end = chunk.start + chunk.length
            cached = chunk.leaders[0].prefill.cached_tokens
            contexts = [row.context(cached + chunk.start, cached + end) for row in chunk.leaders]
            self._cache.forward_prompts(contexts, layers)
        # Without decoding rows there is nothing to overlap with: wait, so that a step that returns
        # has done its work.
        evaluate = mx.async_eval if self._rows else mx.eval
        self.on_launch()
        evaluate(padded.states(layers))

    def _begin_prefill(self, chunk: PrefillChunk) -> _PromptCache:
        cached = chunk.leaders[0].prefill.cached_tokens
        if cached:
            blocks = [row.prefill.pinned_blocks for row in chunk.leaders]
            return _PromptCache(self._block_cache.gather(blocks, cached), gathered=True)
        return _PromptCache(self._cache.new_prompts(len(chunk.groups)), gathered=False)

    def drop_prefill(self, lane: Lane) -> None:
        """Forget the prompt being prefilled for a lane."""
        dropped = self._prefills.pop(lane, None)
        if dropped is not None and dropped.gathered:
            wait_for_launched()  # other rows may get the blocks that it reads now
        mx.clear_cache()

    def join(self, chunk: PrefillChunk) -> None:
        """Move the rows of the chunk that completed their prefill into the decode batch."""
        last_tokens = _last_tokens(chunk.rows)
        with beside_step(decoding=bool(self._rows)):
            self._join_cache(chunk)
        self._enter(chunk.rows, last_tokens)

    def _join_cache(self, chunk: PrefillChunk) -> None:
        leaders = chunk.leaders
        keys = [row.context_key for row in leaders]
        if chunk.mixed:
            contexts = [row.context(0, row.context_length) for row in leaders]
            prefills = [row.prefill for row in leaders]
            self._block_cache.enter(
                [
                    Prompt(context, key, prefill.cached_tokens, prefill.pinned_blocks)
                    for context, key, prefill in zip(contexts, keys, prefills, strict=True)
                ]
            )
        else:
            layers = self._prefills.pop(chunk.lane).cache
            lengths = [row.context_length for row in leaders]
            copies = [index for index, group in enumerate(chunk.groups) for _ in group]
            self._cache.join(Prefilled(layers, lengths, copies, keys))

    def _enter(self, joining: Collection[Row], last_tokens: mx.array) -> None:
        """Append rows that the cache has already."""
        self._rows += joining
        self._origins += [self._launches - row.decoded for row in joining]
        self._pending = mx.concatenate([self._pending, last_tokens])
        self._joined += len(joining)
        self._rows_changed()

    def remove(self, rows: Iterable[Row]) -> None:
        """See `BatchRunner.remove`."""
        leaving = set(rows)
        for row in leaving.intersection(self._parked):
            self._cache.release(self._parked.pop(row), None if row.failed else row.context_key)
        for index, row in enumerate(self._rows):
            if row in leaving:
                self._cache.remember(index, None if row.failed else row.context_key)
        self._take_out(leaving)

    def park(self, rows: Iterable[Row], keep: Container[Row]) -> list[SampledToken]:
        """Take rows out of the decode batch; return their tokens of the running step.

        Waits for the running step, so that the rows' last tokens are read and nothing uses their
        blocks. The keys and values of the rows in `keep` are kept, for `resume` or `remove`.
        """
        leaving = set(rows)
        launched = self._rows[: len(self._rows) - self._joined]
        with launched_work():
            found = self._read(launched, self._pending, self._logprobs, leaving)
        advance_rows(found)
        for index, row in enumerate(self._rows):
            if row in leaving and row in keep:
                self._parked[row] = self._cache.park(index)
        self._take_out(leaving.intersection(self._parked))
        self.remove(leaving.difference(self._parked))
        return found

    def resume(self, row: Row) -> None:
        """Put a parked row back into the decode batch."""
        last_token = _last_tokens([row])
        with beside_step(decoding=bool(self._rows)):
            self._cache.resume(self._parked[row])
        del self._parked[row]
        self._enter([row], last_token)

    def _take_out(self, leaving: set[Row]) -> None:
        kept = [index for index, row in enumerate(self._rows) if row not in leaving]
        if len(kept) == len(self._rows):
            return
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
        """Launch the next step and return the tokens of the one before it.

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
        sampled: list[Row],
        previous: mx.array,
        logprobs: _LaunchLogprobs,
        logits: mx.array | None,
    ) -> list[SampledToken]:
        """Decode a batch in which some rows follow a grammar; `logits` are not launched yet."""
        found = self._read(sampled, previous, logprobs)
        if logits is None:
            advance_rows(found)
        else:
            masks = self._masks().start(found)
            self.on_launch()
            mx.async_eval(logits)
            self._sample(logits, masks.result())
        return found

    def _read(
        self,
        sampled: list[Row],
        previous: mx.array,
        logprobs: _LaunchLogprobs,
        only: Container[Row] | None = None,
    ) -> list[SampledToken]:
        """Wait for the tokens and log probabilities of a launch; `only`: those of these rows."""
        wanted = [row for row in sampled if only is None or row in only]
        if not wanted:
            return []
        every = dict(zip(sampled, cast("list[int]", previous.tolist()), strict=False))
        tokens = {row: every[row] for row in wanted}
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
        """Build the step's logits, [B, V]; take the rows' sampling parameters as they are now.

        Operations that only a step after a change of rows has are launched by themselves. MLX
        caches what it launches in graphs of some 30 operations (on CUDA): one more operation in
        front of a step would shift all of them, and each graph would be built anew.
        """
        if self._sampler is None:
            mx.async_eval(self._pending)
        if self._sampler is None or self._sampler.needs_rebuild:
            self._sampler = BatchSampler(self._sampling(), self._words, self._make_draw)
        try:
            return self._cache.step(self._pending)
        except LaunchedWorkError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise StepNotBuiltError(type(error).__name__) from error

    def _sample(self, logits: mx.array, mask: mx.array | None = None) -> None:
        """Launch the step, sampling included."""
        assert self._sampler is not None  # noqa: S101 - `_forward` made it
        draws = self._sampler.sample(logits, self._pending, mask)
        self._pending = draws.tokens
        self._logprobs = (list(self._rows), draws.logprobs) if draws.logprobs else None
        self.on_launch()
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
                row.choice.index,
                self._launches - origin,
                row.history or (),
                len(row.request.prompt),
                masked=row.matcher is not None,
            )
            for origin, row in zip(self._origins, self._rows, strict=True)
        ]


def _last_tokens(rows: Iterable[Row]) -> mx.array:
    return mx.array([row.last_token for row in rows], dtype=mx.int32)


def _read_logprobs(
    tokens: dict[Row, int], rows: list[Row], logprobs: Logprobs
) -> dict[Row, TokenLogprobs]:
    """Read the log probabilities of those rows that asked; `rows` are in the launch's order."""
    asked = [
        (index, row, row.request.sampling.logprobs)
        for index, row in enumerate(rows)
        if row.request.sampling.logprobs is not None and row in tokens
    ]
    found = read_logprobs(logprobs, [(index, tokens[row], count) for index, row, count in asked])
    return dict(zip((row for _, row, _ in asked), found, strict=True))
