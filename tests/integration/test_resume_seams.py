"""A resume has no seam (D4): cut anywhere, a job's tokens and text are an undisturbed run's.

The engine is the real one over a script of bytes, so that every cut falls where it is wanted:
inside a character, inside a held-back stop string, on the last token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import redis

from mlx_serving.common.protocol import calls
from tests.support.stepped_worker import LostReply, SteppedWorker, spelled_engine, told, words
from tests.support.worker_process import job_events

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mlx_serving import Client
    from mlx_serving.common.redis.local import LocalRedis
    from mlx_serving.producer.handles import JobHandle

pytestmark = pytest.mark.usefixtures("settled_redis")

TEXT = "né 👋🏽 世界 stop STO STOP!"
BYTES = len(TEXT.encode())
JOBS: dict[str, dict[str, Any]] = {
    "to its end": {},
    "stop string": {"stop": ["STOP"]},
    "stop string of many bytes": {"stop": ["世界 stopp", "👋🏽 世界 stop S"]},
    "max_tokens at the end of a character": {"max_tokens": 3},
    "max_tokens inside a character": {"max_tokens": 6},
    "max_tokens inside a stop string": {"max_tokens": BYTES - 3, "stop": ["STOP"]},
    "max_tokens on the last token": {"max_tokens": BYTES},
}
HOW = ["kill", "hand over"]
KINDS = ["byte_level", "byte_fallback"]


@pytest.fixture
def worker(local_redis: LocalRedis) -> Iterator[SteppedWorker]:
    with SteppedWorker(local_redis.url, spelled_engine(TEXT), words) as worker:
        yield worker


def submit(client: Client, **fields: Any) -> JobHandle:
    given = {"model": "tally", "prompt": "x", "max_tokens": 4096, "result_ttl": 60}
    return client.submit(given | fields)


def undisturbed(client: Client, worker: SteppedWorker, **fields: Any) -> tuple[Any, ...]:
    handle = submit(client, **fields)
    worker.claim().finish()
    return told(client, handle)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("fields", JOBS.values(), ids=JOBS)
def test_a_cut_after_any_token_leaves_no_seam(
    local_redis: LocalRedis, client: Client, how: str, kind: str, fields: dict[str, Any]
) -> None:
    engine = spelled_engine(TEXT, kind)
    with SteppedWorker(local_redis.url, engine, words) as worker:
        expected = undisturbed(client, worker, **fields)
        tokens = len(expected[0])
        for cut in range(tokens):
            handle = submit(client, **fields)
            worker.claim().decode(cut)
            assert worker.held
            worker.leave(how)
            worker.claim().finish()
            assert told(client, handle) == expected, f"cut after {cut} tokens"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fields", JOBS.values(), ids=JOBS)
def test_an_attempt_for_each_token_leaves_no_seam(
    local_redis: LocalRedis, client: Client, kind: str, fields: dict[str, Any]
) -> None:
    engine = spelled_engine(TEXT, kind)
    with SteppedWorker(local_redis.url, engine, words) as worker:
        expected = undisturbed(client, worker, **fields)
        handle = submit(client, **fields)
        for count in range(len(expected[0])):
            worker.claim().decode(1)
            if worker.held:
                worker.leave(HOW[count % 2])
        assert told(client, handle) == expected
        opened = [e for e in job_events(client, handle.id) if e.type == "attempt"]
        assert [e.attempt for e in opened] == list(range(1, len(expected[0]) + 1))
        assert client.status(handle.id).attempts == 0  # nobody was charged


@pytest.mark.parametrize("how", HOW)
def test_a_cut_right_after_the_claim_or_within_the_prefill(
    local_redis: LocalRedis, client: Client, how: str
) -> None:
    engine = spelled_engine(TEXT, chunk=4)
    with SteppedWorker(local_redis.url, engine, words) as worker:
        prompt = "word " * 20  # five chunks
        expected = undisturbed(client, worker, prompt=prompt)
        for steps in range(5):
            handle = submit(client, prompt=prompt)
            worker.claim().step(steps)
            assert (engine.running, engine.waiting) == (0, 1 if steps else 0)
            worker.leave(how)
            worker.claim().finish()
            assert told(client, handle) == expected
            (opened,) = [e for e in job_events(client, handle.id) if e.type == "attempt"]
            assert opened.attempt == 2  # the first one wrote nothing


@pytest.mark.parametrize("how", HOW)
def test_a_cut_after_the_last_token_was_decoded_and_before_it_was_written(
    client: Client, worker: SteppedWorker, how: str
) -> None:
    expected = undisturbed(client, worker)
    handle = submit(client)
    worker.claim().decode(BYTES)
    worker.step()  # the end of sequence: the row has left the engine
    assert not worker.engine.has_work
    worker.leave(how)
    assert client.status(handle.id).state.value == ("queued" if how == "kill" else "finished")
    if how == "kill":
        worker.claim().finish()
    assert told(client, handle) == expected


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("fields", JOBS.values(), ids=JOBS)
def test_a_cut_between_the_last_tokens_event_and_the_end_event(
    client: Client, worker: SteppedWorker, how: str, fields: dict[str, Any]
) -> None:
    """A flush of more than `ROWS_A_CALL` rows is two calls: a job's last two rows may be parted."""
    expected = undisturbed(client, worker, **fields)
    handle = submit(client, **fields)
    worker.claim().decode(len(expected[0]) - 1)
    worker.step(2)
    *rows, end = worker.rows()
    assert end.end is not None
    call = calls.commit(worker.name, rows, lease_ms=30_000)
    assert {reply.status for reply in worker.child.protocol.run(call)} == {"OK"}
    worker.leave(how)
    assert client.status(handle.id).state.value == "queued"
    worker.use(spelled_engine(TEXT, revision="r2"))
    worker.claim().finish()  # not even the model matters now
    assert told(client, handle) == expected


