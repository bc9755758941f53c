"""A resume has no seam with a real model, greedy and drawn: cut after each token, and by kills."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Any

import pytest

from mlx_serving import Client
from mlx_serving.tally.tasks import MODEL_PATH
from mlx_serving.worker.engine.loader import EngineOptions, load_engine
from mlx_serving.worker.engine.text.prompts import PromptEncoder
from tests.support.freezing import FROZEN
from tests.support.helpers import wait_until
from tests.support.stepped_worker import SteppedWorker, told
from tests.support.worker_process import Hacks, WorkerProcess, job_events

if TYPE_CHECKING:
    from collections.abc import Iterator

    import redis

    from mlx_serving.common.redis.local import LocalRedis
    from mlx_serving.producer.handles import JobHandle

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(180),
    pytest.mark.may_leak(reason="a killed worker leaves its name in RQ's sets"),
]

ECHO = "echo 你好 🎲🍀 wörld"
JOBS: dict[str, dict[str, Any]] = {
    "greedy": {"content": "count from 97 to 104", "temperature": 0.0},
    "bytes of characters": {"content": ECHO, "temperature": 0.0},
    "stop string": {"content": "count from 97 to 120", "temperature": 0.0, "stop": ["103 104"]},
    "max_tokens": {"content": ECHO, "temperature": 0.0, "max_tokens": 11},
    "dice": {"content": "dice 20", "temperature": 1.0, "seed": 7},
    "filtered": {
        "content": "dice 12", "temperature": 0.8, "top_p": 0.9, "top_k": 8, "min_p": 0.02,
        "seed": 8,
    },
}  # fmt: skip


def submit(client: Client, content: str, **fields: Any) -> JobHandle:
    messages = [{"role": "user", "content": content}]
    given = {"model": "tally", "messages": messages, "max_tokens": 400, "result_ttl": 120}
    return client.submit(given | fields)


@pytest.fixture
def client(local_redis: LocalRedis) -> Iterator[Client]:
    with Client(local_redis.url) as client:
        yield client


@pytest.fixture
def stepped(settled_redis: LocalRedis) -> Iterator[SteppedWorker]:
    engine = load_engine(MODEL_PATH, EngineOptions(prefill_chunk_tokens=8), name="tally")
    encode = PromptEncoder(engine.tokenizer).encode
    with SteppedWorker(settled_redis.url, engine, encode) as worker:
        yield worker


@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)
def test_a_cut_after_any_token_leaves_no_seam(
    client: Client, stepped: SteppedWorker, job: dict[str, Any]
) -> None:
    handle = submit(client, **job)
    stepped.claim().finish()
    expected = told(client, handle)
    assert len(expected[0]) > 10
    for cut in range(len(expected[0])):
        handle = submit(client, **job)
        stepped.claim().decode(cut)
        stepped.leave(["kill", "hand over"][cut % 2])
        stepped.claim().finish()
        assert told(client, handle) == expected, f"cut after {cut} tokens"


def test_the_cuts_fall_inside_characters_and_held_back_stop_strings(
    client: Client, stepped: SteppedWorker
) -> None:
    """What the test above claims to cut, seen in the events."""
    for name in ("bytes of characters", "stop string"):
        handle = submit(client, **JOBS[name])
        stepped.claim()
        while stepped.held:
            stepped.decode(1)
        stream = job_events(client, handle.id)
        silent = [
            e for e in stream if e.type == "tokens" and not e.text and e.seq < len(stream) - 1
        ]
        assert silent, name  # tokens without text: the cut behind them is inside something


PHASES: dict[str, tuple[str, str]] = {
    "claim": ("claim", "greedy"),
    "prefill": ("prefill:2", "dice"),
    "first token": ("tokens:1", "dice"),
    "inside a character": ("tokens:2", "bytes of characters"),
    "inside a stop string": ("tokens:20", "stop string"),
}


@pytest.fixture(scope="module")
def second(local_redis: LocalRedis) -> Iterator[WorkerProcess]:
    """A worker that stands still but where a test lets it go on."""
    with WorkerProcess(local_redis.url, "second", None) as worker:
        yield worker.serving()
        worker.signal(signal.SIGCONT)


@pytest.mark.chaos
@pytest.mark.parametrize("phase", PHASES)
def test_a_worker_killed_in_this_phase_leaves_no_seam(
    settled_redis: LocalRedis,
    redis_client: redis.Redis,
    client: Client,
    second: WorkerProcess,
    phase: str,
) -> None:
    where, name = PHASES[phase]
    handle = submit(client, **JOBS[name])
    handle.result(timeout=30)
    expected = told(client, handle)
    second.signal(signal.SIGSTOP)
    try:
        first = WorkerProcess(
            settled_redis.url, f"first {phase}".replace(" ", "-"), None, Hacks(freeze=where),
            batch__prefill_chunk_tokens=8,
        )  # fmt: skip
        with first:
            first.serving()
            handle = submit(client, **JOBS[name])
            wait_until(lambda: FROZEN in first.log(), timeout=20, what="frozen")
            assert redis_client.hget(f"mlxs:job:{handle.id}", "ow") == first.name.encode()
            tokens = int(where.partition(":")[2]) if where.startswith("tokens") else 0
            wait_until(lambda: written(client, handle) == tokens, what="written")
    finally:
        second.signal(signal.SIGCONT)
    handle.result(timeout=30)
    assert told(client, handle) == expected
    opened = [e.worker for e in job_events(client, handle.id) if e.type == "attempt"]
    assert opened == ([first.name] if tokens else []) + ["second"]


def written(client: Client, handle: JobHandle) -> int:
    return sum(len(d.token_ids) for e in job_events(client, handle.id) for d in e.choices)
