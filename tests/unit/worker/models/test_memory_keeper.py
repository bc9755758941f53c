"""The keeper on a device of made-up numbers: what it does in which order, and when it is due."""

from __future__ import annotations

from typing import Any

from mlx_serving.worker.engine.interface import Request
from mlx_serving.worker.engine.memory.guard import MemoryReading, MemoryRoom, Relief
from mlx_serving.worker.engine.memory.kv_caches import KvMemory
from mlx_serving.worker.models.memory_keeper import LOOK_SECONDS, MemoryKeeper
from mlx_serving.worker.process.recycling import (
    LEAST_GROWTH_BYTES,
    WINDOW_LOOKS,
    RecycleRules,
    Recycling,
)
from mlx_serving.worker.status.counters import Counters
from tests.support.engine_support import GREEDY, drive, prefixes_of, tiny_engine

GIB = 1 << 30
LIMIT = 40 * GIB


class Device:
    """What it reads is set by the test; it notes when it was trimmed."""

    def __init__(self) -> None:
        self.active, self.available = 10 * GIB, 100 * GIB
        self.trims = 0

    def read(self) -> MemoryReading:
        return MemoryReading(self.active, 0, self.active, LIMIT, self.available)

    def trim(self) -> None:
        self.trims += 1


class Bench:
    def __init__(self, caches: list[KvMemory] | None = None, **rules: Any) -> None:
        self.now = 0.0
        self.steps = 0
        self.due: list[str] = []
        self.device, self.counters = Device(), Counters()
        self.keeper = MemoryKeeper(
            self.counters,
            Recycling(RecycleRules(**rules), lambda: self.now),
            self.due.append,
            lambda: self.now,
        )
        self.caches = caches or []
        self.keeper.watch(self.device, lambda: self.caches)

    def look(self, times: int = 1) -> Relief:
        for _ in range(times):
            self.now += LOOK_SECONDS
            self.keeper.tend(self.steps)
        return self.keeper.state.relief

    def counts(self, name: str) -> dict[str, float]:
        return self.counters.read()[0].get(name, {})


class Caches:
    """KV caches of so many bytes."""

    def __init__(self, nbytes: int = GIB) -> None:
        self.kv_bytes = nbytes

    def shrink(self) -> None:
        pass


def test_it_looks_twice_a_second_however_often_it_is_called() -> None:
    bench = Bench()
    bench.look()
    bench.device.active = 20 * GIB
    bench.keeper.tend(bench.steps)
    assert bench.keeper.state.active == 10 * GIB
    bench.look()
    assert bench.keeper.state.active == 20 * GIB


def test_what_it_does_is_done_in_order_counted_and_undone() -> None:
    engine = tiny_engine(paged=True, prefix_cache_bytes=1 << 24)
    drive(engine, [Request("a", (1,) * 200, GREEDY, 4)])
    prefixes = prefixes_of(engine)
    kept, limit = prefixes.idle, prefixes.idle_limit
    assert kept >= 6
    memory = engine.kv_memory
    assert memory is not None
    held = memory.use.nbytes
    bench = Bench([memory])
    assert bench.look() is Relief.NONE
    assert bench.device.trims == 0
    bench.device.active = int(39.9 * GIB)
    assert bench.look() is Relief.TRIM
    assert (bench.device.trims, prefixes.idle) == (1, kept)
    assert bench.look() is Relief.SHRINK
    assert prefixes.idle == 0
    assert memory.use.nbytes < held
    assert bench.look() is Relief.REFUSE
    assert not engine.can_add(Request("b", (1,) * 20, GREEDY, 4))
    assert bench.keeper.state.refuses
    bench.device.active = 10 * GIB
    assert bench.look() is Relief.NONE
    assert engine.can_add(Request("b", (1,) * 20, GREEDY, 4))
    assert prefixes.idle_limit == limit
    assert bench.counts("memory_relief") == {"trim": 1, "shrink": 1, "refuse": 1, "none": 1}
    collected = drive(engine, [Request("c", (1,) * 200, GREEDY, 4)])
    assert collected["c"] == drive(tiny_engine(), [Request("c", (1,) * 200, GREEDY, 4)])["c"]


def test_other_programs_leave_less_room_and_give_it_back() -> None:
    room = MemoryRoom()
    bench = Bench([KvMemory(Caches(), room, 1000)])
    bench.look()
    assert (room.tokens or 0) * 1000 > 25 * GIB
    bench.device.available = 5 * GIB
    bench.look()
    assert 3 * GIB < (room.tokens or 0) * 1000 < 5 * GIB
    bench.device.available = 100 * GIB
    bench.look()
    assert (room.tokens or 0) * 1000 > 25 * GIB


def test_several_engines_share_what_there_is() -> None:
    rooms = [MemoryRoom(), MemoryRoom()]
    caches = [Caches(8 * GIB), Caches(GIB)]
    bench = Bench([KvMemory(c, r, 1000) for c, r in zip(caches, rooms, strict=True)])
    bench.device.active = 30 * GIB
    bench.look()
    spare = 40 * 0.95 * GIB - 30 * GIB
    assert [round((r.tokens or 0) * 1000 / GIB, 2) for r in rooms] == [
        round(8 + spare / GIB, 2), round(1 + spare / GIB, 2),
    ]  # fmt: skip


def test_errors_of_the_device_are_counted_once() -> None:
    room = MemoryRoom()
    bench = Bench([KvMemory(Caches(), room, 1000)])
    room.strike(500)
    room.strike(200)
    bench.look(3)
    assert bench.counts("memory_errors") == {"": 2}


def test_a_child_that_is_old_enough_says_so() -> None:
    bench = Bench(steps=5)
    bench.look()
    assert bench.due == []
    bench.steps = 5
    bench.look()
    assert (bench.due, bench.keeper.due) == (["steps"], "steps")
    tokens = Bench(tokens=100)
    tokens.counters.count("generation_tokens", by=100)
    tokens.look()
    assert tokens.due == ["tokens"]


def test_without_a_device_the_age_alone_counts() -> None:
    bench = Bench(hours=1)
    bench.keeper.watch(None)
    bench.look()
    assert bench.due == []
    bench.now += 3600
    bench.look()
    assert bench.due == ["hours"]


def test_memory_that_no_cache_explains_and_no_trim_brings_down_is_an_age_too() -> None:
    caches = Caches()
    bench = Bench([KvMemory(caches, MemoryRoom(), 1000)])
    bench.look(WINDOW_LOOKS)
    caches.kv_bytes += 4 * GIB
    bench.device.active += 4 * GIB
    bench.look(WINDOW_LOOKS)
    assert bench.due == []
    bench.device.active += max(LEAST_GROWTH_BYTES, LIMIT // 20) + 1
    bench.look(WINDOW_LOOKS)
    assert bench.due[:1] == ["memory"]


def test_a_model_that_is_loaded_is_no_growth() -> None:
    bench = Bench([KvMemory(Caches(), MemoryRoom(), 1000)])
    bench.look(WINDOW_LOOKS)
    bench.caches = [*bench.caches, KvMemory(Caches(), MemoryRoom(), 1000)]
    bench.device.active += 10 * GIB
    bench.look(2 * WINDOW_LOOKS)
    assert bench.due == []
