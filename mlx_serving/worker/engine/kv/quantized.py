"""A KV cache in few bits for a batch that rows join and leave.

mlx-lm's own quantised cache has no batches: its server decodes row by row with it. This cache is
laid out as mlx-lm's `BatchKVCache` (rows right-justified, padded on the left), in the form that
mlx-lm's attention takes for quantised layers: packed words, scales and biases of groups along the
head's dimension (`mx.quantize`). Prefill attends to the quantised form too, so that a row has the
same keys and values when it is computed again, resumed, alone or in another batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Self, cast

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import BatchKVCache, KVCache, dynamic_roll

from mlx_serving.worker.engine.kv import padded
from mlx_serving.worker.engine.kv.padded import LanguageModel, UnsupportedModelError

KvBits = Literal[4, 8]
GROUP_SIZES: Final = (64, 32)  # elements that share a scale; the larger one that fits
STEP_TOKENS: Final = BatchKVCache.step

Quantized = tuple[mx.array, mx.array, mx.array]


@dataclass(frozen=True, slots=True)
class Quantization:
    """How keys and values are quantised."""

    bits: KvBits
    group_size: int


class QuantizedBatchCache:
    """One layer's keys and values; replaces mlx-lm's `BatchKVCache`."""

    def __init__(self, rows: int, quantization: Quantization) -> None:
        """Start empty, with rows of no tokens."""
        self.bits, self.group_size = quantization.bits, quantization.group_size
        self.offset = mx.zeros((rows,), mx.int32)  # each row's tokens
        self.left_padding = mx.zeros((rows,), mx.int32)
        self._right_padding: mx.array | None = None
        self._parts: list[mx.array] = []  # of keys, then of values: each [B, KVH, T, n]
        self._end = 0  # tokens in use, padding included

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Quantized, Quantized]:
        """Append keys and values [B, KVH, T, D]; return all of them, quantised."""
        fresh = [*self._quantize(keys), *self._quantize(values)]
        begin, self._end = self._end, self._end + keys.shape[2]
        self._grow(fresh)
        for part, new in zip(self._parts, fresh, strict=True):
            part[..., begin : self._end, :] = new
        self.offset = self.offset + keys.shape[2]
        used = [part[..., : self._end, :] for part in self._parts]
        return (used[0], used[1], used[2]), (used[3], used[4], used[5])

    def _quantize(self, values: mx.array) -> Sequence[mx.array]:
        return mx.quantize(values, group_size=self.group_size, bits=self.bits)

    def _grow(self, fresh: list[mx.array]) -> None:
        room_before = self._parts[0].shape[2] if self._parts else 0
        missing = -(-(self._end - room_before) // STEP_TOKENS) * STEP_TOKENS
        if missing <= 0:
            return
        room = [mx.zeros((*p.shape[:2], missing, p.shape[3]), p.dtype) for p in fresh]
        if not room_before:
            self._parts = room
        else:
            pairs = zip(self._parts, room, strict=True)
            self._parts = [mx.concatenate(list(pair), axis=2) for pair in pairs]

    def make_mask(
        self,
        tokens: int,
        return_array: bool = False,  # noqa: FBT001, FBT002 - mlx-lm's signature
        window_size: int | None = None,
    ) -> mx.array:
        """Return bool [B, 1, tokens, T]: the tokens that each of the next tokens attends to."""
        del return_array
        mask: mx.array = create_causal_mask(
            tokens, offset=self._end, left_padding=self.left_padding, window_size=window_size
        )
        return mask

    def prepare(self, *, lengths: Sequence[int], right_padding: Sequence[int]) -> None:
        """Note that the next tokens are padded on the right."""
        del lengths
        self._right_padding = mx.array(list(right_padding), dtype=mx.int32)

    def finalize(self) -> None:
        """Turn padding on the right into padding on the left."""
        padding = self._right_padding
        assert padding is not None  # noqa: S101 - `prepare` was called
        self._parts = [dynamic_roll(part, padding[:, None], axis=2) for part in self._used()]
        self.offset = self.offset - padding
        self.left_padding = self.left_padding + padding
        self._right_padding = None

    def _used(self) -> list[mx.array]:
        return [part[..., : self._end, :] for part in self._parts]

    def extend(self, other: Self) -> None:
        """Append the other's rows."""
        end = max(self._end, other.size())
        if end:
            like = self._parts or other._parts
            pairs = zip(self._justified(end, like), other._justified(end, like), strict=True)
            self._parts = [mx.concatenate(list(pair), axis=0) for pair in pairs]
        paddings = [each.left_padding + (end - each.size()) for each in (self, other)]
        self.left_padding = mx.concatenate(paddings)
        self.offset = mx.concatenate([self.offset, other.offset])
        self._end = end

    def _justified(self, end: int, like: list[mx.array]) -> list[mx.array]:
        if not self._parts:  # rows of no tokens yet
            rows = self.offset.shape[0]
            return [mx.zeros((rows, p.shape[1], end, p.shape[3]), p.dtype) for p in like]
        widths = [(0, 0), (0, 0), (end - self._end, 0), (0, 0)]
        return [mx.pad(part, widths) if self._end < end else part for part in self._used()]

    def keep(self, rows: mx.array, unused: int) -> None:
        """Keep these rows, without `unused` places of padding that none of them needs."""
        self.offset = self.offset[rows]
        self.left_padding = self.left_padding[rows] - unused
        self._parts = [part[rows][..., unused:, :] for part in self._parts]
        self._end -= unused

    def extract(self, row: int) -> Self:
        """Return a copy of one row."""
        copy = type(self)(1, Quantization(self.bits, self.group_size))
        padding = cast("int", self.left_padding[row].item())
        copy.offset = self.offset[row : row + 1]
        used = [part[row : row + 1, :, padding : self._end] for part in self._parts]
        copy._hold([mx.contiguous(part) for part in used])  # noqa: SLF001 - its own kind
        return copy

    def _hold(self, parts: list[mx.array]) -> None:
        self._parts, self._end = parts, parts[0].shape[2]

    @classmethod
    def merge(cls, caches: Sequence[Self]) -> Self:
        """Return the only one: it is a batch already."""
        (only,) = caches
        return only

    def size(self) -> int:
        """Places in use, padding included."""
        return self._end

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self._parts)

    @property
    def state(self) -> list[mx.array]:
        """The arrays to evaluate."""
        return [*self._parts, self.offset, self.left_padding]


