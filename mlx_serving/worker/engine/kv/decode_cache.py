"""The KV cache of the decode batch: what `ModelRunner` needs of one, and mlx-lm's own behind it.

`PaddedCache` keeps mlx-lm's batch caches: any kind of layer, every row padded to the longest, the
whole copied whenever rows join or leave. `paged.cache.PagedCache` follows live tokens and copies
nothing, for plain attention layers on a GPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx

from mlx_serving.worker.engine.kv import padded
from mlx_serving.worker.engine.kv.padded import LanguageModel
from mlx_serving.worker.engine.kv.prefix.cache import PrefixCache
from mlx_serving.worker.engine.kv.prefix.index import PrefixKey
from mlx_serving.worker.engine.kv.quantized import Quantization, quantized_layers


@dataclass(frozen=True, slots=True)
class Prefilled:
    """Prompts that were computed, and the rows that go on from them.

    `layers` are what `new_prompts` of the same cache gave. `lengths` are the prompts' tokens,
    `prompts` names each joining row's prompt. `keys` are what the prompts are found by in the
    prefix cache; what it knows of them is not read.
    """

    layers: list[Any]
    lengths: Sequence[int]
    prompts: Sequence[int]
    keys: Sequence[PrefixKey] = ()


@dataclass(frozen=True, slots=True)
class Prompt:
    """A row's context: `found` tokens of it are in the prefix cache's `blocks`, the rest nowhere.

    `key` is what it is found by.
    """

    context: list[int]
    key: PrefixKey
    found: int = 0
    blocks: Sequence[int] = ()


@dataclass(eq=False, slots=True)
class ParkedRow:
    """A row's `length` tokens outside the batch, for the cache that they are of.

    `state` is a plain cache a layer, or the ids of the row's blocks.
    """

    state: list[Any]
    length: int


class DecodeCache(Protocol):
    """The KV cache of every row that decodes, in the batch's order."""

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values, of places that no row uses too."""

    def limit(self, tokens: int) -> None:
        """Bound the cache; the scheduler admits within it."""

    def shrink(self) -> None:
        """Give back the memory of what no row and no known prefix uses."""

    def reset(self) -> None:
        """Drop every row and all that is known, whatever became of the last step."""

    def new_prompts(self, prompts: int) -> list[Any]:
        """Return what the model takes as its cache while it computes so many prompts."""

    def forward_prompts(self, contexts: list[list[int]], layers: list[Any]) -> None:
        """Build the computation of the prompts' next tokens into `layers` of `new_prompts`."""

    def join(self, prefilled: Prefilled) -> None:
        """Append rows; whatever it raises, all others are as they were."""

    def enter(self, prompts: Sequence[Prompt]) -> None:
        """Append a row a prompt, not computed yet: the next step does that beside its own work.

        Whatever it raises, all others are as they were.
        """

    def keep(self, kept: Sequence[int]) -> None:
        """Keep only these rows, in this order. A step that was launched with all may be running."""

    def step(self, tokens: mx.array) -> mx.array:
        """Build the model's step on one token a row, int32 [B]; returns logits [B, V]."""

    def settle(self) -> None:
        """Note that no step runs that was launched before the last call of `keep`."""

    def use_prefixes(self, prefixes: PrefixCache) -> None:
        """Take blocks from there, and let what rows leave be found again."""

    def gather(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[Any]:
        """Do as `new_prompts`, with so many tokens of each prompt taken from its known blocks."""

    def remember(self, row: int, key: PrefixKey | None) -> None:
        """Let a row that leaves be found by its tokens; None: and nothing that it alone used."""

    def park(self, row: int) -> ParkedRow:
        """Set aside what a row has; `keep` is called next, without it. No step may be running."""

    def resume(self, parked: ParkedRow) -> None:
        """Append a row that was set aside."""

    def release(self, parked: ParkedRow, key: PrefixKey | None) -> None:
        """Drop a row that was set aside; it may be found again, as `remember` says."""


class PaddedCache:
    """mlx-lm's batch caches: rows x longest row, of any kind that mlx-lm can batch."""

    def __init__(self, model: LanguageModel) -> None:
        """Start without rows."""
        self._model = model
        self._layers: list[Any] = []
        self._lengths: list[int] = []

    @property
    def nbytes(self) -> int:
        """See `DecodeCache`."""
        nbytes: int = sum(layer.nbytes for layer in self._layers)
        return nbytes

    def limit(self, tokens: int) -> None:
        """Do nothing: mlx-lm's caches hold what they are given."""

    def shrink(self) -> None:
        """Do nothing: what no row uses is gone already."""

    def reset(self) -> None:
        """See `DecodeCache`."""
        self._layers, self._lengths = [], []

    def new_prompts(self, prompts: int) -> list[Any]:
        """Return mlx-lm's plain caches for one prompt, batch caches for several."""
        return padded.new_cache(self._model, prompts)

    def forward_prompts(self, contexts: list[list[int]], layers: list[Any]) -> None:
        """Pad on the right to the longest; mlx-lm's batch caches then justify their rows."""
        padded.forward_prompts(self._model, contexts, layers)

    def join(self, prefilled: Prefilled) -> None:
        """Append rows; copies both caches."""
        layers = prefilled.layers
        if len(prefilled.lengths) == 1:
            layers = padded.as_batch(layers)
        if len(prefilled.prompts) > len(prefilled.lengths):
            padded.keep_rows(layers, list(prefilled.prompts), max(prefilled.lengths))
        self._layers = padded.extended(self._layers, layers) if self._lengths else layers
        self._lengths += [prefilled.lengths[prompt] for prompt in prefilled.prompts]

    def keep(self, kept: Sequence[int]) -> None:
        """Keep only these rows; copies what stays."""
        self._lengths = [self._lengths[row] for row in kept]
        if kept:
            padded.keep_rows(self._layers, list(kept), max(self._lengths))
        else:
            self._layers = []

    def step(self, tokens: mx.array) -> mx.array:
        """Build the model's step; mlx-lm's caches grow by themselves."""
        self._lengths = [length + 1 for length in self._lengths]
        return self._model(tokens[:, None], cache=self._layers)[:, -1]

    def settle(self) -> None:
        """Do nothing: arrays that a running step reads are kept by MLX."""

    def use_prefixes(self, prefixes: PrefixCache) -> None:
        """Refuse: there are no blocks."""
        raise NotImplementedError(type(self).__name__)

    def gather(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[Any]:
        """Refuse: there are no blocks."""
        raise NotImplementedError(type(self).__name__)

    def enter(self, prompts: Sequence[Prompt]) -> None:
        """Refuse: mlx-lm's caches take as many tokens of each row."""
        raise NotImplementedError(type(self).__name__)

    def remember(self, row: int, key: PrefixKey | None) -> None:
        """Do nothing: what leaves is dropped."""

    def park(self, row: int) -> ParkedRow:
        """Copy the row, so that nothing of the batch's arrays is kept alive."""
        length = self._lengths[row]
        layers = padded.extract(self._model, self._layers, row if length else None)
        return ParkedRow(layers, length)

    def resume(self, parked: ParkedRow) -> None:
        """Append the row; copies the batch."""
        self.join(Prefilled(parked.state, [parked.length], [0]))

    def release(self, parked: ParkedRow, key: PrefixKey | None) -> None:
        """Do nothing: the row's copy goes with it."""


class QuantizedCache(PaddedCache):
    """The same in few bits a value; see `quantized_cache`."""

    def __init__(self, model: LanguageModel, how: Quantization) -> None:
        """Start without rows."""
        super().__init__(model)
        self._how = how

    def new_prompts(self, prompts: int) -> list[Any]:
        """Return layers that are batches from the start."""
        return quantized_layers(self._model, prompts, self._how)

    def park(self, row: int) -> ParkedRow:
        """See `PaddedCache.park`."""
        if self._lengths[row]:
            return super().park(row)
        return ParkedRow(self.new_prompts(1), 0)
