"""One `AsyncClient`'s loops begin and end in many threads at once. Nothing is connected."""

from __future__ import annotations

import asyncio
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from mlx_serving.common.redis.connection import Endpoint
from mlx_serving.producer.loop_connections import ConnectionsByLoop

if TYPE_CHECKING:
    from collections.abc import Iterator

THREADS, LOOPS, STAYING = 6, 300, 60


@pytest.fixture
def hasty_threads() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("hasty_threads")
def test_loops_of_many_threads_begin_and_end() -> None:
    connections = ConnectionsByLoop(Endpoint(), lambda *_: None)

    async def use() -> bool:
        return await connections.here() is await connections.here()

    def many_loops(_: int) -> None:
        for turn in range(LOOPS):
            if turn % 2:
                assert asyncio.run(use())
                continue
            loop = asyncio.new_event_loop()  # left without closing its generators
            assert loop.run_until_complete(use())
            loop.close()

    staying = [asyncio.new_event_loop() for _ in range(STAYING)]
    for loop in staying:
        assert loop.run_until_complete(use())
    with ThreadPoolExecutor(THREADS) as threads:
        list(threads.map(many_loops, range(THREADS)))
    for loop in staying:
        loop.run_until_complete(connections.aclose())
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
    assert all(loop.is_closed() for loop in connections._open)
    assert connections._open.keys() == connections._guards.keys()
