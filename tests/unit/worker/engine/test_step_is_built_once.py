"""What rows ask for is data: no setting and no row that comes or goes builds a kernel or a step.

On CUDA, MLX compiles a custom kernel for each name and each set of template arguments, and keeps
launched operations as graphs, found by what operations they hold and how these hang together.
"""

from __future__ import annotations

import random
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import pytest

from mlx_serving.worker.engine.interface import Request, SamplingParams
from mlx_serving.worker.engine.sampling import kernels
from mlx_serving.worker.engine.sampling.noise import token_words
from mlx_serving.worker.engine.sampling.parameters import RowSampling
from mlx_serving.worker.engine.sampling.sampler import BatchSampler
from tests.support.engine_support import tiny_engine

if TYPE_CHECKING:
    from collections.abc import Iterator

ROWS = 8
VOCABULARY = 1031
VIEWS = {"Broadcast", "ExpandDims", "Squeeze", "Reshape", "Slice", "Split", "Transpose"}


class Launches:
    """Stands for MLX on a GPU: keeps all that a kernel is compiled and a launch is told by."""

    def __init__(self) -> None:
        self.compiled: set[Any] = set()
        self.launched: set[Any] = set()

    def make_kernel(
        self, name: str, arrays: Any, language: str, *, source: str, header: str = ""
    ) -> Any:
        text = (name, language, source, header, tuple(map(tuple, arrays)))

        def run(*, inputs: list[mx.array], template: Any, **launch: Any) -> list[mx.array]:
            kinds = tuple((array.dtype, array.ndim, array.size < 8) for array in inputs)
            self.compiled.add((text, kinds, tuple(template)))
            self.launched.add((launch["grid"], launch["threadgroup"]))
            shapes = zip(launch["output_shapes"], launch["output_dtypes"], strict=True)
            return [mx.zeros(shape, dtype) for shape, dtype in shapes]

        return run


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    found = Launches()
    monkeypatch.setattr(kernels, "make_kernel", found.make_kernel)
    monkeypatch.setattr(kernels, "dialect", lambda: "cuda")
    kernels._kernel.cache_clear()
    yield found
    kernels._kernel.cache_clear()


def some_rows(chance: random.Random) -> list[RowSampling]:
    """Rows of one kind or of all: plain, filtered, penalised, biased, masked, with logprobs."""
    kinds = chance.sample(range(6), chance.randrange(1, 7))
    return [some_row(chance, chance.choice(kinds)) for _ in range(ROWS)]


def some_row(chance: random.Random, kind: int) -> RowSampling:
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"top_p": chance.random(), "top_k": chance.randrange(VOCABULARY), "min_p": chance.random()},
        {"repetition_penalty": 1 + chance.random(), "presence_penalty": chance.random()},
        {"logit_bias": tuple((t, chance.random()) for t in range(chance.randrange(1, 9)))},
        {"logprobs": chance.randrange(6)},
        {},
    ]
    anyhow = {"temperature": 2 * chance.random(), "seed": chance.getrandbits(64)}
    params = SamplingParams(**anyhow | kinds[kind])
    position, prompt = chance.randrange(30), chance.randrange(1, 200)
    history = chance.choices(range(VOCABULARY), k=prompt + position)
    return RowSampling(params, chance.randrange(3), position, history, prompt, masked=kind == 5)


def test_no_setting_compiles_another_sampling_kernel(launches: Launches) -> None:
    chance, words = random.Random(0), token_words(VOCABULARY)
    logits = mx.zeros((ROWS, VOCABULARY), mx.bfloat16)
    tokens, mask = mx.zeros(ROWS, mx.int32), mx.zeros((ROWS, -(-VOCABULARY // 32)), mx.int32)
    for _ in range(100):
        sampler = BatchSampler(some_rows(chance), words, kernels.KernelDraw)
        for _ in range(2):
            sampler.sample(logits, tokens, mask if chance.random() < 0.5 else mask + 1)
    assert len(launches.compiled) == 1
    assert len(launches.launched) == 1


def test_another_type_of_logits_does_compile_one(launches: Launches) -> None:
    """The test above can fail."""
    words = token_words(VOCABULARY)
    rows = [RowSampling(SamplingParams(), 0, 0)] * ROWS
    for dtype in (mx.bfloat16, mx.float16):
        BatchSampler(rows, words, kernels.KernelDraw).sample(mx.zeros((ROWS, VOCABULARY), dtype))
    assert len(launches.compiled) == 2


def operations(*arrays: mx.array) -> Counter[str]:
    """What is still to be launched for `arrays`: operations by name, without mere views."""
    with tempfile.NamedTemporaryFile(suffix=".dot") as file:
        mx.export_to_dot(file.name, *arrays)
        names = re.findall(r'label ?= ?"([^"]+)", shape=rectangle', Path(file.name).read_text())
    assert names
    return Counter(name for name in names if name not in VIEWS)


def test_fresh_settings_add_no_operation_to_a_step() -> None:
    words = token_words(VOCABULARY)
    mx.eval(words)
    logits = mx.zeros((ROWS, VOCABULARY))
    mx.eval(logits)
    counts = []
    for seed in range(3):
        rows = [RowSampling(SamplingParams(1.0, 0.9, seed=seed + n), 0, 3) for n in range(ROWS)]
        sampler = BatchSampler(rows, words)
        for _ in range(2):
            draws = sampler.sample(logits)
            counts.append(operations(draws.tokens, draws.state))
            mx.eval(draws.arrays)
    assert all(count == counts[0] for count in counts), counts


def test_rows_that_leave_add_no_operation_to_the_next_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = tiny_engine(eos=(), paged=True)
    runner: Any = engine._runner
    counts: list[tuple[int, Counter[str]]] = []
    step = runner._cache.step

    def counted(tokens: mx.array) -> mx.array:
        logits: mx.array = step(tokens)
        if not runner._joined:  # the reference's stores are part of a step, a kernel's are not
            counts.append((len(runner._rows), operations(logits)))
        return logits

    monkeypatch.setattr(runner._cache, "step", counted)
    for index in range(8):
        engine.add(Request(f"r{index}", tuple(range(1, 34)), SamplingParams(), 4 + 3 * index))
    while engine.has_work:
        engine.step()
    for filled in (False, True):
        found = [count for rows, count in counts if (rows not in {1, 2, 4, 8}) == filled]
        assert all(count == found[0] for count in found), counts
