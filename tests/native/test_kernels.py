"""The GPU kernels' algorithm, run on the CPU: both dialects against the reference in MLX."""

import ctypes
import os
import shutil
import subprocess
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_serving.worker.engine.kernels import Dialect
from mlx_serving.worker.engine.kv.paged.kernel_ops import head_tile, kernel_source, team_lanes
from mlx_serving.worker.engine.kv.paged.layers import (
    PagedLayer,
    StepPlan,
    StoreEntry,
)
from mlx_serving.worker.engine.kv.paged.reference import ReferenceOps

COMPILER = os.environ.get("CXX", "c++")
BLOCK = 8
LENGTHS = [0, 1, 7, 8, 40, 150]
WIDTH = 20  # blocks a row may have

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason="needs a C++ compiler"),
]


@dataclass(frozen=True)
class Shape:
    """Heads of one layer."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: mx.Dtype = mx.float32

    @property
    def tile(self) -> int:
        return head_tile(self.heads // self.kv_heads, self.head_dim)

    @property
    def tiles(self) -> int:
        return self.heads // self.kv_heads // self.tile


SHAPES = [
    Shape(4, 2, 16),
    Shape(6, 2, 80),
    Shape(16, 1, 64, mx.bfloat16),  # two tiles of eight heads
    Shape(3, 3, 256),
    Shape(2, 1, 128, mx.bfloat16),
]

WRAPPER = """
namespace {name} {{
using T = {dtype};
using OUT = {out};
constexpr int D = {head_dim}, GROUP = {tile}, TILES = {tiles}, BLOCK = {block}, LANES = {lanes};
constexpr bool SPLIT = {split}, STORE = {store_step};
void attend(const T* q, const T* k, const T* v, const T* key_pool, const T* value_pool,
            const int* table, const int* table_shape, const int* lengths, const int* work,
            const float* scale, const int* after, {out}* out, float* stats) {{
{attention}
}}
void combine(const float* parts, const float* stats, const int* firsts, T* out) {{
{combine}
}}
void store(const T* keys, const int* keys_shape, const T* values, const T* key_pool,
           const T* value_pool, const int* entries, const int* after, int* done) {{
{store}
}}
void append(const T* keys, const T* values, const T* key_pool, const T* value_pool,
            const int* table, const int* table_shape, const int* lengths, int* done) {{
{append}
}}
}}
extern "C" void {name}_attend(unsigned tiles, unsigned items, void** a) {{
  using namespace {name};
  shim::launch({{1, tiles, items}}, 128, [=] {{
    attend((T*)a[0], (T*)a[1], (T*)a[2], (T*)a[3], (T*)a[4], (int*)a[5], (int*)a[6], (int*)a[7],
           (int*)a[8], (float*)a[9], nullptr, ({out}*)a[10], (float*)a[11]);
  }});
}}
extern "C" void {name}_combine(unsigned heads, unsigned rows, void** a) {{
  using namespace {name};
  shim::launch({{1, heads, rows}}, D,
               [=] {{ combine((float*)a[0], (float*)a[1], (int*)a[2], (T*)a[3]); }});
}}
extern "C" void {name}_store(unsigned heads, unsigned entries, void** a) {{
  using namespace {name};
  shim::launch({{1, heads, entries}}, 128, [=] {{
    store((T*)a[0], (int*)a[1], (T*)a[2], (T*)a[3], (T*)a[4], (int*)a[5], (int*)a[6],
          (int*)a[7]);
  }});
}}
extern "C" void {name}_append(unsigned heads, unsigned rows, void** a) {{
  using namespace {name};
  shim::launch({{1, heads, rows}}, 128, [=] {{
    append((T*)a[0], (T*)a[1], (T*)a[2], (T*)a[3], (int*)a[4], (int*)a[5], (int*)a[6],
           (int*)a[7]);
  }});
}}
"""


def name_of(shape: Shape, language: Dialect, *, split: bool, mixed: bool = False) -> str:
    return f"k_{language}_{SHAPES.index(shape)}_{int(split)}_{int(mixed)}"


def wrapped(shape: Shape, language: Dialect, *, split: bool, mixed: bool) -> str:
    dtype = "float" if shape.dtype == mx.float32 else "bfloat"
    return WRAPPER.format(
        name=name_of(shape, language, split=split, mixed=mixed),
        dtype=dtype,
        head_dim=shape.head_dim,
        tile=shape.tile,
        tiles=shape.tiles,
        block=BLOCK,
        lanes=team_lanes(shape.head_dim),
        split=str(split).lower(),
        store_step=str(not mixed).lower(),
        out="float" if split else dtype,
        attention=kernel_source("attention", language),
        combine=kernel_source("combine", language),
        store=kernel_source("store", language),
        append=kernel_source("append", language),
    )


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """All kernels of both dialects in all shapes, built for the CPU."""
    folder = tmp_path_factory.mktemp("kernels")
    dialects: tuple[Dialect, ...] = ("cuda", "metal")
    parts = ['#include "kernel_shim.hpp"', kernel_source("attention_header", "cuda")]
    parts += [
        wrapped(shape, language, split=split, mixed=mixed)
        for shape in SHAPES
        for language in dialects
        for split in (False, True)
        for mixed in (False, True)
    ]
    (folder / "kernels.cpp").write_text("\n".join(parts))
    flags = ["-std=c++20", "-O1", "-w", "-shared", "-fPIC", f"-I{Path(__file__).parent}"]
    command = [COMPILER, *flags, str(folder / "kernels.cpp"), "-o", str(folder / "kernels.so")]
    environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(folder / "kernels.so"))


def to_numpy(array: mx.array) -> Any:
    mx.eval(array)
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


def to_mlx(array: Any, dtype: mx.Dtype) -> mx.array:
    return mx.array(array).view(dtype) if dtype == mx.bfloat16 else mx.array(array)


def call(function: Any, first: int, second: int, *arrays: Any) -> None:
    function(first, second, (ctypes.c_void_p * len(arrays))(*(a.ctypes.data for a in arrays)))


def random(*shape: int, dtype: mx.Dtype, seed: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def plan_of(*, split: bool, mixed: bool) -> StepPlan:
    """Rows of `LENGTHS` tokens in shuffled blocks; items end within a row's tokens and beyond.

    `mixed`: every row but one is a token of one prompt, so that longer ones read what shorter ones
    store.
    """
    order = np.random.default_rng(0).permutation(len(LENGTHS) * WIDTH)
    table = order.reshape(len(LENGTHS), WIDTH).astype(np.int32)
    if mixed:
        table[1:] = table[1]
    work: list[tuple[int, int, int]] = []
    firsts = [0]
    for row in range(len(LENGTHS)):
        bounds = [0, 32, 64, 100, 2**31 - 1] if split else [0, 2**31 - 1]
        work += [(row, start, end) for start, end in pairwise(bounds)]
        firsts.append(len(work))
    lengths, items, ends = (mx.array(v, dtype=mx.int32) for v in (LENGTHS, work, firsts))
    ones = mx.ones_like(lengths)
    return StepPlan(mx.array(table), lengths, ones, items, ends, split=split, mixed=mixed)


@pytest.mark.parametrize("mixed", [False, True], ids=["rows", "prompts"])
@pytest.mark.parametrize("split", [False, True], ids=["whole rows", "split rows"])
@pytest.mark.parametrize("language", ["cuda", "metal"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_equals_the_reference(
    library: ctypes.CDLL, shape: Shape, language: Dialect, *, split: bool, mixed: bool
) -> None:
    rows, blocks = len(LENGTHS), len(LENGTHS) * WIDTH
    plan = plan_of(split=split, mixed=mixed)
    query = random(rows, shape.heads, 1, shape.head_dim, dtype=shape.dtype, seed=1) * 2
    own = [
        random(rows, shape.kv_heads, 1, shape.head_dim, dtype=shape.dtype, seed=n) for n in (2, 3)
    ]
    pools = [
        random(blocks, shape.kv_heads, BLOCK, shape.head_dim, dtype=shape.dtype, seed=n)
        for n in (4, 5)
    ]
    inputs = [to_numpy(a) for a in (query, *own, *pools, plan.table)]
    inputs += [np.array(plan.table.shape, dtype=np.int32)]
    inputs += [to_numpy(a) for a in (plan.lengths, plan.work)]
    inputs += [np.array([0.3], dtype=np.float32)]
    out = np.zeros((rows, shape.heads, 1, shape.head_dim), dtype=inputs[0].dtype)
    items = plan.work.shape[0]
    parts = np.zeros((items, shape.heads, shape.head_dim), dtype=np.float32)
    stats = np.zeros((items, shape.heads, 2), dtype=np.float32)
    name = name_of(shape, language, split=split, mixed=mixed)
    if mixed:
        done = np.ones(1, dtype=np.int32)
        step = [*inputs[1:5], *inputs[5:8], done]
        call(getattr(library, f"{name}_append"), shape.kv_heads, rows, *step)
        assert done.tolist() == [0]
    tiles = shape.heads // shape.tile
    call(getattr(library, f"{name}_attend"), tiles, items, *inputs, parts if split else out, stats)
    if split:
        firsts = to_numpy(plan.firsts)
        call(getattr(library, f"{name}_combine"), shape.heads, rows, parts, stats, firsts, out)

    wide = [array.astype(mx.float32) for array in (*pools, query, *own)]
    layer = PagedLayer(ReferenceOps(), wide[0], wide[1])
    expected = ReferenceOps().attend(layer, wide[2], wide[3], wide[4], 0.3, plan)
    got = to_mlx(out, shape.dtype).astype(mx.float32)
    tolerance = 1e-5 if shape.dtype == mx.float32 else 2e-2
    assert mx.allclose(got, expected, rtol=tolerance, atol=tolerance).item()
    for pool, stored in zip(inputs[3:5], (layer.keys, layer.values), strict=True):
        assert mx.array_equal(to_mlx(pool, shape.dtype).astype(mx.float32), stored).item()


@pytest.mark.parametrize("language", ["cuda", "metal"])
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_storing_prompts_touches_their_blocks_only(
    library: ctypes.CDLL, shape: Shape, language: Dialect
) -> None:
    entries = [StoreEntry(5, 0, 0, 8), StoreEntry(2, 0, 8, 8), StoreEntry(9, 1, 3, 5)]
    prompts = [
        random(2, shape.kv_heads, 21, shape.head_dim, dtype=shape.dtype, seed=n) for n in (1, 2)
    ]
    pools = [
        random(12, shape.kv_heads, BLOCK, shape.head_dim, dtype=shape.dtype, seed=n) for n in (3, 4)
    ]
    keys, values, key_pool, value_pool = (to_numpy(array) for array in (*prompts, *pools))
    table = np.array([(e.block, e.prompt, e.first, e.count) for e in entries], dtype=np.int32)
    after, done = np.zeros(1, dtype=np.int32), np.ones(1, dtype=np.int32)
    key_shape = np.array(keys.shape, dtype=np.int32)
    name = name_of(shape, language, split=False)
    arrays = [keys, key_shape, values, key_pool, value_pool, table, after, done]
    call(getattr(library, f"{name}_store"), shape.kv_heads, len(entries), *arrays)

    assert done.tolist() == [0]
    for pool, source_, stored in zip(pools, prompts, (key_pool, value_pool), strict=True):
        expected = to_numpy(pool).copy()
        for e in entries:
            expected[e.block, :, : e.count] = to_numpy(source_)[e.prompt, :, e.first :][
                :, : e.count
            ]
        assert np.array_equal(stored, expected)
