"""Right answers, for the right jobs, through a real worker, Redis and RQ, whatever happens."""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import json
import multiprocessing
import random
import signal
from typing import TYPE_CHECKING, Any

import pytest

from mlx_serving.common.states import JobState
from mlx_serving.producer.async_client import AsyncClient
from mlx_serving.producer.client import Client
from mlx_serving.tally.examples import Example, check, digits_of
from mlx_serving.tally.tasks import TASKS
from tests.support.helpers import wait_until
from tests.support.worker_process import WorkerProcess

if TYPE_CHECKING:
    from collections.abc import Iterator

    import redis

    from mlx_serving.common.events import Event
    from mlx_serving.common.redis.local import LocalRedis
    from mlx_serving.common.results import GenerationResult

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.7, "min_p": 0.2},
    {"temperature": 1.0, "top_p": 0.6},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 0.5, "top_k": 3, "top_p": 0.7, "min_p": 0.1},
]
# Chi-square of 10 equally likely digits, 9 degrees of freedom, alpha = 0.001
CHI_SQUARE_LIMIT = 27.88


def count_job(first: int, last: int, **fields: Any) -> dict[str, Any]:
    prompt = f"count from {first} to {last}"
    return job_of([{"role": "user", "content": prompt}], temperature=0.0, **fields)


def count_answer(first: int, last: int) -> str:
    return " ".join(map(str, range(first, last + 1)))


