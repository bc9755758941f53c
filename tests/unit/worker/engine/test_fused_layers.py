"""Sibling layers as one product: the same outputs, each weight once."""

from typing import Any, cast

import mlx.core as mx
import pytest
from mlx.nn.layers.base import Module
from mlx.nn.layers.linear import Linear
from mlx.nn.layers.quantized import quantize
from mlx.utils import tree_flatten

from benchmarks.lib.synthetic import build_model
from mlx_serving.worker.engine.fused_layers import fuse
from tests.support.engine_support import drive, greedy_by_mlx_lm, random_requests, tiny_engine


class Attention(Module):
    def __init__(self, *, bias: bool = False, odd: bool = False) -> None:
        super().__init__()
        self.q_proj = Linear(64, 96, bias=bias)
        self.k_proj = Linear(64, 32, bias=bias)
        self.v_proj = Linear(64, 32, bias=bias or odd)

    def __call__(self, x: mx.array) -> list[mx.array]:
        return [self.q_proj(x), self.k_proj(x), self.v_proj(x)]


def close(left: list[mx.array], right: list[mx.array]) -> bool:
    return all(
        bool(mx.allclose(a, b, rtol=1e-5, atol=1e-5).item())
        for a, b in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bits", [0, 4])
def test_outputs_are_the_same(*, bias: bool, bits: int) -> None:
    layer = Attention(bias=bias)
    if bits:
        quantize(layer, group_size=32, bits=bits)
    inputs = mx.random.normal((3, 2, 64), key=mx.random.key(1))
    expected = layer(inputs)
    mx.eval(expected)
    assert fuse(layer) == 1
    assert close(layer(inputs), expected)
    assert close(layer(inputs), expected), "the same input again"
    other = inputs + 1
    assert not close(layer(other), expected), "another input"


def test_a_sibling_that_is_called_alone_or_twice() -> None:
    layer = Attention()
    inputs = mx.random.normal((3, 64), key=mx.random.key(1))
    expected = layer(inputs)
    mx.eval(expected)
    fuse(layer)
    assert close([layer.k_proj(inputs), layer.k_proj(inputs)], [expected[1]] * 2)
    assert close(layer(inputs), expected)


def test_nothing_of_a_step_is_kept() -> None:
    layer = Attention()
    fuse(layer)
    layer(mx.zeros((1, 64)))
    product = layer.q_proj._product
    assert product._input is None
    assert not product._parts


def test_layers_of_different_kinds_stay_apart() -> None:
    layer = Attention(odd=True)
    assert fuse(layer) == 0
    assert type(layer.q_proj) is Linear


def test_a_model_gives_the_same_tokens() -> None:
    plain, fused = build_model(), build_model()
    count = fuse(fused)
    assert count == 2 * len(cast("Any", fused).layers)
    requests = random_requests(6, seed=9)
    assert drive(tiny_engine(fused), requests) == drive(tiny_engine(plain), requests)


def test_a_quantised_model_is_joined_paged_and_gives_mlx_lms_tokens() -> None:
    model = build_model()
    quantize(cast("Any", model), group_size=32, bits=4)
    requests = random_requests(6, seed=9)
    expected = [greedy_by_mlx_lm(model, r.prompt, r.max_tokens) for r in requests]
    assert fuse(model) == 2 * len(cast("Any", model).layers)
    collected = drive(tiny_engine(model, paged=True), requests)
    assert [collected[r.id].token_ids for r in requests] == expected


def parameter_bytes(model: Any) -> int:
    return sum(array.nbytes for _, array in cast("Any", tree_flatten(model.parameters())))


def test_every_weight_is_stored_once() -> None:
    model = cast("Any", build_model())
    before = parameter_bytes(model)
    fuse(model)
    names = [type(part).__name__ for part in model.layers[0].modules()]
    assert names.count("Part") == 5
    assert parameter_bytes(model) == before, "and all of them are the model's parameters"
