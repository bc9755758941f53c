"""The operations of the paged cache in MLX: the kernels are checked against them."""

from collections.abc import Sequence

import mlx.core as mx

from mlx_serving.worker.engine.kv.paged.layers import PagedLayer, StepPlan, StoreEntry


class ReferenceOps:
    """Gathers every row's blocks for MLX's own attention: correct on any device, and slow."""

    in_place = False
    ordered_by_stream = True

    def store(
        self,
        layer: PagedLayer,
        keys: mx.array,
        values: mx.array,
        entries: Sequence[StoreEntry],
        after: mx.array,
    ) -> mx.array:
        """See `PagedOps.store`. Fills whole blocks; places after a prompt's end are never read."""
        size = layer.keys.shape[2]
        blocks = mx.array([entry.block for entry in entries])
        prompts = mx.array([[entry.prompt] for entry in entries])
        first = mx.array([[entry.first] for entry in entries])
        tokens = mx.minimum(first + mx.arange(size), keys.shape[2] - 1)
        for pool, source in ((layer.keys, keys), (layer.values, values)):
            picked = source.transpose(0, 2, 1, 3)[prompts, tokens]  # [E, block tokens, KVH, D]
            pool[blocks] = picked.transpose(0, 2, 1, 3)
        return after

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
        size = layer.keys.shape[2]
        blocks = mx.take_along_axis(plan.table, (plan.lengths // size)[:, None], axis=1)[:, 0]
        places = plan.lengths % size
        layer.keys[blocks, :, places] = keys[:, :, 0]
        layer.values[blocks, :, places] = values[:, :, 0]
        mask = mx.arange(plan.table.shape[1] * size) <= plan.lengths[:, None]
        return mx.fast.scaled_dot_product_attention(
            queries,
            _gather(layer.keys, plan.table),
            _gather(layer.values, plan.table),
            scale=scale,
            mask=mask[:, None, None],
        )


def _gather(pool: mx.array, table: mx.array) -> mx.array:
    """Return every row's tokens: [B, KVH, table width x block tokens, D]."""
    picked = pool[table].transpose(0, 2, 1, 3, 4)
    rows, heads, _, _, head_dim = picked.shape
    return picked.reshape(rows, heads, -1, head_dim)