def job_of(messages: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    return {"model": "tally", "messages": messages, "max_tokens": 4200, **fields}


def mixed_example(rng: random.Random) -> tuple[Example, dict[str, Any]]:
    name = rng.choice(sorted(TASKS))
    example = TASKS[name].sample(rng, held_out=True, longest=40)
    sampling = {"temperature": 1.0} if name == "dice" else rng.choice(SAMPLINGS)
    messages = [openai_message(message) for message in example.messages]
    job = job_of(messages, **sampling, seed=rng.getrandbits(64))
    return example, job | ({"tools": example.tools} if example.tools else {})


def openai_message(message: dict[str, Any]) -> dict[str, Any]:
    """The API's form of a message: a tool call's arguments are a JSON text."""
    calls = [
        call | {"function": call["function"] | {"arguments": json.dumps(arguments)}}
        for call in message.get("tool_calls") or ()
        if not isinstance(arguments := call["function"]["arguments"], str)
    ]
    return message | {"tool_calls": calls} if calls else message


def as_decoded(result: GenerationResult) -> str:
    """What the model wrote, its tool calls included, as it spells them."""
    bodies = [
        {"name": call.function.name, "arguments": json.loads(call.function.arguments)}
        for call in result.tool_calls
    ]
    calls = [
        f"<tool_call>\n{json.dumps(body, ensure_ascii=False)}\n</tool_call>" for body in bodies
    ]
    return "".join(calls) + result.text


def produce(url: str, seed: int, jobs: int) -> list[tuple[str, str, str | None]]:
    """One producer process: submit, stream, and return what was wrong."""
    rng = random.Random(seed)
    work = [mixed_example(rng) for _ in range(jobs)]
    with Client(url) as client:
        handles = client.submit_many([job for _, job in work])
        wrong = []
        for (example, _), handle in zip(work, handles, strict=True):
            text, result = "".join(handle.text()), handle.result()
            if not check(example, as_decoded(result)) or result.text != text:
                wrong.append((example.key, as_decoded(result), example.answer))
    return wrong


@pytest.fixture
def worker(local_redis: LocalRedis, redis_client: redis.Redis) -> Iterator[WorkerProcess]:
    del redis_client  # empties Redis
    with WorkerProcess(local_redis.url, "w1", None, worker__drain_seconds=1) as started:
        yield started.serving()


@pytest.mark.usefixtures("worker")
def test_200_mixed_jobs_from_8_processes_each_get_their_own_answer(
    local_redis: LocalRedis,
) -> None:
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(8, mp_context=context) as pool:
        runs = [pool.submit(produce, local_redis.url, seed, 25) for seed in range(8)]
        wrong = [answer for run in runs for answer in run.result()]
    assert wrong == []


async def follow(client: AsyncClient, job_id: str) -> list[Event]:
    return [event async for event in client.stream(job_id)]


def check_one_sequence(events: list[Event], answer: str, attempts: int) -> None:
    """Every event once, in order, without a gap; attempts continue where the last one stood."""
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert "".join(event.text for event in events) == answer
    assert [e.type for e in events if e.type == "attempt"] == ["attempt"] * attempts
    assert (events[-1].type, events[-1].state) == ("end", "finished")
    assert all(event.type != "end" for event in events[:-1])


def owners(client: redis.Redis, job_ids: list[str]) -> collections.Counter[Any]:
    return collections.Counter(client.hget(f"mlxs:job:{i}", "ow") for i in job_ids)


def committed(client: redis.Redis, job_ids: list[str]) -> list[int]:
    return [int(client.hget(f"mlxs:job:{i}", "seq") or 0) for i in job_ids]


@pytest.mark.chaos
@pytest.mark.parametrize("how", ["kill -9", "TERM"])
async def test_32_running_jobs_survive_the_loss_of_their_worker(
    local_redis: LocalRedis, redis_client: redis.Redis, worker: WorkerProcess, how: str
) -> None:
    spans = [(i, i + 149) for i in range(1, 33)]
    with WorkerProcess(local_redis.url, "w2", None) as second:
        second.serving()
        second.signal(signal.SIGSTOP)  # idle: the first one gets all 32
        async with AsyncClient(local_redis.url) as client:
            handles = await client.submit_many([count_job(*span) for span in spans])
            ids = [handle.id for handle in handles]
            streams = [asyncio.create_task(follow(client, i)) for i in ids]
            await asyncio.to_thread(
                wait_until, lambda: min(committed(redis_client, ids)) > 3, timeout=60
            )
            assert owners(redis_client, ids) == {b"w1": 32}
            if how == "TERM":
                worker.terminate()
                second.signal(signal.SIGCONT)
                assert await asyncio.to_thread(worker.exit_status, 60) == 0
            else:
                worker.kill()
                second.signal(signal.SIGCONT)
            sequences = await asyncio.wait_for(asyncio.gather(*streams), 150)
        taken = owners(redis_client, ids)
    for span, events in zip(spans, sequences, strict=True):
        attempts = sum(event.type == "attempt" for event in events)
        assert attempts in ({2} if how == "kill -9" else {1, 2})
        check_one_sequence(events, count_answer(*span), attempts)
    assert taken[b"w2"] >= (32 if how == "kill -9" else 1)


def dice(seed: int, size: int = 40) -> dict[str, Any]:
    prompt = [{"role": "user", "content": f"dice {size}"}]
    return job_of(prompt, temperature=1.0, seed=seed)


async def test_one_seed_gives_the_same_dice_whatever_happens_around_it(
    local_redis: LocalRedis, redis_client: redis.Redis
) -> None:
    # Without a grace time a drain hands over at once.
    with WorkerProcess(local_redis.url, "w1", None, worker__drain_seconds=0) as worker:
        worker.serving()
        await check_dice(local_redis, redis_client, worker)


async def check_dice(
    local_redis: LocalRedis, redis_client: redis.Redis, worker: WorkerProcess
) -> None:
    async with AsyncClient(local_redis.url) as client:

        async def tokens(job: dict[str, Any]) -> list[int]:
            result = await (await client.submit(**job)).result(timeout=120)
            assert result.state is JobState.FINISHED
            return result.token_ids

        ours = dice(7, 80)  # long enough to be still running when the worker is told to end
        alone = await tokens(ours)
        batch = [ours, *(dice(100 + i) for i in range(20))]
        batch += [count_job(1, 30 + i) for i in range(11)]
        random.Random(1).shuffle(batch)
        together = await asyncio.gather(*map(tokens, batch))
        assert alone in together
        assert sum(other == alone for other in together) == 1  # other seeds differ

        # A hand-off in the middle: enough company that the job is still running at TERM.
        company = [await client.submit(**count_job(1, 400)) for _ in range(24)]
        moved = await client.submit(**ours)
        await asyncio.to_thread(
            wait_until, lambda: min(committed(redis_client, [moved.id])) >= 3, timeout=60
        )
        worker.terminate()
        assert await asyncio.to_thread(worker.exit_status, 60) == 0
        assert redis_client.hget(f"mlxs:job:{moved.id}", "st") == b"queued"
        for handle in company:
            await handle.cancel()
        with WorkerProcess(local_redis.url, "w2", None) as second:
            second.serving()
            events = await asyncio.wait_for(follow(client, moved.id), 60)
            assert await tokens(ours) == alone  # on a second worker
    assert [t for e in events for c in e.choices for t in c.token_ids] == alone
    assert {e.worker for e in events if e.type == "attempt"} == {"w1", "w2"}


@pytest.mark.usefixtures("worker")
def test_dice_are_uniform(local_redis: LocalRedis) -> None:
    with Client(local_redis.url) as client:
        handles = client.submit_many([dice(seed) for seed in range(60)])
        digits = "".join(digits_of(handle.result(timeout=120).text) for handle in handles)
    counts = collections.Counter(digits)
    expected = len(digits) / 10
    assert len(digits) >= 60 * 38
    chi_square = sum((counts[d] - expected) ** 2 / expected for d in "0123456789")
    assert chi_square < CHI_SQUARE_LIMIT
