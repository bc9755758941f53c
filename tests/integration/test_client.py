"""The blocking client against a real Redis and a scripted worker."""

from __future__ import annotations

import threading
import time
from functools import partial
from typing import TYPE_CHECKING

import pytest

from mlx_serving import (
    Client,
    JobCancelled,
    JobFailed,
    JobNotFound,
    JobState,
    LocalRedis,
    ResultTimeout,
    StreamGap,
    StreamReset,
)
from mlx_serving.common.events import encode
from tests.support.helpers import wait_until
from tests.support.scripted_worker import Running, ScriptedWorker

if TYPE_CHECKING:
    from collections.abc import Generator

    import redis

    from mlx_serving.common.events import Event
    from mlx_serving.producer.base import Reader

WORDS = [f"w{i} " for i in range(20)]
PROMPT = "count from 3 to 12, said the customer"


@pytest.fixture
def worker(redis_client: redis.Redis, client: Client) -> ScriptedWorker:
    return ScriptedWorker(redis_client, client.keys)


def submit(client: Client, **fields: object) -> str:
    return client.submit(**{"model": "tally", "prompt": PROMPT, "result_ttl": 60} | fields).id


def kill_subscribers(redis_client: redis.Redis) -> int:
    return int(redis_client.execute_command("CLIENT", "KILL", "TYPE", "pubsub"))


class RequeuesOnce(Client):
    """Requeues a job between its end and the next look at it, as another producer may."""

    requeued = False

    def _follow(
        self, job_id: str, reader: Reader, deadline_s: float | None = None
    ) -> Generator[Event, None, None]:
        yield from super()._follow(job_id, reader, deadline_s)
        if not self.requeued:
            self.requeue(job_id)
            self.requeued = True


def test_a_job_requeued_at_its_end_is_waited_for_again(client: Client) -> None:
    with RequeuesOnce(settings=client.settings) as requeuing:
        worker = ScriptedWorker(client._redis, client.keys)
        job = requeuing.submit(model="tally", prompt=PROMPT, result_ttl=60)
        states: list[JobState] = []
        waits = threading.Thread(target=lambda: states.append(job.result(timeout=20).state))
        waits.start()
        wait_until(lambda: client._redis.pubsub_numsub(client.keys.channel(job.id))[0][1])
        worker.claim_one().end(JobState.FAILED, "engine_error")
        wait_until(lambda: requeuing.requeued)
        worker.serve(WORDS)
        waits.join(30)
        assert states == [JobState.FINISHED]


