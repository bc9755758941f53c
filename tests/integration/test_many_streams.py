"""More blocking streams on one `Client` than redis-py's pools have connections by default."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from tests.support.helpers import wait_until
from tests.support.scripted_worker import ScriptedWorker

if TYPE_CHECKING:
    import redis

    from mlx_serving import Client

STREAMS = 150
SECONDS = 60.0  # for what takes a few on an idle machine


def test_every_stream_is_live_while_all_are_open(client: Client, redis_client: redis.Redis) -> None:
    jobs = client.submit_many(
        {"model": "tally", "prompt": "x", "result_ttl": 60, "seed": seed} for seed in range(STREAMS)
    )
    arrived: dict[str, list[int]] = {job.id: [] for job in jobs}

    def read(job_id: str) -> None:
        for event in client.stream(job_id):
            arrived[job_id].append(event.seq)

    readers = [threading.Thread(target=read, args=(job.id,)) for job in jobs]
    for reader in readers:
        reader.start()
    channels = redis_client.pubsub_channels
    wait_until(lambda: len(channels()) == STREAMS, timeout=SECONDS, what="every stream subscribed")
    rows = ScriptedWorker(redis_client, client.keys).claim(STREAMS)
    for row in rows:
        row.attempt()
    wait_until(lambda: all(arrived.values()), timeout=SECONDS, what="a first event in each")
    for row in rows:
        row.say("a")
        row.end()
    for reader in readers:
        reader.join(SECONDS)
    assert list(arrived.values()) == [[1, 2, 3]] * STREAMS
