"""Projections of one input as one product: q, k and v of attention, gate and up of an MLP.

A decode step is bound by the number of operations, not by their size. Sibling layers keep their
names and places in the model; each is a part of a shared product, which is computed when the first
of them is called, and split for all. Their weights are stored once, in a joined layer beside them
(`fused_q_proj_k_proj_v_proj`), which is a part of the module tree as any other layer.
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
    """The outputs of a joined layer, split for the siblings that it replaces."""

    def __init__(self, layer: Module, sizes: Sequence[int]) -> None:
        """Take the joined layer and the number of outputs of each sibling, in order."""
        self._layer = layer
        self._ends = [sum(sizes[: index + 1]) for index in range(len(sizes) - 1)]
        self._input: mx.array | None = None
        self._parts: dict[int, mx.array] = {}

    def part(self, index: int, inputs: mx.array) -> mx.array:
        """Return one sibling's output; keep those of the others until they are called."""
        if self._input is not inputs or index not in self._parts:
            self._input = inputs
            self._parts = dict(enumerate(mx.split(self._layer(inputs), self._ends, axis=-1)))
        taken = self._parts.pop(index)
        if not self._parts:
            self._input = None
        return taken


class Part(Module):
    """A sibling in its old place; it has no weights of its own."""

    def __init__(self, product: Product, index: int) -> None:
        super().__init__()
        self._product = product
        self._index = index

    def __call__(self, inputs: mx.array) -> mx.array:
        """Compute what the layer in this place computed."""
        return self._product.part(self._index, inputs)


def fuse(model: Any) -> int:  # noqa: ANN401 - a model of mlx-lm
    """Join sibling layers of a model, in place; returns the number of products.

    Siblings are joined if all are plain or quantised linear layers of one kind.
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
    setattr(parent, f"fused_{'_'.join(names)}", joined)
    for index, name in enumerate(names):
        setattr(parent, name, Part(product, index))
    mx.eval(joined.parameters())
    return True


def _joined(layers: Sequence[Any]) -> Module | None:
    """Return one layer with the outputs of all, or None if they are not of one kind."""
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
    """Return what joined layers have in common: class, quantisation, parameter types, inputs."""
    arrays = layer.parameters()
    quantization = tuple(getattr(layer, name, None) for name in _QUANTIZATION)
    shapes = tuple((name, array.dtype, array.shape[1:]) for name, array in sorted(arrays.items()))
    return type(layer), quantization, shapes