@pytest.mark.parametrize("then", ["resend", "kill"])
def test_a_cut_between_the_end_and_its_reply(
    client: Client, worker: SteppedWorker, then: str
) -> None:
    expected = undisturbed(client, worker)
    handle = submit(client)
    worker.claim().decode(BYTES)
    worker.step()
    LostReply(worker)
    if then == "resend":
        worker.flush()
    else:
        rows = worker.rows()
        with pytest.raises(redis.ConnectionError):
            worker.child.publisher._protocol.run(calls.commit("w", rows, lease_ms=30_000))
        worker.die()
    assert told(client, handle) == expected
    worker.claim()
    assert worker.held == 0


@pytest.mark.parametrize("how", HOW)
def test_a_cut_after_a_cancel_was_flagged(client: Client, worker: SteppedWorker, how: str) -> None:
    expected = undisturbed(client, worker)
    handle = submit(client)
    worker.claim().decode(7)
    handle.cancel()
    worker.leave(how)
    token_ids, text, _, state = told(client, handle)
    assert state.value == "cancelled"
    assert token_ids == expected[0][:7]
    assert expected[1].startswith(text)
    worker.claim()
    assert worker.held == 0


def cut(worker: SteppedWorker, tokens: int = 7) -> None:
    worker.claim().decode(tokens)
    worker.die()


def corrupt_payload(client: Client, handle: JobHandle, raw: redis.Redis) -> None:
    del client
    raw.hset(f"rq:job:{handle.id}", "data", b"not zlib")


def delete_events(client: Client, handle: JobHandle, raw: redis.Redis) -> None:
    raw.delete(client.keys.events(handle.id))


def test_a_job_that_can_t_go_on_keeps_what_it_had(
    client: Client, worker: SteppedWorker, redis_client: redis.Redis
) -> None:
    handle = submit(client)
    cut(worker)
    corrupt_payload(client, handle, redis_client)
    worker.claim().finish()
    token_ids, text, _, state = told(client, handle)
    assert (state.value, len(token_ids), text) == ("failed", 7, TEXT[:3])  # inside a character


def test_a_job_whose_stream_is_gone_fails_and_begins_nothing_anew(
    client: Client, worker: SteppedWorker, redis_client: redis.Redis
) -> None:
    handle = submit(client)
    cut(worker)
    delete_events(client, handle, redis_client)
    worker.claim().finish()
    error = handle.result(timeout=1).error
    assert error is not None
    assert error.code == "stream_gap"


def mutations() -> dict[str, Callable[[pytest.MonkeyPatch], None]]:
    """Ways to break the resume; each has to be caught."""
    from mlx_serving.worker.claiming import intake
    from mlx_serving.worker.engine.engine import Engine

    def restart(patch: pytest.MonkeyPatch) -> None:
        read = intake.read_committed
        patch.setattr(intake, "read_committed", lambda p, s: type(read(p, s))())

    def no_replay(patch: pytest.MonkeyPatch) -> None:
        def skip(_: Engine, row: Any) -> None:
            row.decoded = len(row.choice.committed)

        patch.setattr(Engine, "_replay", skip)

    return {"restart": restart, "detokenizer not replayed": no_replay}


@pytest.mark.parametrize("mutation", mutations().values(), ids=mutations())
def test_a_broken_resume_is_caught(
    client: Client, worker: SteppedWorker, mutation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = undisturbed(client, worker)
    mutation(monkeypatch)
    handle = submit(client)
    cut(worker, 5)
    worker.claim().finish()
    with pytest.raises(AssertionError):
        assert told(client, handle) == expected
