"""Redis's own ceiling: redis-benchmark on the protocol's scripts, with arguments as workers send.

    python -m benchmarks.studies.redis_ceiling --rows 15

* enqueue: one job a call, an RQ hash with a payload of a 200-character prompt, ids at random.
* claim: 32 jobs a call, of those just enqueued.
* commit: one token event of each of 15 running jobs a call; jobs at random out of 100,000 that
  have committed their first event. redis-benchmark can't count up, so a job that is drawn again
  gets DUP; the figure counts the events that were written.
* renew: the leases of 15 running jobs a call.

Nobody is subscribed: what delivering to consumers costs is in `benchmarks.contract.scale`.
"""

import argparse
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import redis

from benchmarks.lib.harness import MODEL, Figure, table
from mlx_serving.common import events
from mlx_serving.common.attempts import Attempt
from mlx_serving.common.events import ChoiceDelta
from mlx_serving.common.job.schema import GenerationJob
from mlx_serving.common.protocol import calls
from mlx_serving.common.protocol.calls import Call, CommitRow
from mlx_serving.common.protocol.keys import Keys
from mlx_serving.common.protocol.scripts import script_text
from mlx_serving.common.queues import PROTOCOL, queue_name
from mlx_serving.common.redis.local import LocalRedis
from mlx_serving.producer.envelope import seal

QUEUE = queue_name(MODEL, "default")
RUNNING = 100_000  # jobs that commits draw from
RANDOM_ID = "__rand_int__"  # redis-benchmark puts 12 digits here
CONNECTIONS = 16
ROWS = 15  # of a commit and a renewal
WORKER = "w"
KEYS = Keys()
PROMPT = ("The quick brown fox jumps over the lazy dog. " * 5)[:200]

# The running jobs of the commit and renew ceilings, as claim and a first commit leave them.
RUNNING_ATTEMPT = Attempt(RANDOM_ID, 1, "n")
PREPARE = """
local worker, first, last = ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5])
local now = now_ms()
for n = first, last do
  local id = string.format('%012d', n)
  create_job(id, ARGV[6], now, {})
  set_fields(id, {state = 'running', owner = worker, epoch = 1, nonce = 'n', seq = 1,
    started_ms = int(now), first_token_ms = int(now)})
  redis.call('ZADD', k_open(ARGV[6]), int(now), id)
  redis.call('ZADD', k_leases(ARGV[6]), int(now + 600000), id)
  redis.call('HSET', k_rq_job(id), 'status', 'started')
  append_event(id, 1, entry_of(1, 'n', ENTRY.body, ARGV[7]))
end
"""


def benchmark(client: redis.Redis, socket: str, call: Call[Any], requests: int, r: int) -> float:
    """Calls a second, by redis-benchmark on one script call."""
    sha = client.script_load(script_text(call.script))
    program = shutil.which("redis-benchmark")
    assert program is not None
    words: list[str | bytes] = [sha, "0", KEYS.prefix, KEYS.rq_prefix, *map(_word, call.arguments)]
    command: list[str | bytes] = [
        program, "-s", socket, "-c", str(CONNECTIONS), "-n", str(requests), "-r", str(r), "--csv",
        "evalsha", *words,
    ]  # fmt: skip
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, errors="replace", timeout=60
    )
    return float(done.stdout.splitlines()[-1].rsplit('","', 7)[1].strip('"'))


def _word(argument: object) -> bytes:
    return argument if isinstance(argument, bytes) else str(argument).encode()


def enqueue_call() -> Call[Any]:
    """One job, as a producer sends it, but for its payload's bytes."""
    job = GenerationJob.parse({"model": MODEL, "prompt": PROMPT, "max_tokens": 64, "seed": 1})
    entry = seal(job, max_payload_bytes=1 << 20)
    # Compressed bytes can't go on a command line: as many letters instead.
    fields = {
        name: "x" * len(value) if isinstance(value, bytes) else value
        for name, value in entry.rq_fields.items()
    }
    return calls.enqueue(replace(entry, job_id=RANDOM_ID, rq_fields=fields))


def claim_call() -> Call[Any]:
    """32 jobs."""
    return calls.claim(
        WORKER, [QUEUE], nonce=RANDOM_ID, most=32, lease_ms=600_000, protocol=PROTOCOL,
        capacity_tokens=1 << 20, max_payload_bytes=1 << 20,
    )  # fmt: skip


def commit_call(rows: int) -> Call[Any]:
    """One token of each of so many jobs."""
    delta = ChoiceDelta(index=0, text=" 1234", token_ids=[1234])
    event = events.tokens_event(attempt=1, seq=2, choices=[delta])
    row = CommitRow.of(RUNNING_ATTEMPT, event)
    return calls.commit(WORKER, [row] * rows, lease_ms=600_000)


def prepare_running(client: redis.Redis, running: int) -> None:
    """Put so many running jobs there; a multiple of 1,000."""
    head = script_text("renew").partition("-- Renews leases")[0]
    event = events.body(events.attempt_event(
        attempt=1, seq=1, worker=WORKER, model=MODEL, model_revision="r", tokenizer_hash="h",
    ))  # fmt: skip
    for first in range(0, running, 1000):
        client.eval(
            head + PREPARE, 0, KEYS.prefix, KEYS.rq_prefix, WORKER, first, first + 999, QUEUE, event
        )


def written(client: redis.Redis, running: int) -> int:
    """Events that the commits wrote."""
    reader = client.pipeline(transaction=False)
    for number in range(running):
        reader.xlen(KEYS.events(f"{number:012d}"))
    return sum(length - 1 for length in reader.execute())


def ceilings(rows: int = ROWS, jobs: int = 10_000, running: int = RUNNING) -> Iterator[Figure]:
    """Each script's ceiling on a Redis of its own, over a unix socket."""
    with LocalRedis() as server, server.client() as client:
        path = str(server.socket)
        enqueued = benchmark(client, path, enqueue_call(), jobs, 10**9)
        yield Figure("enqueue, 1 job a call", enqueued, "jobs/s")
        there = client.llen(KEYS.rq_queue(QUEUE))
        claimed = benchmark(client, path, claim_call(), there // 32, 10**9)
        yield Figure("claim, 32 jobs a call", 32 * claimed, "jobs/s")
        client.flushall()
        prepare_running(client, running)
        requests = running // 4 // rows
        committed = benchmark(client, path, commit_call(rows), requests, running)
        yield Figure(f"commit, {rows} rows a call, rows", rows * committed, "rows/s")
        events_a_call = written(client, running) / requests
        yield Figure(f"commit, {rows} rows a call, written", events_a_call * committed, "events/s")
        renew = calls.renew(WORKER, [RUNNING_ATTEMPT] * rows, lease_ms=600_000)
        renewed = benchmark(client, path, renew, 4 * requests, running)
        yield Figure(f"renew, {rows} leases a call", rows * renewed, "leases/s")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=ROWS)
    options = parser.parse_args(arguments)
    for figure in ceilings(options.rows):
        print(table({"redis-benchmark": [figure]}), flush=True)


if __name__ == "__main__":
    main()