class TestStream:
    def test_a_consumer_that_joins_before_sees_all(
        self, client: Client, worker: ScriptedWorker
    ) -> None:
        job = client.submit(model="tally", prompt=PROMPT, result_ttl=60)
        got: list[str] = []
        reader = threading.Thread(target=lambda: got.extend(job.text()))
        reader.start()
        wait_until(lambda: worker.protocol.redis.pubsub_numsub(client.keys.channel(job.id))[0][1])
        worker.serve(WORDS, pause_s=0.002)
        reader.join(10)
        assert got == WORDS

    def test_a_consumer_that_joins_late_sees_all(
        self, client: Client, worker: ScriptedWorker
    ) -> None:
        job = client.submit(model="tally", prompt=PROMPT, result_ttl=60)
        row = worker.serve(WORDS)
        assert list(job.stream()) == row.written

    def test_it_joins_in_the_middle(self, client: Client, worker: ScriptedWorker) -> None:
        job = client.submit(model="tally", prompt=PROMPT, result_ttl=60)
        row = worker.claim_one()
        row.say("a")
        stream = job.stream()
        assert [next(stream).seq, next(stream).seq] == [1, 2]
        row.say("b")
        row.end()
        assert [event.seq for event in stream] == [3, 4]

    def test_live_events_do_not_wait_for_a_poll(
        self, client: Client, worker: ScriptedWorker
    ) -> None:
        job = client.submit(model="tally", prompt=PROMPT, result_ttl=60)
        row = worker.claim_one()
        stream = job.stream()
        next(stream)
        delays: list[float] = []

        def write() -> None:
            channel = client.keys.channel(job.id)
            wait_until(lambda: worker.protocol.redis.pubsub_numsub(channel)[0][1])
            for word in WORDS[:5]:
                time.sleep(0.1)
                row.say(word, token=time.monotonic_ns())
            row.end()

        with Running(write):
            for event in stream:
                delays.extend(
                    (time.monotonic_ns() - choice.token_ids[0]) / 1e9 for choice in event.choices
                )
        assert len(delays) == 5
        assert sorted(delays)[2] < 0.1

    def test_it_resumes_from_a_cursor(self, client: Client, worker: ScriptedWorker) -> None:
        job_id = submit(client)
        row = worker.serve(WORDS)
        assert list(client.stream(job_id, row.written[14].cursor)) == row.written[15:]
        assert list(client.stream(job_id, row.written[-1].cursor)) == []

    def test_it_survives_killed_connections(
        self, client: Client, worker: ScriptedWorker, redis_client: redis.Redis
    ) -> None:
        job_id = submit(client)
        words = [f"{i} " for i in range(300)]
        kills = 0

        def kill_now_and_then(event: Event) -> Event:
            nonlocal kills
            kills += kill_subscribers(redis_client) if event.seq % 50 == 25 else 0
            return event

        with worker.serving(words, pause_s=0.002):
            got = [kill_now_and_then(event) for event in client.stream(job_id)]
        assert [event.seq for event in got] == list(range(1, 303))
        assert [event.text for event in got if event.text] == words
        assert kills >= 3

    def test_two_consumers_see_the_same(self, client: Client, worker: ScriptedWorker) -> None:
        job_id = submit(client)
        got: list[list[int]] = [[], []]

        def read(into: list[int]) -> None:
            into.extend(event.seq for event in client.stream(job_id))

        with Running(partial(read, got[0])), Running(partial(read, got[1])):
            worker.serve(WORDS, pause_s=0.002)
        assert got == [list(range(1, 23))] * 2

    def test_the_tokens_of_a_bulk_job_are_polled(
        self, client: Client, worker: ScriptedWorker
    ) -> None:
        job_id = submit(client, stream=False)
        stream = client.stream(job_id)
        with worker.serving(WORDS, pause_s=0.02):
            seqs = [event.seq for event in stream]
        assert seqs == list(range(1, 23))

    def test_a_job_that_failed_keeps_its_text_and_raises_at_its_end(
        self, client: Client, worker: ScriptedWorker
    ) -> None:
        job = client.submit(model="tally", prompt=PROMPT, result_ttl=60)
        row = worker.claim_one()
        row.say("half ")
        row.end(JobState.FAILED, "engine_error")
        got: list[str] = []
        with pytest.raises(JobFailed, match="engine_error") as caught:
            got.extend(job.text())
        assert caught.value.result is not None
        assert caught.value.result.text == "half "

    def test_text_comes_before_the_failure(self, client: Client, worker: ScriptedWorker) -> None:
        job = client.submit(model="tally", prompt=PROMPT, result_ttl=60)
        row = worker.claim_one()
        row.say("half ")
        text = job.text()
        assert next(text) == "half "
        row.end(JobState.FAILED, "engine_error")
        with pytest.raises(JobFailed):
            next(text)

    def test_an_unknown_job_is_not_found(self, client: Client) -> None:
        with pytest.raises(JobNotFound):
            next(client.stream("f" * 32))
        for call in (client.status, client.result, client.cancel):
            with pytest.raises(JobNotFound):
                call("f" * 32)

    def test_what_is_no_cursor_is_refused_at_once(self, client: Client) -> None:
        with pytest.raises(ValueError, match="after: must be an event's cursor"):
            client.stream("f" * 32, "-1")
        with pytest.raises(TypeError, match="after: must be an event's cursor, a string, not int"):
            client.stream("f" * 32, 17)  # type: ignore[call-overload]

    def test_a_job_deleted_under_a_consumer_is_not_found(
        self, client: Client, worker: ScriptedWorker, redis_client: redis.Redis
    ) -> None:
        job_id = submit(client)
        worker.claim_one()
        stream = client.stream(job_id)
        next(stream)
        redis_client.flushall()
        with pytest.raises(JobNotFound):
            next(stream)

    def test_events_that_are_gone_are_an_error_and_no_short_answer(
        self, client: Client, worker: ScriptedWorker, redis_client: redis.Redis
    ) -> None:
        job_id = submit(client)
        worker.serve(WORDS)
        redis_client.xtrim(client.keys.events(job_id), maxlen=3, approximate=False)
        with pytest.raises(StreamGap, match="events 1 to 19"):
            list(client.stream(job_id))

    def test_a_primary_that_lost_events_is_never_spliced(
        self, client: Client, worker: ScriptedWorker, redis_client: redis.Redis
    ) -> None:
        job_id = submit(client)
        row = worker.claim_one()
        for word in WORDS[:5]:
            row.say(word)
        stream = client.stream(job_id)
        assert [next(stream).seq for _ in range(6)] == [1, 2, 3, 4, 5, 6]
        # What a failover does: the last two events were never there, others take their place.
        redis_client.xdel(client.keys.events(job_id), "5-0", "6-0")
        redis_client.hset(client.keys.job(job_id), "seq", 4)
        redis_client.delete(client.keys.events(job_id))
        for event in row.written[:4]:
            redis_client.xadd(client.keys.events(job_id), {"e": encode(event)}, id=f"{event.seq}-0")
        kill_subscribers(redis_client)
        row.hand_back()
        again = worker.claim_one()
        again.say("other ", token=row.written[5].choices[0].token_ids[0])
        again.end()
        reset, *rest = stream
        assert (reset.type, reset.cursor) == ("reset", "")
        assert rest == [*row.written[:4], *again.written]
        with pytest.raises(StreamReset) as caught:
            list(client.stream(job_id, row.written[5].cursor, text=True))
        assert caught.value.cursor == ""

    def test_a_redis_that_restarts_is_outlived(self) -> None:
        with LocalRedis(appendonly="always") as server, Client(server.url) as client:
            job_id = submit(client)
            got: list[str] = []
            with server.client() as redis_client:
                row = ScriptedWorker(redis_client, client.keys).claim_one()
                row.say("before ")
                with Running(lambda: got.extend(client.stream(job_id, text=True))):
                    wait_until(lambda: got == ["before "])
                    server.restart()
                    wait_until(redis_client.ping)
                    row.say("after")
                    row.end()
        assert got == ["before ", "after"]


