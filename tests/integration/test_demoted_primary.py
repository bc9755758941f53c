"""A primary that turns replica and cuts no connection (D1, D2): whoever writes goes to the new one.

So do managed services that move a name or an address, and an operator's `FAILOVER`.
"""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from mlx_serving import AsyncClient, Client
from mlx_serving.common.redis.local import LocalRedis
from tests.support.helpers import free_port, wait_until
from tests.support.lossy_proxy import LossyProxy
from tests.support.redis_trouble import Followers, check_results, check_view
from tests.support.sentinels import SentinelFleet
from tests.support.worker_process import WorkerProcess, quick_settings, submit

if TYPE_CHECKING:
    from collections.abc import Iterator

    import redis

pytestmark = pytest.mark.slow

TOKENS, JOBS = 150, 6


@contextmanager
def two_servers() -> Iterator[tuple[LocalRedis, LocalRedis]]:
    """A primary and its replica."""
    options = {"repl-diskless-sync-delay": "0"}
    with (
        LocalRedis(port=free_port(), options=options) as first,
        LocalRedis(port=free_port(), options=options) as second,
        second.client() as replica,
    ):
        replica.replicaof("127.0.0.1", first.port)
        wait_until(lambda: replica.info("replication")["master_link_status"] == "up", timeout=10)
        yield first, second


def hand_over(primary: redis.Redis) -> None:
    """Let its replica take over, with all that was written; every connection stays open."""
    mine = primary.client_id()
    primary.execute_command("FAILOVER")
    wait_until(lambda: primary.info("replication")["role"] == "slave", timeout=10)
    assert primary.client_id() == mine


async def submit_async(url: str) -> str:
    async with AsyncClient(settings=quick_settings(url)) as client:
        return (await client.submit(model="tally", prompt="x", max_tokens=5, result_ttl=60)).id


def test_behind_one_url_workers_and_clients_find_the_new_primary() -> None:
    with (
        two_servers() as (first, second),
        LossyProxy(first.socket) as name,
        Client(settings=quick_settings(name.url)) as client,
        WorkerProcess(name.url, "busy", rate=30) as busy,
        first.client() as old,
        second.client() as new,
    ):
        busy.serving()
        followers = Followers(client, submit(client, JOBS, TOKENS))
        wait_until(lambda: min(followers.tokens()) > 5, timeout=20)
        name.lead_to(second.socket)
        hand_over(old)
        followers.finish()
        followers.check(TOKENS)
        assert followers.attempts() == [1] * JOBS  # nobody lost a lease over it
        later = [handle.id for handle in submit(client, 2, 5)]
        later.append(asyncio.run(submit_async(name.url)))
        check_results(client, later, 5)
        check_view(new, [*followers.events, *later])
        assert new.info("replication")["role"] == "master"
        busy.terminate()
        assert busy.exit_status() == 0


def test_an_idle_worker_and_an_open_client_find_it_too() -> None:
    with (
        two_servers() as (first, second),
        LossyProxy(first.socket) as name,
        Client(settings=quick_settings(name.url)) as client,
        WorkerProcess(name.url, "idle") as idle,
        first.client() as old,
    ):
        idle.serving()
        check_results(client, [handle.id for handle in submit(client, 1, 5)], 5)
        name.lead_to(second.socket)
        hand_over(old)
        check_results(client, [handle.id for handle in submit(client, 2, 5)], 5)


def test_async_clients_leave_it_with_their_next_write() -> None:
    async def go(url: str, hand_over: object) -> None:
        async with AsyncClient(settings=quick_settings(url)) as client:
            job = {"model": "tally", "prompt": "x", "max_tokens": 5, "result_ttl": 60}
            await client.submit(job)
            await asyncio.to_thread(hand_over)  # type: ignore[arg-type]
            await client.submit(job)

    with (
        two_servers() as (first, second),
        LossyProxy(first.socket) as name,
        first.client() as old,
        second.client() as new,
    ):

        def move() -> None:
            name.lead_to(second.socket)
            hand_over(old)

        asyncio.run(go(name.url, move))
        assert new.llen("rq:queue:tally:default") == 2


@pytest.mark.chaos
def test_behind_sentinels_that_cut_nothing_they_find_it_too() -> None:
    with (
        SentinelFleet() as fleet,
        Client(settings=quick_settings(fleet.url, **fleet.settings)) as client,
        WorkerProcess(fleet.url, "busy", rate=30, **fleet.settings) as busy,
        fleet.nodes[0].client() as old,
        fleet.nodes[1].client() as new,
    ):
        busy.serving()
        followers = Followers(client, submit(client, JOBS, TOKENS))
        wait_until(lambda: min(followers.tokens()) > 5, timeout=20)
        fleet.forget()  # Sentinels that saw it themselves would cut the connections
        hand_over(old)
        fleet.watch(fleet.nodes[1])
        followers.finish()
        followers.check(TOKENS)
        assert followers.attempts() == [1] * JOBS
        check_results(client, [handle.id for handle in submit(client, 2, 5)], 5)
        check_view(new, followers.events)
