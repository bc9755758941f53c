"""A device that runs out of memory: no row is lost, and what follows is what would have been."""

from collections.abc import Iterator
from typing import Any, cast

import mlx.core as mx
import pytest

from benchmarks.lib.synthetic import build_model
from mlx_serving.worker.engine.engine import Engine
from mlx_serving.worker.engine.interface import Request, SamplingParams
from mlx_serving.worker.engine.kv.paged.step import plain_step
from mlx_serving.worker.engine.memory.recovery import is_out_of_memory
from tests.support.engine_support import GREEDY, Collected, drive, prefixes_of, tiny_engine

METAL = "[metal::malloc] Resource limit (499000) exceeded."
CUDA = "cudaMallocAsync(&data, size, stream) failed: out of memory"
MIXED = SamplingParams(0.9, top_p=0.9, seed=7, repetition_penalty=1.2)


class Starved:
    """A model that finds no memory when it is told so, and where more tokens are in one pass."""

    def __init__(self) -> None:
        self.model = build_model()
        self.layers = self.model.layers  # type: ignore[attr-defined]
        self.fails_at: set[int] = set()
        self.most = 1 << 30
        self.passes = 0
        self.failures = 0

    def __call__(self, inputs: mx.array, cache: list[Any]) -> mx.array:
        self.passes += 1
        logits = self.model(inputs, cache=cache)  # the caches have moved on by then
        if self.passes in self.fails_at or inputs.size > self.most:
            self.failures += 1
            raise RuntimeError(METAL)
        return logits


def requests(count: int = 6) -> list[Request]:
    return [
        Request(f"r{n}", tuple(range(n + 1, n + 20)), (GREEDY, MIXED)[n % 2], 9 + n)
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def expected() -> dict[str, Collected]:
    return drive(tiny_engine(build_model()), requests())


def memory_errors(engine: Engine) -> int:
    assert engine.kv_memory is not None
    return engine.kv_memory.room.errors


def starved(*fails_at: int, paged: bool = False, most: int = 1 << 30) -> tuple[Engine, Starved]:
    """An engine whose model fails at these passes, or at any with more tokens."""
    model = Starved()
    engine = tiny_engine(model.model, paged=paged, prefix_cache_bytes=1 << 24 if paged else 0)
    runner = cast("Any", engine._runner)
    runner._model = runner._cache._model = model
    if paged:
        runner._cache._step = plain_step(cast("Any", model))
    model.fails_at, model.most = set(fails_at), most
    return engine, model


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("passes", [(1,), (2,), (5,), (9,), (3, 4, 5), (2, 9, 13, 22, 30, 38)])
def test_no_row_ends_and_all_tokens_are_as_without(
    expected: dict[str, Collected],
    passes: tuple[int, ...],
    paged: bool,  # noqa: FBT001 - parametrized
) -> None:
    engine, model = starved(*passes, paged=paged)
    collected = drive(engine, requests(), every=1)
    assert collected == expected
    assert model.failures == memory_errors(engine) == len(passes)
    if paged:
        prefixes_of(engine).check()


def test_a_row_that_alone_is_too_much_ends_alone(expected: dict[str, Collected]) -> None:
    engine, model = starved(most=32)
    rows = requests()
    big = Request("big", (1,) * 60, GREEDY, 5)
    collected = drive(engine, [*rows[:3], big, *rows[3:]], every=1)
    assert collected["big"].error_code == "out_of_memory"
    assert collected["big"].token_ids == []
    del collected["big"]
    assert collected == expected
    assert model.failures >= 2


def test_what_waits_for_memory_can_be_aborted() -> None:
    engine, model = starved(3)
    for request in requests(3):
        engine.add(request)
    while not model.failures:
        engine.step()
    assert engine.waiting == 3
    engine.abort("r0")
    assert engine.waiting == 2
    names = {output.request_id for output in _run(engine)}
    assert names == {"r1", "r2"}


def _run(engine: Engine) -> Iterator[Any]:
    while engine.has_work:
        yield from engine.step()


def test_nobody_new_is_admitted_before_those_that_wait() -> None:
    engine, model = starved(3)
    for request in requests(3):
        engine.add(request)
    while not model.failures:
        engine.step()
    assert not engine.can_add(requests(4)[3])
    list(_run(engine))
    assert engine.can_add(requests(4)[3])


def test_another_error_of_a_step_is_the_engines_end() -> None:
    engine, _ = starved()
    engine.add(requests(1)[0])
    for _ in range(3):
        engine.step()
    engine._runner.decode = _broken  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="broken"):
        engine.step()


def _broken() -> Any:
    raise RuntimeError("a kernel is broken")


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (RuntimeError(METAL), True),
        (RuntimeError(CUDA), True),
        (RuntimeError("[malloc] Unable to allocate 8000000000000 bytes."), True),
        (RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory (0000"), True),
        (MemoryError(), True),
        (RuntimeError("broadcast_shapes: (3,4) and (4,)"), False),
        (KeyError("out of memory"), False),
    ],
)
def test_which_errors_are_a_lack_of_memory(
    error: Exception,
    is_memory: bool,  # noqa: FBT001 - parametrized
) -> None:
    assert is_out_of_memory(error) is is_memory
