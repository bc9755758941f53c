"""Attention of mlx-lm's models on a paged cache.

mlx-lm's model modules import `scaled_dot_product_attention` by name, so it is replaced in the
modules that define a model's layers. With any other cache, mlx-lm's own function is called.
"""

import sys
from typing import Any, Final

import mlx.core as mx
from mlx_lm.models import base

from mlx_serving.worker.engine.kv.paged.layers import PagedLayer

NAME: Final = "scaled_dot_product_attention"
_original = base.scaled_dot_product_attention


def attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,  # noqa: ANN401 - any cache of mlx-lm's models
    scale: float,
    mask: Any,  # noqa: ANN401 - array, "causal" or None
    sinks: mx.array | None = None,
) -> mx.array:
    """Attend as `mlx_lm.models.base.scaled_dot_product_attention` does.

    Raises:
        ValueError: a paged cache gets a mask or sinks.
    """
    if not isinstance(cache, PagedLayer):
        return _original(queries, keys, values, cache, scale, mask, sinks)
    if mask is not None or sinks is not None:
        message = "a paged cache knows neither masks nor sinks"
        raise ValueError(message)
    return cache.attend(queries, keys, values, scale)


def install(model: Any) -> bool:  # noqa: ANN401 - a model of mlx-lm
    """Replace attention in the modules of the model's layers; return whether any has it."""
    modules = {type(part).__module__ for part in model.modules()}
    found = False
    for name in modules:
        module = sys.modules[name]
        if getattr(module, NAME, None) in (_original, attention):
            setattr(module, NAME, attention)
            found = True
    return found
