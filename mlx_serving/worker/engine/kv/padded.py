"""Makes, joins and measures mlx-lm's KV caches for a batch that rows join and leave.

Rows of a batch cache are right-justified: shorter rows are padded on the left to the longest.
"""

from copy import copy
from dataclasses import dataclass
from typing import Any, Final, Protocol, cast

import mlx.core as mx
from mlx_lm.models.cache import BatchKVCache, make_prompt_cache

GROWTH_TOKENS: Final[int] = BatchKVCache.step  # caches grow by blocks of this many tokens


class LanguageModel(Protocol):
    """An mlx-lm model: from tokens [B, T] and a cache for each layer to logits [B, T, V]."""

    def __call__(self, inputs: mx.array, cache: list[Any]) -> mx.array:
        """Run the forward pass; updates the caches in place."""


class UnsupportedModelError(ValueError):
    """This model can't be served in a continuous batch."""


@dataclass(frozen=True, slots=True)
class CacheCost:
    """Memory of a row: bytes for each token, and fixed bytes (recurrent states)."""

    bytes_per_token: int
    fixed_bytes: int
    vocab_size: int

    @property
    def overhead_tokens(self) -> int:
        """KV tokens that a row may hold beyond its own: one growth block and the fixed part."""
        return GROWTH_TOKENS + -(-self.fixed_bytes // self.bytes_per_token)


def new_cache(model: LanguageModel, rows: int) -> list[Any]:
    """Return an empty cache: mlx-lm's plain one for one row, a batch cache for several."""
    if rows == 1:
        return _plain_cache(model)
    return _merge([_plain_cache(model) for _ in range(rows)])


def forward_prompts(model: LanguageModel, contexts: list[list[int]], cache: list[Any]) -> None:
    """Compute the prompts' next tokens, padded on the right to the longest, into their cache."""
    lengths = [len(context) for context in contexts]
    padding = [max(lengths) - length for length in lengths]
    if any(padding):
        for layer in cache:
            layer.prepare(lengths=lengths, right_padding=padding)
    model(padded(contexts, max(lengths)), cache=cache)
    if any(padding):
        for layer in cache:
            layer.finalize()


def padded(contexts: list[list[int]], length: int) -> mx.array:
    """Return int32 [prompts, length], zeros on the right."""
    rows = [context + [0] * (length - len(context)) for context in contexts]
    return mx.array(rows, dtype=mx.int32)


def as_batch(cache: list[Any]) -> list[Any]:
    """Turn one row's plain cache into a batch cache of one row."""
    return _merge([cache])


def extended(cache: list[Any], other: list[Any]) -> list[Any]:
    """Return the rows of `cache`, then those of `other`; does not change `cache`."""
    layers: list[Any] = _twin(cache)
    for layer, joining in zip(layers, other, strict=True):
        layer.extend(joining)
    return layers


def _twin(part: Any) -> Any:  # noqa: ANN401 - layers of any kind, and parts of them
    """Return a copy on the same buffers: changing an array in place does not change the copy."""
    if isinstance(part, mx.array):
        return copy(part)
    if isinstance(part, list | tuple):
        return type(part)(map(_twin, part))
    if not hasattr(part, "extend"):
        return part
    twin = copy(part)
    vars(twin).update({name: _twin(held) for name, held in vars(part).items()})
    return twin


def keep_rows(cache: list[Any], rows: list[int], longest: int) -> None:
    """Keep only `rows` of the batch, in place; `longest` is the longest kept row, in tokens.

    mlx-lm's own `filter` reads each layer's padding back from the device, which waits for the
    running step for each layer. The host knows the lengths, so plain KV layers skip that.
    """
    indices = mx.array(rows, dtype=mx.int32)
    for layer in cache:
        if type(layer) is BatchKVCache:
            _keep_kv_rows(layer, indices, layer.size() - longest)
        elif hasattr(layer, "keep"):  # our own
            layer.keep(indices, layer.size() - longest)
        else:
            layer.filter(indices)


def _keep_kv_rows(layer: Any, indices: mx.array, unused: int) -> None:  # noqa: ANN401 - untyped
    """Do what `BatchKVCache.filter` does, with the common left padding given by the caller."""
    layer.offset = layer.offset[indices]
    layer.left_padding = layer.left_padding[indices] - unused
    if layer.keys is None:
        return
    layer.keys = layer.keys[indices][..., unused:, :]
    layer.values = layer.values[indices][..., unused:, :]
    layer._idx -= unused  # noqa: SLF001 - the cache offers no setter


def extract(model: LanguageModel, cache: list[Any], row: int | None) -> list[Any]:
    """Return a plain cache with a copy of one row of a batch; None: an empty one.

    Before its first step, a batch may have no arrays to take a row from.
    """
    if row is None:
        return _plain_cache(model)
    layers = [layer.extract(row) for layer in cache]
    mx.eval(states(layers))
    return layers


def states(cache: list[Any]) -> list[Any]:
    """Return the arrays to evaluate after a forward pass."""
    return [layer.state for layer in cache]


def measure(model: LanguageModel) -> CacheCost:
    """Measure the memory of a row from the shapes of two prefills that are never computed.

    Raises:
        UnsupportedModelError: a layer's cache can't join a batch, or the model takes no batch of
            rows of different lengths.
    """
    sizes = []
    vocab_size = 0
    for tokens in (GROWTH_TOKENS, 2 * GROWTH_TOKENS):
        cache = _plain_cache(model)
        logits = model(mx.zeros((1, tokens), dtype=mx.int32), cache=cache)
        vocab_size = logits.shape[-1]
        sizes.append(sum(layer.nbytes for layer in cache))
    _require_batching(_plain_cache(model))
    _require_ragged_rows(model)
    per_token = max(1, (sizes[1] - sizes[0]) // GROWTH_TOKENS)
    return CacheCost(per_token, max(0, sizes[0] - per_token * GROWTH_TOKENS), vocab_size)


def _plain_cache(model: LanguageModel) -> list[Any]:
    return list(make_prompt_cache(cast("Any", model)))


def _merge(caches: list[list[Any]]) -> list[Any]:
    return [layers[0].merge(list(layers)) for layers in zip(*caches, strict=True)]


def _require_batching(cache: list[Any]) -> None:
    for index, layer in enumerate(cache):
        parts = getattr(layer, "caches", (layer,))
        missing = [type(part).__name__ for part in parts if not hasattr(part, "merge")]
        if missing:
            message = (
                f"model: layer {index} keeps a {missing[0]}, which mlx-lm can't batch with history"
            )
            raise UnsupportedModelError(message)


def _require_ragged_rows(model: LanguageModel) -> None:
    """Build, and never compute, batches of rows of different lengths and their next step.

    Some of mlx-lm's models expect one offset for all rows (gpt_bigcode), or put a batch's mask on
    the wrong axis (gemma2). If that axis has the same size, it raises no error: so two batch sizes.
    """
    try:
        for rows in (3, 5):
            cache = new_cache(model, rows)
            forward_prompts(model, [[0]] + [[0, 0]] * (rows - 1), cache)
            model(mx.zeros((rows, 1), dtype=mx.int32), cache=cache)
    except (TypeError, ValueError) as error:
        name = getattr(model, "model_type", type(model).__name__)
        message = f"model: mlx-lm can't batch {name} with rows of different lengths: {error}"
        raise UnsupportedModelError(message) from error
