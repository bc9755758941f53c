"""A Redis that a long script of somebody's keeps busy answers each command with an error."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest
import redis

from mlx_serving.common.protocol.keys import Keys
from mlx_serving.common.redis.local import LocalRedis
from mlx_serving.worker.claiming.placement import Placement
from mlx_serving.worker.delivery.measured_protocol import MeasuredProtocol, QueueWatch
from mlx_serving.worker.status.counters import Counters
from tests.support.helpers import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

QUEUE = "tally:default"
WITHOUT_END = "while true do end"


@pytest.fixture
def busy() -> Iterator[redis.Redis]:
    """A client of a server that is busy until the test is over."""
    with LocalRedis(options={"busy-reply-threshold": "50"}) as server, server.client() as client:

        def keep_busy() -> None:
            with server.client() as other, pytest.raises(redis.ResponseError, match="SCRIPT KILL"):
                other.eval(WITHOUT_END, 0)

        thread = threading.Thread(target=keep_busy)
        thread.start()
        try:
            wait_until(lambda: _is_busy(client))
            yield client
        finally:
            client.script_kill()
            thread.join(10)


def _is_busy(client: redis.Redis) -> bool:
    try:
        client.ping()
    except redis.ResponseError:
        return True
    return False


def test_the_main_loop_is_told_so_by_a_look_at_its_queues(busy: redis.Redis) -> None:
    """It catches what is Redis's; any other error would end the engine's process."""
    counters = Counters()
    watch = QueueWatch(MeasuredProtocol(busy, Keys(), counters), [QUEUE], counters)
    with pytest.raises(redis.ResponseError, match="BUSY"):
        watch.look()


def test_the_main_loop_is_told_so_by_a_look_at_the_oldest_jobs(busy: redis.Redis) -> None:
    placement = object.__new__(Placement)
    placement._protocol = MeasuredProtocol(busy, Keys(), Counters())
    placement._depths = {QUEUE: 1}
    with pytest.raises(redis.ResponseError, match="BUSY"):
        placement._ages(["tally"])