def quantized_layers(model: LanguageModel, rows: int, how: Quantization) -> list[Any]:
    """Return an empty cache for each layer."""
    return [QuantizedBatchCache(rows, how) for _ in padded.new_cache(model, 1)]


def quantization_of(model: LanguageModel, bits: KvBits) -> Quantization:
    """Return how this model's keys and values can be kept in so many bits.

    Raises:
        UnsupportedModelError: a layer has no plain keys and values, no group size divides the
            heads, or the attention takes no quantised cache.
    """
    cache = padded.new_cache(model, 1)
    for index, layer in enumerate(cache):
        if type(layer) is not KVCache:
            kind = type(layer).__name__
            message = f"cache.bits: layer {index} keeps a {kind}: not possible in {bits} bits"
            raise UnsupportedModelError(message)
    model(mx.zeros((1, 2), dtype=mx.int32), cache=cache)  # built, never computed
    sizes = {part.shape[-1] for layer in cache for part in (layer.keys, layer.values)}
    group = next((g for g in GROUP_SIZES if all(size % g == 0 for size in sizes)), None)
    if group is None:
        message = f"cache.bits: heads of {max(sizes)} can't be kept in groups of {GROUP_SIZES[-1]}"
        raise UnsupportedModelError(message)
    how = Quantization(bits, group)
    try:
        model(mx.zeros((2, 1), dtype=mx.int32), cache=quantized_layers(model, 2, how))
    except (TypeError, ValueError, AttributeError) as error:
        message = f"cache.bits: the model's attention takes no quantised cache: {error}"
        raise UnsupportedModelError(message) from error
    return how


def bytes_per_token(model: LanguageModel, how: Quantization) -> int:
    """Return the bytes of one token; computes nothing."""
    layers = quantized_layers(model, 1, how)
    model(mx.zeros((1, STEP_TOKENS), dtype=mx.int32), cache=layers)
    return int(sum(layer.nbytes for layer in layers)) // STEP_TOKENS
