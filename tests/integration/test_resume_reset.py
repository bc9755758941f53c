"""Another revision of the model at a resume: `model_changed`, or a `reset` where allowed."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from mlx_serving import AsyncClient, Client, StreamReset
from mlx_serving.common import events, results
from mlx_serving.common.protocol import calls
from mlx_serving.producer.assembler import StreamAssembler
from tests.support.stepped_worker import SteppedWorker, spelled_engine, words
from tests.support.worker_process import job_events

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlx_serving.common.redis.local import LocalRedis
    from mlx_serving.producer.handles import JobHandle

pytestmark = pytest.mark.usefixtures("settled_redis")

OLD, NEW = "old wörds 世界", "new text 👋"
CUT = 12  # inside a character
CHANGES = {"revision": {"revision": "r2"}, "tokenizer": {"tokenizer_hash": "h2"}}


@contextmanager
def running(local_redis: LocalRedis, text: str = OLD, **model: Any) -> Iterator[SteppedWorker]:
    with SteppedWorker(local_redis.url, spelled_engine(text, **model), words) as worker:
        yield worker


def submit(client: Client, on_model_change: str = "reset", **fields: Any) -> JobHandle:
    return client.submit(
        model="tally", prompt="x", result_ttl=60, on_model_change=on_model_change, **fields
    )


@pytest.fixture
def cut(local_redis: LocalRedis, client: Client) -> JobHandle:
    """A job that lost its worker in the middle."""
    return begin(local_redis, submit(client))


def begin(local_redis: LocalRedis, handle: JobHandle) -> JobHandle:
    with running(local_redis) as worker:
        worker.claim().decode(CUT)
        worker.die()
    return handle


def kinds(client: Client, handle: JobHandle) -> list[str]:
    """The types of a job's events, neighbours of one type as one."""
    stream = job_events(client, handle.id)
    assert [event.seq for event in stream] == list(range(1, len(stream) + 1))
    types = [event.type for event in stream]
    return [kind for n, kind in enumerate(types) if n == 0 or types[n - 1] != kind]


@pytest.mark.parametrize("model", CHANGES.values(), ids=CHANGES)
def test_without_leave_the_job_fails_and_keeps_what_it_had(
    local_redis: LocalRedis, client: Client, model: dict[str, str]
) -> None:
    handle = begin(local_redis, submit(client, "fail"))
    with running(local_redis, NEW, **model) as worker:
        worker.claim().finish()
    result = handle.result(timeout=1)
    assert result.error is not None
    assert (result.state.value, result.error.code) == ("failed", "model_changed")
    assert result.text == "old wörds "
    assert len(result.token_ids) == CUT
    assert kinds(client, handle) == ["attempt", "tokens", "end"]


@pytest.mark.parametrize("model", CHANGES.values(), ids=CHANGES)
def test_with_leave_it_begins_anew_after_a_reset_event(
    local_redis: LocalRedis, client: Client, cut: JobHandle, model: dict[str, str]
) -> None:
    with running(local_redis, NEW, **model) as worker:
        worker.claim().finish()
    result = cut.result(timeout=1)
    assert (result.state.value, result.text) == ("finished", NEW)
    assert result.token_ids == [*range(1, len(NEW.encode()) + 1), 0]
    assert result.usage is not None
    assert result.usage.completion_tokens == len(result.token_ids)
    assert kinds(client, cut) == ["attempt", "tokens", "attempt", "reset", "tokens", "end"]
    assert results.assemble(cut.id, job_events(client, cut.id)).choices == result.choices


def test_the_same_model_goes_on_without_a_reset(
    local_redis: LocalRedis, client: Client, cut: JobHandle
) -> None:
    with running(local_redis) as worker:
        worker.claim().finish()
    assert cut.result(timeout=1).text == OLD
    assert "reset" not in kinds(client, cut)


def test_nothing_is_reset_where_nothing_was_written(
    local_redis: LocalRedis, client: Client
) -> None:
    handle = submit(client)
    with running(local_redis) as worker:
        worker.claim().die()
    with running(local_redis, NEW, revision="r2") as worker:
        worker.claim().finish()
    assert handle.result(timeout=1).text == NEW
    assert kinds(client, handle) == ["attempt", "tokens", "end"]


def test_text_says_where_it_starts_over(
    local_redis: LocalRedis, client: Client, cut: JobHandle
) -> None:
    with running(local_redis, NEW, revision="r2") as worker:
        worker.claim().finish()
    pieces: list[str] = []
    with pytest.raises(StreamReset) as caught:
        pieces.extend(iter(cut.text()))
    rest = client.stream(cut.id, caught.value.cursor, text=True)
    assert "".join(rest) == NEW


async def test_text_says_where_it_starts_over_async(
    local_redis: LocalRedis, cut: JobHandle
) -> None:
    with running(local_redis, NEW, revision="r2") as worker:
        worker.claim().finish()
    async with AsyncClient(local_redis.url) as client:
        with pytest.raises(StreamReset) as caught:
            async for _ in client.stream(cut.id, text=True):
                pass
        rest = [text async for text in client.stream(cut.id, caught.value.cursor, text=True)]
        assert (await client.result(cut.id)).text == NEW
    assert "".join(rest) == NEW


@pytest.mark.parametrize("rows", [1, 2, 3], ids=["attempt", "reset", "first token"])
@pytest.mark.parametrize("after", ["new", "old"])
def test_a_death_around_the_reset_mixes_nothing(
    local_redis: LocalRedis, client: Client, cut: JobHandle, rows: int, after: str
) -> None:
    """The attempt, the reset and the first tokens may reach Redis in different calls."""
    with running(local_redis, NEW, revision="r2") as worker:
        worker.claim().step(2)
        written = worker.rows()[:rows]
        assert len(written) == rows
        call = calls.commit(worker.name, written, lease_ms=30_000)
        assert {reply.status for reply in worker.child.protocol.run(call)} == {"OK"}
        worker.die()
    new = after == "new"
    with running(local_redis, NEW if new else OLD, revision="r2" if new else "r1") as worker:
        worker.claim().finish()
    assert cut.result(timeout=1).text == (NEW if new else OLD)
    expected = {"new": [1, 1, 1], "old": [0, 1, 2]}[after][rows - 1]
    assert kinds(client, cut).count("reset") == expected
    assert results.assemble(cut.id, job_events(client, cut.id)).text == (NEW if new else OLD)


def test_a_job_cancelled_after_its_reset_keeps_only_what_came_after_it(
    local_redis: LocalRedis, cut: JobHandle
) -> None:
    with running(local_redis, NEW, revision="r2") as worker:
        worker.claim().decode(4)
        cut.cancel()
        worker.die()  # the script ends the job: its record is put together from the events
    result = cut.result(timeout=1)
    assert (result.state.value, result.text) == ("cancelled", "new ")


def test_live_and_replayed_a_reset_comes_once_and_in_its_place(
    local_redis: LocalRedis, client: Client, cut: JobHandle
) -> None:
    with running(local_redis, NEW, revision="r2") as worker:
        worker.claim().finish()
    payloads = [events.encode(event) for event in job_events(client, cut.id)]
    assembler = StreamAssembler()
    given = assembler.replay(payloads[:5], committed=5, over=False)
    for payload in (*payloads[20:], *payloads[5:20]):
        given += assembler.receive(payload)
    assert assembler.needs_replay, "the stream confirms where another attempt begins"
    rest = payloads[assembler.replay_from :]
    given += assembler.replay(rest, committed=len(payloads), over=True)
    assert [events.encode(event) for event in given] == payloads
    assert assembler.ended