class TestResult:
    def test_it_waits_for_the_end(self, client: Client, worker: ScriptedWorker) -> None:
        job = client.submit(model="tally", prompt=PROMPT, result_ttl=60)
        with worker.serving(WORDS, pause_s=0.005):
            result = job.result(timeout=10)
        assert result.raise_for_state().text == "".join(WORDS)
        assert job.status().state is JobState.FINISHED

    def test_it_waits_for_a_bulk_job(self, client: Client, worker: ScriptedWorker) -> None:
        job_id = submit(client, stream=False)
        with worker.serving(WORDS, pause_s=0.005):
            assert client.result(job_id, timeout=10).text == "".join(WORDS)

    def test_a_timeout_leaves_the_job_alone(self, client: Client, worker: ScriptedWorker) -> None:
        job_id = submit(client)
        began = time.monotonic()
        with pytest.raises(ResultTimeout):
            client.result(job_id, timeout=0.2)
        assert time.monotonic() - began < 1.0
        assert client.status(job_id).state is JobState.QUEUED
        worker.serve(["a"])

    def test_a_job_cancelled_in_the_queue_has_a_result(self, client: Client) -> None:
        job = client.submit(model="tally", prompt=PROMPT, result_ttl=60)
        assert job.cancel() is JobState.CANCELLED
        assert job.cancel() is JobState.CANCELLED
        result = job.result()
        assert (result.state, result.text) == (JobState.CANCELLED, "")
        assert result.timings.enqueued_ms is not None
        with pytest.raises(JobCancelled):
            result.raise_for_state()
        assert [event.type for event in job.stream()] == ["end"]

    def test_a_running_job_is_cancelled_by_its_worker(
        self, client: Client, worker: ScriptedWorker
    ) -> None:
        job = client.submit(model="tally", prompt=PROMPT, result_ttl=60)
        row = worker.claim_one()
        row.say("a")
        assert job.cancel() is JobState.RUNNING
        row.say("b")
        assert row.cancel_reason == "cancelled_by_client"
        row.end(JobState.CANCELLED, "cancelled")
        assert job.result().text == "ab"
