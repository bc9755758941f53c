"""A wait that hears of the running step's error is the step's failure, whoever waits."""

import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from typing import Any, cast

import mlx.core as mx
import pytest

from mlx_serving.worker.engine.engine import Engine
from mlx_serving.worker.engine.failures import LaunchedWorkError, beside_step
from mlx_serving.worker.engine.interface import Output, Request, RequestRefusedError, SamplingParams
from mlx_serving.worker.engine.kv.paged.cache import PagedCache
from mlx_serving.worker.engine.kv.paged.placement import BlockPlacement
from mlx_serving.worker.engine.kv.paged.reference import ReferenceOps
from tests.support.engine_support import Collected, drive
from tests.support.unordered import Unordered, engine_on

SAMPLED = SamplingParams(1.0, top_p=0.95, seed=9)
NO_MEMORY = (
    "[METAL] Command buffer execution failed: Insufficient Memory "
    "(00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)."
)
TIMEOUT = "[METAL] Command buffer execution failed: Caused GPU Timeout Error (00000002)."
EARLY = [Request(f"early{n}", (*range(40), n), SAMPLED, 60, lane="bulk") for n in range(2)]
NEW = Request("new", (250, 251, 252, 253) * 3, SAMPLED, 3)
KNOWN = Request("new", (*range(40), 5, 6), SAMPLED, 3)
LONG = Request("new", tuple(n % 251 for n in range(2500)), SAMPLED, 3)
FIRST = [Request(f"first{n}", (7, n), SAMPLED, 3, lane="interactive") for n in range(2)]


class FailedStep:
    """The step under way fails: a wait inside of `where` raises that once, and MLX forgets it."""

    def __init__(self, patch: pytest.MonkeyPatch, engine: Engine, where: str, message: str) -> None:
        self.raised = 0
        self._runner = cast("Any", engine._runner)
        self._where, self._message = where, message
        self._wait = mx.synchronize
        patch.setattr(mx, "synchronize", self)

    def __call__(self) -> None:
        self._wait()
        if not self.raised and self._where in _callers():
            self.raised += 1
            self._runner._pending = mx.zeros_like(self._runner._pending)  # what garbage reads as
            raise RuntimeError(self._message)


def _callers() -> Iterator[str]:
    frame = sys._getframe(2)
    while frame is not None:
        yield frame.f_code.co_name
        frame = cast("Any", frame.f_back)


class Run:
    """Rows decode; then a step fails, and others come."""

    def __init__(self, ops: type[ReferenceOps] = Unordered) -> None:
        self.engine = engine_on(ops)
        self.lost: list[str] = []
        take = self.engine._recovery.take

        def watch(rows: Any) -> Any:
            self.lost += [row.request.id for row in rows]
            return take(rows)

        cast("Any", self.engine._recovery).take = watch
        self.collected: dict[str, Collected] = {}
        for request in EARLY:
            self.engine.add(request)
        for _ in range(5):
            self.step()

    def step(self) -> list[Output]:
        outputs = self.engine.step()
        for output in outputs:
            self.collected.setdefault(output.request_id, Collected()).add(output)
        return outputs

    def until_raised(self, failed: FailedStep, pending: list[Request]) -> list[Output]:
        """Return what the step brought in which it was raised."""
        for _ in range(100):
            self.add(pending)
            outputs = self.step()
            if failed.raised:
                return outputs
        pytest.fail("no wait was there")

    def add(self, pending: list[Request]) -> None:
        with suppress(RequestRefusedError):  # "no_room": the next step makes some
            while pending and self.engine.can_add(pending[0]):
                self.engine.add(pending[0])
                del pending[0]

    def finish(self, pending: list[Request]) -> None:
        assert self.engine.kv_memory is not None
        self.engine.kv_memory.room.forgive()  # as the memory guard does after a quiet time
        while pending or self.engine.has_work:
            self.add(pending)
            self.step()


@cache
def expected(*late: Request) -> dict[str, list[int]]:
    collected = drive(engine_on(Unordered), [*EARLY, *late])
    return {name: row.token_ids for name, row in collected.items()}


WAITS: dict[str, tuple[str, list[Request]]] = {
    "join": ("finish_writes", [NEW]),
    "gather": ("gather", [KNOWN]),
    "growth": ("_grow", [LONG]),
    "placing": ("_wait_and_give_back", [NEW]),
    "park": ("park", FIRST),
    "resume": ("resume", FIRST),
}


def prepare(patch: pytest.MonkeyPatch, run: Run, name: str, message: str) -> FailedStep:
    if name == "placing":
        real, failed = (
            BlockPlacement.place_prefilled,
            FailedStep(patch, run.engine, WAITS[name][0], message),
        )

        def place(placing: BlockPlacement, prefilled: Any) -> None:
            if not failed.raised:
                raise ValueError
            real(placing, prefilled)

        patch.setattr(BlockPlacement, "place_prefilled", place)
        return failed
    return FailedStep(patch, run.engine, WAITS[name][0], message)


