"""The paged cache's self-check: this model, on this device, against the reference and mlx-lm.

Rows with random keys and values join, decode and leave; one is so long that it is split into
several items of work. Then decode steps compute prompts. Every call of the operations is compared
with the reference in MLX, and the logits with those on mlx-lm's own batch caches.
"""

from collections.abc import Sequence
from typing import Any, Final, cast

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from mlx_serving.worker.engine.kv.interface import DecodeCache, Prefilled, Prompt
from mlx_serving.worker.engine.kv.padded import LanguageModel
from mlx_serving.worker.engine.kv.padded_cache import PaddedCache
from mlx_serving.worker.engine.kv.paged.cache import BLOCK_TOKENS, PagedCache
from mlx_serving.worker.engine.kv.paged.layers import (
    PagedLayer,
    PagedOps,
    StepPlan,
    StoreEntry,
)
from mlx_serving.worker.engine.kv.paged.pools import LayerShape
from mlx_serving.worker.engine.kv.paged.reference import ReferenceOps
from mlx_serving.worker.engine.kv.paged.step import SPLIT_ABOVE_TOKENS
from mlx_serving.worker.engine.kv.prefix.index import PrefixKey

# The largest difference, as a part of the norm: 16-bit types round in each layer.
_ATTENTION_TOLERANCE: Final = {mx.float32: 1e-3, mx.float16: 2e-3, mx.bfloat16: 1e-2}
_LOGITS_TOLERANCE: Final = {mx.float32: 5e-3, mx.float16: 0.03, mx.bfloat16: 0.1}
_LENGTHS: Final = (SPLIT_ABOVE_TOKENS + 5, 3, BLOCK_TOKENS)
_PROMPTS: Final = ([1, 2, 3, 4, 5], [6] * (BLOCK_TOKENS + 3))


class DifferenceError(RuntimeError):
    """An operation differs from its reference."""


class ComparedOps:
    """Runs operations beside their reference; raises `DifferenceError` if the two differ."""

    in_place = False  # a compiled step can't compare values

    def __init__(self, ops: PagedOps) -> None:
        self.ordered_by_stream = ops.ordered_by_stream
        self._ops = ops
        self._reference = ReferenceOps()

    def store(
        self,
        layer: PagedLayer,
        keys: mx.array,
        values: mx.array,
        entries: Sequence[StoreEntry],
        after: mx.array,
    ) -> mx.array:
        """See `PagedOps.store`."""
        twin = self._copy(layer)
        done = self._ops.store(layer, keys, values, entries, after)
        self._reference.store(twin, keys, values, entries, after)
        mx.eval(done, layer.keys, layer.values, twin.keys, twin.values)
        for entry in entries:
            for pool, expected in ((layer.keys, twin.keys), (layer.values, twin.values)):
                place = (entry.block, slice(None), slice(entry.count))
                if not mx.array_equal(pool[place], expected[place]).item():
                    message = "what it stores differs from the reference's"
                    raise DifferenceError(message)
        return done

    def attend(
        self,
        layer: PagedLayer,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scale: float,
        plan: StepPlan,
    ) -> mx.array:
        """See `PagedOps.attend`."""
        twin = self._copy(layer)
        out = self._ops.attend(layer, queries, keys, values, scale, plan)
        expected = self._reference.attend(twin, queries, keys, values, scale, plan)
        mx.eval(out, expected, layer.keys, layer.values, twin.keys, twin.values)
        if not distance(out, expected) <= _ATTENTION_TOLERANCE[queries.dtype]:
            message = f"its attention is {distance(out, expected):.2g} off the reference's"
            raise DifferenceError(message)
        pools = ((layer.keys, twin.keys), (layer.values, twin.values))
        if not all(mx.array_equal(pool, copy).item() for pool, copy in pools):
            message = "the keys and values it stores differ from the reference's"
            raise DifferenceError(message)
        return out

    def _copy(self, layer: PagedLayer) -> PagedLayer:
        # A sum, since a mere copy might share the buffer that a kernel writes to.
        twin = PagedLayer(self._reference, layer.keys + 0, layer.values + 0)
        mx.eval(twin.keys, twin.values)
        return twin


def distance(values: mx.array, expected: mx.array) -> float:
    """Return the norm of the difference over the norm of `expected`; NaN exceeds any bound."""
    wide = expected.astype(mx.float32)
    difference = mx.linalg.norm(values.astype(mx.float32) - wide)
    return cast("float", (difference / (mx.linalg.norm(wide) + 1e-9)).item())


def check(model: LanguageModel, shapes: Sequence[LayerShape], ops: PagedOps) -> str | None:
    """Return the first difference as text, or None."""
    try:
        _run(PagedCache(model, shapes, ComparedOps(ops)), shapes)
    except DifferenceError as error:
        return str(error)
    logits = _run(PagedCache(model, shapes, ops), shapes)
    far = distance(logits, _run(PaddedCache(model), shapes))
    if not far <= _LOGITS_TOLERANCE[shapes[0].dtype]:
        return f"the model's logits are {far:.2g} off those on mlx-lm's caches"
    return None


def _run(cache: DecodeCache, shapes: Sequence[LayerShape]) -> mx.array:
    """Let rows join one by one; then, twice, compute a prompt and let the first row leave.

    So one prompt is computed beside a long row and one beside short rows. Returns all logits,
    [logits, V].
    """
    logits: list[mx.array] = []

    def step(rows: int) -> None:
        logits.append(cache.step(mx.ones((rows,), dtype=mx.int32)))
        mx.eval(logits[-1])

    for rows, length in enumerate(_LENGTHS, start=1):
        cache.join(Prefilled(_random_layers(shapes, length), [length], [0]))
        step(rows)
        step(rows)
    for prompt in _PROMPTS:
        _compute(cache, prompt)
        step(len(_LENGTHS) + 1)
        cache.keep(range(1, len(_LENGTHS) + 1))
        step(len(_LENGTHS))
    return mx.concatenate(logits)


def _compute(cache: DecodeCache, prompt: list[int]) -> None:
    """Let a prompt join: computed by the next step, or before if the cache can't do that."""
    if isinstance(cache, PagedCache):
        cache.enter([Prompt(prompt, PrefixKey(b"", b""))])
        return
    layers = cache.new_prompts(1)
    cache.forward_prompts([prompt], layers)
    cache.join(Prefilled(layers, [len(prompt)], [0]))


def _random_layers(shapes: Sequence[LayerShape], length: int) -> list[Any]:
    """Return mlx-lm's plain caches that hold random keys and values, the same in each call."""
    layers = []
    for index, shape in enumerate(shapes):
        layer = KVCache()
        size = (1, shape.heads, length, shape.head_dim)
        random = [mx.random.normal(size, key=mx.random.key(2 * index + n)) for n in range(2)]
        layer.update_and_fetch(*(array.astype(shape.dtype) for array in random))
        layers.append(layer)
    return layers
