"""Fixtures that several integration tests share.

`server` is the Redis that a test's clients and workers use: the shared one, unless a file that
stops its Redis, or counts on what it keeps, brings its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from mlx_serving import Client
from tests.support.bulk_driver import make_quick
from tests.support.lossy_proxy import LossyProxy
from tests.support.protocol_driver import Driver
from tests.support.worker_process import quick_settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    import redis

    from mlx_serving.common.redis.local import LocalRedis
    from mlx_serving.common.settings import Settings
    from mlx_serving.producer.batch.api import Batches


@pytest.fixture
def server(settled_redis: LocalRedis) -> LocalRedis:
    """The shared Redis, empty, where leases that ran out are reaped at once."""
    return settled_redis


@pytest.fixture
def client(server: LocalRedis) -> Iterator[Client]:
    """A client of that Redis."""
    with Client(settings=quick_settings(server.url)) as client:
        yield client


@pytest.fixture
def proxy(server: LocalRedis) -> Iterator[LossyProxy]:
    """A way to that Redis on which replies can be lost."""
    with LossyProxy(server.socket) as proxy:
        yield proxy


@pytest.fixture
def driver(redis_client: redis.Redis) -> Driver:
    """The protocol's scripts, by hand, on the shared Redis."""
    return Driver(redis_client)


@pytest.fixture
def quick_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runners of bulk files write down and look more often."""
    make_quick(monkeypatch)


@pytest.fixture
def batches(settings: Settings, redis_client: redis.Redis) -> Batches:
    """Bulk files on an empty Redis, in which nothing may stay."""
    del redis_client
    return Client(settings=settings).batches