@pytest.mark.parametrize("name", WAITS)
def test_no_row_gets_a_token_of_a_step_that_found_no_memory(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = WAITS[name][1]
    pending = list(late)
    with monkeypatch.context() as patch:
        run = Run()
        failed = prepare(patch, run, name, NO_MEMORY)
        outputs = run.until_raised(failed, pending)
        assert all(output.error is None for output in outputs)
        assert {"early0", "early1"} <= set(run.lost), "all begin again"
        if name != "park":  # what a row had decoded before it is parked, goes out
            assert outputs == []
        assert not run.engine.running
        run.finish(pending)
    assert {name: row.token_ids for name, row in run.collected.items()} == expected(*late)
    assert {row.error_code for row in run.collected.values()} == {None}


@pytest.mark.parametrize("name", WAITS)
def test_any_other_error_of_the_step_is_raised(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        run = Run()
        failed = prepare(patch, run, name, TIMEOUT)
        with pytest.raises(LaunchedWorkError) as raised:
            run.until_raised(failed, list(WAITS[name][1]))
    assert not raised.value.memory_short
    assert run.lost == []
    allocator = cast("Any", run.engine._runner)._cache.allocator
    run.engine._runner.reset()
    assert allocator.used == sum(
        len(row.prefill.pinned_blocks) for row in run.engine._scheduler.rows
    )


def test_an_abort_that_hears_of_it_leaves_it_to_the_next_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        run = Run()
        run.engine.abort("early0")
        failed = FailedStep(patch, run.engine, "keep", NO_MEMORY)
        run.engine.add(LONG)
        run.engine.abort("early1")
        assert failed.raised
        assert run.engine.has_work
        assert not run.engine.can_add(NEW)
        run.step()
        assert run.lost == ["new"]
        run.finish([])
    assert run.collected["new"].token_ids == expected(LONG)["new"]


def test_a_row_that_ended_when_it_is_heard_of_does_not_begin_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The last rows leave; a prompt that has begun lost what was computed of it."""
    with monkeypatch.context() as patch:
        run = Run()
        run.engine.abort("early0")
        failed = FailedStep(patch, run.engine, "keep", NO_MEMORY)
        run.until_raised(failed, [])
        run.finish([])
    assert run.collected["early1"].token_ids == expected()["early1"]
    assert run.lost == []


def test_a_step_that_can_not_grow_because_the_last_one_failed_is_no_prompts_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        run = Run(ReferenceOps)
        failed = FailedStep(patch, run.engine, "_make_room", NO_MEMORY)
        patch.setattr(PagedCache, "_grow_ahead", lambda cache: _short_of_room(cache, failed))
        outputs = run.until_raised(failed, [])
        assert outputs == []
        assert run.lost == ["early0", "early1"]
        run.finish([])
    assert {name: row.token_ids for name, row in run.collected.items()} == expected()


def _short_of_room(cache: Any, failed: FailedStep) -> None:
    if not failed.raised:
        cache._make_room(10**9)


@pytest.mark.parametrize("decoding", [True, False])
def test_where_rows_decode_a_command_buffers_error_is_theirs(decoding: bool) -> None:  # noqa: FBT001 - parametrized
    """MLX raises it from the next launch, too."""
    with (
        pytest.raises(LaunchedWorkError if decoding else RuntimeError) as raised,
        beside_step(decoding=decoding),
    ):
        raise RuntimeError(NO_MEMORY)
    assert isinstance(raised.value, LaunchedWorkError) is decoding
    own = "[metal::malloc] Resource limit (499000) exceeded."
    with pytest.raises(RuntimeError, match="Resource limit"), beside_step(decoding=decoding):
        raise RuntimeError(own)


def test_a_launch_that_hears_of_it_beside_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt's own launch raises what the step before it met."""
    raised: list[int] = []
    with monkeypatch.context() as patch:
        run = Run()
        launch = mx.async_eval

        def raising(*arrays: Any) -> None:
            if not raised and "prefill" in _callers():
                raised.append(1)
                runner = cast("Any", run.engine._runner)
                runner._pending = mx.zeros_like(runner._pending)
                raise RuntimeError(NO_MEMORY)
            launch(*arrays)

        patch.setattr(mx, "async_eval", raising)
        run.engine.add(NEW)
        assert run.step() == []
        assert raised
        assert set(run.lost) == {"early0", "early1", "new"}
        run.finish([])
    assert {name: row.token_ids for name, row in run.collected.items()} == expected(NEW)
