"""Fixtures of all test folders: a private real Redis, and a check that no key leaks."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mlx_serving.common.redis.connection import Endpoint, connect_async
from mlx_serving.common.redis.local import LocalRedis
from mlx_serving.common.settings import Settings, load_settings
from tests.support.helpers import leaked_keys, wait_until
from tests.support.quiet import turn

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Generator, Iterator

    import redis
    from redis.asyncio import Redis as AsyncRedis

TESTS = Path(__file__).parent
REAPABLE_SECONDS = 5  # leases of tests are at most 2 s; see reap.lua
FOLDER_MARKS = {
    "unit": "unit",
    "native": "unit",
    "integration": "integration",
    "acceptance": "acceptance",
    "real": "real",
}
LEFT_OUT = ("chaos", "real")  # unless asked for by -m: `make chaos`, `make real`
# Of all processes that a run starts: pytest's own beside each other, workers, commands. Threads of
# OpenBLAS wait for each other by spinning, which with more processes than cores takes the time that
# they wait for; MLX's buffers come and go with each step, and go back to the system meanwhile.
ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_TRIM_THRESHOLD_": "1000000000",
    "MALLOC_MMAP_THRESHOLD_": "1000000000",
}


def pytest_configure(config: pytest.Config) -> None:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # each start would compile hundreds of modules
    for number in (signal.SIGINT, signal.SIGHUP):
        # Ignored after `nohup` or `&`, which the commands that tests start would inherit.
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    config.addinivalue_line("markers", "may_leak(reason): leaves keys without a TTL in Redis")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark every test by its folder; leave out what has a target of its own."""
    for item in items:
        if item.path.is_relative_to(TESTS):
            folder = item.path.relative_to(TESTS).parts[0]
            if folder in FOLDER_MARKS:
                item.add_marker(FOLDER_MARKS[folder])
    for mark in LEFT_OUT:
        if mark not in str(config.getoption("markexpr")):
            left_out = [item for item in items if item.get_closest_marker(mark)]
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if not item.get_closest_marker(mark)]
    if hasattr(config, "workerinput"):
        items[:] = _in_mixed_company(items)


def _in_mixed_company(items: list[pytest.Item]) -> list[pytest.Item]:
    """Spread the files of `integration/`, which mostly wait, among the others, which compute.

    pytest's processes take whole files in this order, so that one waits while another computes.
    """
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    waiting = [file for file in files if file.is_relative_to(TESTS / "integration")]
    computing = [file for file in files if file not in waiting]
    places = {
        file: (place + 0.5) / len(kind)
        for kind in (waiting, computing)
        for place, file in enumerate(kind)
    }
    return [item for file in sorted(files, key=places.__getitem__) for item in files[file]]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Two processes a core, since tests wait for half of their time; four at most."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(2 * (cores or 1), 4)


@pytest.hookimpl(wrapper=True, tryfirst=True)  # the wait for a turn is no part of a test's time
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Beside other pytest processes, run a `quiet` test alone."""
    if not hasattr(item.config, "workerinput"):
        return (yield)
    assert item.config.cache is not None
    folder = item.config.cache.mkdir("turns")
    with turn(folder, alone=item.get_closest_marker("quiet") is not None):
        return (yield)


@pytest.fixture(autouse=True)
def _interpreters_import_from_the_checkout() -> Iterator[None]:
    """A command run in this process keeps what it starts out of the current folder; a test's own
    `python -m tests.…` comes from there."""
    yield
    os.environ.pop("PYTHONSAFEPATH", None)


@pytest.fixture(scope="session")
def local_redis() -> Iterator[LocalRedis]:
    """One real redis-server for the whole run."""
    with LocalRedis() as server:
        yield server


@pytest.fixture
def redis_client(local_redis: LocalRedis) -> Iterator[redis.Redis]:
    """Client of an empty Redis."""
    with local_redis.client() as client:
        client.flushall()
        yield client


@pytest.fixture
def settled_redis(local_redis: LocalRedis, redis_client: redis.Redis) -> LocalRedis:
    """The same Redis once it has run so long that the reaper no longer waits after a restart."""
    wait_until(lambda: redis_client.info("server")["uptime_in_seconds"] >= REAPABLE_SECONDS)
    return local_redis


@pytest.fixture
async def async_redis(
    local_redis: LocalRedis, redis_client: redis.Redis
) -> AsyncIterator[AsyncRedis]:
    """Asyncio client of the same, emptied Redis."""
    del redis_client
    async with connect_async(Endpoint(url=local_redis.url)) as client:
        yield client


@pytest.fixture
def settings(local_redis: LocalRedis) -> Settings:
    """Settings that point at the private Redis."""
    return load_settings(redis__url=local_redis.url)


@pytest.fixture(autouse=True)
def _no_leaked_keys(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail an integration test that leaves keys which no TTL will ever remove."""
    marked = request.node.get_closest_marker("integration")
    if marked is None or "redis_client" not in request.fixturenames:
        yield
        return
    client: redis.Redis = request.getfixturevalue("redis_client")
    yield
    if request.node.get_closest_marker("may_leak") is None:
        assert leaked_keys(client) == []
