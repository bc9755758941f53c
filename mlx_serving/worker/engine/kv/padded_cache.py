"""The padded KV cache of the decode batch: mlx-lm's own batch caches, or the same in few bits."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from mlx_serving.worker.engine.kv import padded
from mlx_serving.worker.engine.kv.interface import ParkedRow, Prefilled
from mlx_serving.worker.engine.kv.padded import LanguageModel
from mlx_serving.worker.engine.kv.prefix.index import PrefixKey
from mlx_serving.worker.engine.kv.quantized import Quantization, quantized_layers


class PaddedCache:
    """mlx-lm's batch caches: rows x longest row; implements `interface.DecodeCache`."""

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
        """Do nothing: mlx-lm's caches have no limit."""

    def shrink(self) -> None:
        """Do nothing: there is no unused memory."""

    def reset(self) -> None:
        """See `DecodeCache`."""
        self._layers, self._lengths = [], []

    def new_prompts(self, prompts: int) -> list[Any]:
        """Return mlx-lm's plain caches for one prompt, batch caches for several."""
        return padded.new_cache(self._model, prompts)

    def forward_prompts(self, contexts: list[list[int]], layers: list[Any]) -> None:
        """Pad on the right to the longest; mlx-lm's batch caches then right-justify their rows."""
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
        """Keep only these rows; copies them."""
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
        """Do nothing: MLX keeps the arrays that a running step reads."""

    def remember(self, row: int, key: PrefixKey | None) -> None:
        """Do nothing: no prefix is cached."""

    def park(self, row: int) -> ParkedRow:
        """Copy the row, so that the batch's arrays are not kept alive."""
        length = self._lengths[row]
        layers = padded.extract(self._model, self._layers, row if length else None)
        return ParkedRow(layers, length)

    def resume(self, parked: ParkedRow) -> None:
        """Append the row; copies the batch."""
        self.join(Prefilled(parked.state, [parked.length], [0]))

    def release(self, parked: ParkedRow, key: PrefixKey | None) -> None:
        """Do nothing: the row's copy is freed with `parked`."""


class QuantizedCache(PaddedCache):
    """The same with few bits a value; see `quantized`."""

    def __init__(self, model: LanguageModel, how: Quantization) -> None:
        """Start without rows."""
        super().__init__(model)
        self._how = how

    def new_prompts(self, prompts: int) -> list[Any]:
        """Return batch caches, also for one prompt."""
        return quantized_layers(self._model, prompts, self._how)

    def park(self, row: int) -> ParkedRow:
        """See `PaddedCache.park`."""
        if self._lengths[row]:
            return super().park(row)
        return ParkedRow(self.new_prompts(1), 0)
