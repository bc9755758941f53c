"""Projections of one input as one product: q, k and v of attention, gate and up of an MLP.

At decode a step is bound by the number of operations, not by their size. Sibling layers keep
their names and places in the model; each is a part of a shared product, which is computed when
the first of them is called and cut for all. Their weights are stored once, in the product.
"""

from collections.abc import Iterator, Sequence
from copy import copy
from typing import Any, Final

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.nn.layers.linear import Linear
from mlx.nn.layers.quantized import QuantizedLinear

SIBLINGS: Final = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_QUANTIZATION: Final = ("group_size", "bits", "mode")


class Product:
    """One layer that stands for several which take the same input."""

    def __init__(self, layer: Module, sizes: Sequence[int]) -> None:
        """Take the joined layer and how many of its outputs each sibling has, in order."""
        self._layer = layer
        self._ends = [sum(sizes[: index + 1]) for index in range(len(sizes) - 1)]
        self._input: mx.array | None = None
        self._parts: dict[int, mx.array] = {}

    def part(self, index: int, inputs: mx.array) -> mx.array:
        """Return one sibling's output; keeps the others' until they are asked for."""
        if self._input is not inputs or index not in self._parts:
            self._input = inputs
            self._parts = dict(enumerate(mx.split(self._layer(inputs), self._ends, axis=-1)))
        taken = self._parts.pop(index)
        if not self._parts:
            self._input = None
        return taken


class Part(Module):
    """A sibling in its old place."""

    def __init__(self, product: Product, index: int) -> None:
        super().__init__()
        self._product = product
        self._index = index

    def __call__(self, inputs: mx.array) -> mx.array:
        """Compute what the layer in this place computed."""
        return self._product.part(self._index, inputs)


def fuse(model: Any) -> int:  # noqa: ANN401 - a model of mlx-lm
    """Join sibling layers of a model, in place; returns how many products there are.

    A group is joined where all its layers are plain or quantised linear ones of one kind.
    """
    return sum(_join(parent, names) for parent, names in list(_groups(model)))


def _groups(model: Any) -> Iterator[tuple[Module, tuple[str, ...]]]:  # noqa: ANN401
    for parent in model.modules():
        for names in SIBLINGS:
            if all(name in parent for name in names):
                yield parent, names


def _join(parent: Module, names: tuple[str, ...]) -> bool:
    layers = [parent[name] for name in names]
    joined = _joined(layers)
    if joined is None:
        return False
    product = Product(joined, [layer.weight.shape[0] for layer in layers])
    for index, name in enumerate(names):
        setattr(parent, name, Part(product, index))
    mx.eval(joined.parameters())
    return True


def _joined(layers: Sequence[Any]) -> Module | None:
    """Return one layer with the outputs of all, or None where they are not of one kind."""
    first = layers[0]
    if type(first) not in (Linear, QuantizedLinear):
        return None
    if any(_kind(layer) != _kind(first) for layer in layers):
        return None
    joined: Module = copy(first)
    for name in first.parameters():
        setattr(joined, name, mx.concatenate([layer[name] for layer in layers]))
    return joined


def _kind(layer: Any) -> tuple[Any, ...]:  # noqa: ANN401 - any module
    """Return what layers must have in common: class, quantisation, parameters' types and inputs."""
    arrays = layer.parameters()
    quantization = tuple(getattr(layer, name, None) for name in _QUANTIZATION)
    shapes = tuple((name, array.dtype, array.shape[1:]) for name, array in sorted(arrays.items()))
    return type(layer), quantization, shapes
