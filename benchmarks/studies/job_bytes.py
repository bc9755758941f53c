"""What a job takes of Redis's memory from its enqueue until it is forgotten.

    python -m benchmarks.studies.job_bytes

Jobs of 200 characters that answer 500 tokens run on a worker whose model is simulated. *Bytes* are
`MEMORY USAGE` of all keys but the worker's own, over the jobs. *Jobs/s of 2 GB*: as many as end in
each second while all of them, kept for `events_ttl` and `result_ttl`, fit into 2 GiB.
"""

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Final

import redis

from benchmarks.lib.harness import MODEL, Figure, bench_settings, table
from mlx_serving.common.events import decode
from mlx_serving.common.lifetimes import Lifetimes
from mlx_serving.common.protocol.client import Protocol
from mlx_serving.common.redis.local import LocalRedis
from mlx_serving.common.settings import Settings
from mlx_serving.common.telemetry import configure_logging
from mlx_serving.producer.client import Client
from mlx_serving.worker.models.loading import EngineSpec
from mlx_serving.worker.process.child import Child, ChildSpec

JOBS: Final = 64
TOKENS: Final = 500
PROMPT: Final = "p" * 200
RESULT_TTL: Final = 3600
MEMORY: Final = 2**31
OF_WORKERS: Final = ("mlxs:worker:", "mlxs:claim:", "rq:worker")


def bytes_a_job(client: redis.Redis) -> float:
    """Bytes of all keys but those of workers, over the jobs."""
    names = [n for n in client.scan_iter(count=1000) if not n.decode().startswith(OF_WORKERS)]
    return sum(int(client.memory_usage(name, samples=0) or 0) for name in names) / JOBS


@contextmanager
def worker(settings: Settings, rate: float) -> Iterator[None]:
    """Serve in a thread, as many rows as there are jobs."""
    child = Child(ChildSpec(settings, MODEL, "w", EngineSpec("simulated", "", rate)))
    thread = Thread(target=child.run)
    thread.start()
    try:
        yield
    finally:
        child.messages.post("hand_over")
        thread.join()


def wait_until_half(protocol: Protocol, job_id: str) -> None:
    """Wait until half of a job's tokens are in Redis."""
    tokens = 0
    while tokens < TOKENS / 2:
        time.sleep(0.01)
        events = map(decode, protocol.read_events(job_id))
        tokens = sum(len(choice.token_ids) for event in events for choice in event.choices)


def measure(rate: float, *, stream: bool) -> list[Figure]:
    """Bytes in each part of a job's life, and how many jobs end in each second of 2 GiB."""
    with LocalRedis() as server, server.client() as client:
        settings = bench_settings(server.url, batch__max_rows=JOBS)
        with Client(settings=settings) as producer:
            job = {"model": MODEL, "prompt": PROMPT, "max_tokens": TOKENS, "stream": stream}
            handles = producer.submit_many([job | {"result_ttl": RESULT_TTL}] * JOBS)
            found = {"queued": bytes_a_job(client)}
            with worker(settings, rate):
                wait_until_half(Protocol(client, producer.keys), handles[-1].id)
                found["running, half of its tokens"] = bytes_a_job(client)
                for handle in handles:
                    handle.result(timeout=120)
            found["ended"] = bytes_a_job(client)
            client.delete(*(producer.keys.events(handle.id) for handle in handles))
            found["after events_ttl"] = bytes_a_job(client)
            for handle in handles:
                handle.forget()
            found["forgotten"] = bytes_a_job(client)
    events_ttl = Lifetimes().events
    held = found["ended"] * events_ttl + found["after events_ttl"] * (RESULT_TTL - events_ttl)
    figures = [Figure(name, value, "bytes") for name, value in found.items()]
    return [*figures, Figure("jobs/s of 2 GB", MEMORY / held, "jobs/s")]


def main() -> None:
    """Print a table for jobs that are streamed and one for bulk."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rate", type=float, default=400.0, help="tokens a second of each row")
    options = parser.parse_args()
    configure_logging(log_format="json", level="error")
    print(table({
        "streamed": measure(options.rate, stream=True),
        "bulk (stream: false)": measure(options.rate, stream=False),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
