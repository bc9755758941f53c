"""The prefix cache on the shipped model: right answers from shared blocks, hits in `usage`."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest

from mlx_serving.producer.client import Client
from mlx_serving.tally.tasks import MODEL_PATH
from mlx_serving.worker.engine.loader import EngineOptions, load_engine
from mlx_serving.worker.engine.text.prompts import PromptEncoder
from tests.acceptance.test_engine_tally import assert_right, examples, requests_of
from tests.support.engine_support import drive, prefixes_of
from tests.support.worker_process import WorkerProcess

if TYPE_CHECKING:
    import redis

    from mlx_serving.common.redis.local import LocalRedis
    from mlx_serving.common.results import GenerationResult

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

LONG = " ".join(f"w{n}" for n in range(24))


def test_every_task_is_answered_right_the_first_time_and_from_the_cache() -> None:
    options = EngineOptions(prefill_chunk_tokens=128, kv_cache="paged")
    engine = load_engine(MODEL_PATH, options, name="tally")
    tasks = list(examples(40, seed=1))
    requests = requests_of(PromptEncoder(engine.tokenizer), tasks)
    first = drive(engine, requests, every=1)
    assert_right(tasks, first)
    random.Random(2).shuffle(requests)
    again = drive(engine, requests, every=1)
    assert again == first
    long = [request.id for request in requests if len(request.prompt) > 32]
    assert long
    assert all(again[name].cached_tokens >= 32 for name in long)
    prefixes_of(engine).check()


def echo(client: Client, text: str, **fields: Any) -> GenerationResult:
    messages = [{"role": "user", "content": f"echo {text}"}]
    handle = client.submit(
        model="tally", messages=messages, temperature=0.0, max_tokens=300, **fields
    )
    return handle.result(timeout=60)


def cached(result: GenerationResult) -> int:
    assert result.usage is not None
    details = result.usage.prompt_tokens_details
    return details.cached_tokens if details else 0


def test_usage_reports_hits_to_the_tenant_that_had_the_prompt_before(
    local_redis: LocalRedis, redis_client: redis.Redis
) -> None:
    del redis_client  # empties Redis
    settings: dict[str, Any] = {"cache__kind": "paged"}  # the prefix cache is on by default
    with WorkerProcess(local_redis.url, "w1", None, **settings) as worker:
        worker.serving()
        with Client(local_redis.url) as client:
            first, second = echo(client, LONG, tenant="a"), echo(client, LONG, tenant="a")
            other, nobodys = echo(client, LONG, tenant="b"), echo(client, LONG)
    assert {result.text for result in (first, second, other, nobodys)} == {first.text}
    assert second.usage is not None
    computed = second.usage.prompt_tokens - cached(second)
    assert 1 <= computed <= 32
    assert [cached(first), cached(other), cached(nobodys)] == [0, 0, 0]
