"""The kernels of the paged cache: `native/kernels/paged/`, in the dialect of this device.

They write to the pools in place. For MLX the pools are only inputs, so it never copies them. To run
after a write, an operation takes an output of the kernel that writes.
"""

from collections.abc import Sequence
from typing import Any, Final

import mlx.core as mx

from mlx_serving.worker.engine.kernels import Dialect, make_kernel, read_source
from mlx_serving.worker.engine.kv.paged.layers import PagedLayer, StepPlan, StoreEntry

THREADS: Final = 128  # of a thread block; the same constant stands in the kernels
LARGEST_HEAD: Final = 256
_SUFFIXES: Final[dict[Dialect, str]] = {"cuda": "cu", "metal": "metal"}


def team_lanes(head_dim: int) -> int:
    """Return the number of threads that share one token's head."""
    if head_dim <= 96:  # noqa: PLR2004
        return 8
    return 16 if head_dim <= 128 else 32  # noqa: PLR2004


def head_tile(heads_per_kv_head: int, head_dim: int) -> int:
    """Return how many query heads a thread block computes, as its registers and memory allow."""
    most = min(8, 1024 // head_dim) if head_dim // team_lanes(head_dim) <= 8 else 4  # noqa: PLR2004
    return max(n for n in range(1, most + 1) if heads_per_kv_head % n == 0)


def supports(head_dim: int) -> bool:
    """Say whether the kernels support heads of this size."""
    return head_dim <= LARGEST_HEAD and head_dim % team_lanes(head_dim) == 0


def kernel_source(name: str, language: Dialect) -> str:
    """Return the text of `name` in a dialect."""
    return read_source("paged", f"{name}.{_SUFFIXES[language]}")


def _make(
    name: str, arrays: tuple[list[str], list[str]], language: Dialect, header: str = ""
) -> Any:  # noqa: ANN401 - MLX's kernels are untyped callables
    source = kernel_source(name, language)
    return make_kernel(f"paged_{name}", arrays, language, source=source, header=header)


class KernelOps:
    """Implements `PagedOps` with kernels."""

    in_place = True

    def __init__(self, language: Dialect) -> None:
        """Read the kernels' texts; MLX compiles them on first use."""
        self.ordered_by_stream = language != "metal"
        inputs = ["q", "k", "v", "key_pool", "value_pool", "table", "lengths", "work", "scale"]
        inputs += ["after"]
        header = kernel_source("attention_header", language)
        self._attend = _make("attention", (inputs, ["out", "stats"]), language, header)
        parts = ["parts", "stats", "firsts"]
        self._combine = _make("combine", (parts, ["out"]), language)
        pools = ["keys", "values", "key_pool", "value_pool", "entries", "after"]
        self._store = _make("store", (pools, ["done"]), language)
        pools[4:] = ["table", "lengths"]
        self._append = _make("append", (pools, ["done"]), language)
        self._scales: dict[float, mx.array] = {}

    def store(
        self,
        layer: PagedLayer,
        keys: mx.array,
        values: mx.array,
        entries: Sequence[StoreEntry],
        after: mx.array,
    ) -> mx.array:
        """See `PagedOps.store`."""
        _, heads, size, head_dim = layer.keys.shape
        table = mx.array([(e.block, e.prompt, e.first, e.count) for e in entries], dtype=mx.int32)
        (done,) = self._store(
            inputs=[keys, values, layer.keys, layer.values, table, after],
            template=[("T", keys.dtype), ("D", head_dim), ("BLOCK", size)],
            grid=(THREADS, heads, len(entries)),
            threadgroup=(THREADS, 1, 1),
            output_shapes=[(1,)],
            output_dtypes=[mx.int32],
        )
        return _array(done)

    def attend(
        self,
        layer: PagedLayer,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scale: float,
        plan: StepPlan,
    ) -> mx.array:
        """See `PagedOps.attend`.

        One launch; another one after it if a row has several items of work, and one before it if
        rows attend to tokens that other rows store.
        """
        _, heads, _, head_dim = queries.shape
        items = plan.work.shape[0]
        group = heads // keys.shape[1]
        tile = head_tile(group, head_dim)
        split = plan.split
        out_type = mx.float32 if split else queries.dtype
        constants: list[tuple[str, Any]] = [
            ("T", queries.dtype),
            ("D", head_dim),
            ("GROUP", tile),
            ("TILES", group // tile),
            ("BLOCK", layer.keys.shape[2]),
            ("LANES", team_lanes(head_dim)),
            ("SPLIT", split),
            ("STORE", not plan.mixed),
            ("OUT", out_type),
        ]
        pools = [layer.keys, layer.values, plan.table, plan.lengths, plan.work]
        after = self._store_step(layer, keys, values, plan) if plan.mixed else plan.lengths
        out, stats = self._attend(
            inputs=[queries, keys, values, *pools, self._scale(scale), after],
            template=constants,
            grid=(THREADS, heads // tile, items),
            threadgroup=(THREADS, 1, 1),
            output_shapes=[
                (items, heads, head_dim) if split else queries.shape,
                (items, heads, 2) if split else (1,),
            ],
            output_dtypes=[out_type, mx.float32],
        )
        return self._joined(queries, out, stats, plan) if split else _array(out)

    def _joined(
        self, queries: mx.array, parts: mx.array, stats: mx.array, plan: StepPlan
    ) -> mx.array:
        """Combine the results of each row's items."""
        rows, heads, _, head_dim = queries.shape
        (out,) = self._combine(
            inputs=[parts, stats, plan.firsts],
            template=[("T", queries.dtype), ("D", head_dim)],
            grid=(head_dim, heads, rows),
            threadgroup=(head_dim, 1, 1),
            output_shapes=[queries.shape],
            output_dtypes=[queries.dtype],
        )
        return _array(out)

    def _store_step(
        self, layer: PagedLayer, keys: mx.array, values: mx.array, plan: StepPlan
    ) -> mx.array:
        """Store the step's own keys and values; returns an array that depends on it."""
        rows, heads, _, head_dim = keys.shape
        (done,) = self._append(
            inputs=[keys, values, layer.keys, layer.values, plan.table, plan.lengths],
            template=[("T", keys.dtype), ("D", head_dim), ("BLOCK", layer.keys.shape[2])],
            grid=(THREADS, heads, rows),
            threadgroup=(THREADS, 1, 1),
            output_shapes=[(1,)],
            output_dtypes=[mx.int32],
        )
        return _array(done)

    def _scale(self, scale: float) -> mx.array:
        known = self._scales.get(scale)
        if known is None:
            known = self._scales[scale] = mx.array([scale], dtype=mx.float32)
        return known


def _array(made: Any) -> mx.array:  # noqa: ANN401 - MLX's kernels are untyped
    assert isinstance(made, mx.array)  # noqa: S101 - for the type checker
    return made
