"""Readers that come after a job's events went, or after somebody forgot it; RQ's copy of results.

A real worker, whose model is simulated, and a real Redis; events are kept for a second.
"""

from __future__ import annotations

import asyncio
import pickle
from typing import TYPE_CHECKING, Any

import pytest
from rq.job import Job
from rq.serializers import JSONSerializer

from mlx_serving import (
    AsyncClient,
    Client,
    EventsGone,
    JobFailed,
    JobNotEnded,
    JobNotFound,
    JobState,
)
from mlx_serving.producer.base import BaseClient
from tests.support.helpers import wait_until
from tests.support.worker_process import InProcessWorker, counted, quick_settings, submit

if TYPE_CHECKING:
    from collections.abc import Iterator

    import redis

    from mlx_serving.common.events import Event
    from mlx_serving.common.redis.local import LocalRedis
    from mlx_serving.producer.handles import JobHandle

TOKENS = 40


@pytest.fixture
def client(server: LocalRedis) -> Iterator[Client]:
    with Client(settings=quick_settings(server.url, jobs__events_ttl=1)) as client:
        yield client


@pytest.fixture
def worker(server: LocalRedis) -> Iterator[InProcessWorker]:
    with InProcessWorker(server.url, rate=500) as worker:
        yield worker


def ended(client: Client, *, without_events: bool = True, **fields: Any) -> JobHandle:
    (handle,) = submit(client, 1, TOKENS, **fields)
    assert client.result(handle.id, timeout=20).text == counted(TOKENS)
    if without_events:
        events_go(client, handle.id)
    return handle


def cursors(client: Client, job_id: str) -> list[str]:
    """Of all events, while they are there."""
    return ["", *(event.cursor for event in client.stream(job_id))]


def events_go(client: Client, job_id: str) -> None:
    wait_until(lambda: not client._redis.exists(client.keys.events(job_id)), what="events stay")


@pytest.mark.usefixtures("worker")
class TestALateReader:
    @pytest.mark.parametrize("stream", [True, False])
    @pytest.mark.parametrize("count", [0, 1, 3])
    def test_it_gets_one_error_with_the_result(
        self, client: Client, count: int, *, stream: bool
    ) -> None:
        handle = ended(client, without_events=False, stream=stream)
        cursor = cursors(client, handle.id)[count]
        events_go(client, handle.id)
        with pytest.raises(EventsGone, match=handle.id) as gone:
            list(client.stream(handle.id, cursor))
        assert (gone.value.code, gone.value.retryable) == ("events_gone", False)
        assert gone.value.result == handle.result()
        assert pickle.loads(pickle.dumps(gone.value)).result == handle.result()  # noqa: S301 -- ours

    def test_so_does_one_of_texts(self, client: Client) -> None:
        handle = ended(client)
        with pytest.raises(EventsGone) as gone:
            list(handle.text())
        assert gone.value.result is not None
        assert gone.value.result.text == counted(TOKENS)

    def test_one_that_had_them_all_gets_none(self, client: Client) -> None:
        handle = ended(client, without_events=False)
        cursor = cursors(client, handle.id)[-1]
        events_go(client, handle.id)
        assert list(client.stream(handle.id, cursor)) == []

    def test_one_that_had_another_end_is_told(self, client: Client) -> None:
        """Redis forgot it, and the job ended once more: the tag is not that of the end."""
        handle = ended(client)
        with pytest.raises(EventsGone):
            list(client.stream(handle.id, f"{handle.status().seq}-00000000"))

    def test_the_result_needs_no_events(self, client: Client) -> None:
        handle = ended(client)
        assert handle.result(timeout=5).text == counted(TOKENS)

    def test_a_reader_that_was_cut_off_in_the_middle_is_told(
        self, client: Client, server: LocalRedis
    ) -> None:
        """Never a hang, nor an end that looks like the job's."""
        (handle,) = submit(client, 1, TOKENS)
        events = client.stream(handle.id)
        first = [next(events), next(events)]
        with server.client() as admin:
            admin.client_kill_filter(_type="pubsub")
        handle.result(timeout=20)
        events_go(client, handle.id)
        with pytest.raises(EventsGone) as gone:
            first += list(events)
        assert gone.value.result == handle.result()
        assert [event.seq for event in first] == list(range(1, len(first) + 1))
        assert "end" not in {event.type for event in first}

    def test_an_asyncio_reader_too(self, client: Client) -> None:
        handle = ended(client)

        async def read() -> EventsGone:
            async with AsyncClient(settings=client.settings) as late:
                assert (await late.result(handle.id)).text == counted(TOKENS)
                with pytest.raises(EventsGone) as gone:
                    async for _ in late.stream(handle.id):
                        pass
                return gone.value

        assert asyncio.run(read()).result == handle.result()


@pytest.mark.usefixtures("worker")
class TestForget:
    def test_a_forgotten_job_is_gone_for_every_reader(self, client: Client) -> None:
        handle = ended(client, without_events=False)
        handle.forget()
        client.forget(handle.id)
        for read in (handle.status, handle.result, lambda: list(handle.stream())):
            with pytest.raises(JobNotFound):
                read()
        assert not list(client._redis.scan_iter(f"*{handle.id}*"))

    def test_its_idempotency_key_names_a_new_job(self, client: Client) -> None:
        handle = ended(client, without_events=False, idempotency_key="once")
        handle.forget()
        (again,) = submit(client, 1, TOKENS, idempotency_key="once")
        assert (again.id, again.created) == (handle.id, True)
        assert again.result(timeout=20).text == counted(TOKENS)

    def test_a_running_one_is_refused_by_name(self, client: Client) -> None:
        (handle,) = submit(client, 1, 100_000)
        wait_until(lambda: handle.status().state is JobState.RUNNING)
        with pytest.raises(JobNotEnded, match=f"job {handle.id} is running: cancel it first"):
            handle.forget()
        handle.cancel()
        handle.result(timeout=10)
        handle.forget()

    def test_a_queued_one_is_refused_by_name_in_asyncio_too(self, client: Client) -> None:
        async def run() -> None:
            async with AsyncClient(settings=client.settings) as other:
                job = await other.submit(model="nobodys", prompt="x")
                with pytest.raises(JobNotEnded, match="is queued: cancel it first"):
                    await job.forget()
                await job.cancel()
                await job.forget()
                with pytest.raises(JobNotFound):
                    await job.status()

        asyncio.run(run())


class TestRequeue:
    def test_a_job_that_failed_is_read_under_its_id_as_if_it_were_new(
        self, client: Client, server: LocalRedis
    ) -> None:
        """It failed because the workers' key was another one."""
        keyed = client.settings.replace(jobs__signing_keys=["k" * 32], jobs__events_ttl=1)
        with Client(settings=keyed) as signing:
            (handle,) = submit(signing, 1, TOKENS)
            with InProcessWorker(server.url, "wrong", jobs__signing_keys=["w" * 32]):
                result = handle.result(timeout=20)
            with pytest.raises(JobFailed, match="bad_signature"):
                result.raise_for_state()
            events_go(client, handle.id)
            assert signing.requeue(handle.id) is signing.requeue(handle.id) is JobState.QUEUED
            with InProcessWorker(server.url, "right", jobs__signing_keys=["k" * 32]):
                assert "".join(handle.text()) == counted(TOKENS)
                assert signing.requeue(handle.id) is JobState.FINISHED
            handle.forget()

    @pytest.mark.parametrize("in_asyncio", [False, True])
    def test_a_reader_that_finds_the_events_gone_reads_the_life_that_began_since(
        self,
        client: Client,
        server: LocalRedis,
        monkeypatch: pytest.MonkeyPatch,
        *,
        in_asyncio: bool,
    ) -> None:
        keyed = client.settings.replace(jobs__signing_keys=["k" * 32], jobs__events_ttl=1)
        feed = BaseClient._feed

        def feed_then_requeue(*given: Any) -> list[Event]:
            try:
                return feed(*given)
            except EventsGone:
                monkeypatch.undo()
                assert signing.requeue(handle.id) is JobState.QUEUED
                raise

        async def text() -> str:
            async with AsyncClient(settings=keyed) as other:
                return "".join([piece async for piece in other.stream(handle.id, text=True)])

        with Client(settings=keyed) as signing:
            (handle,) = submit(signing, 1, TOKENS)
            with InProcessWorker(server.url, "wrong", jobs__signing_keys=["w" * 32]):
                handle.result(timeout=20)
            events_go(client, handle.id)
            monkeypatch.setattr(BaseClient, "_feed", staticmethod(feed_then_requeue))
            with InProcessWorker(server.url, "right", jobs__signing_keys=["k" * 32]):
                read = asyncio.run(text()) if in_asyncio else "".join(handle.text())
            assert read == counted(TOKENS)
            handle.forget()

    def test_one_that_is_gone_is_refused(self, client: Client) -> None:
        with pytest.raises(JobNotFound, match="payload"):
            client.requeue("0" * 32)

    def test_asyncio_too(self, client: Client) -> None:
        async def run() -> None:
            async with AsyncClient(settings=client.settings) as other:
                job = await other.submit(model="nobodys", prompt="x", result_ttl=60)
                await job.cancel()
                assert await other.requeue(job.id) is JobState.QUEUED
                await job.cancel()
                await job.forget()

        asyncio.run(run())


class TestRqsOwnResult:
    @staticmethod
    def seen(client: Client, redis_client: redis.Redis) -> Job:
        handle = ended(client, without_events=False)
        return Job.fetch(handle.id, connection=redis_client, serializer=JSONSerializer)

    @pytest.mark.usefixtures("worker")
    def test_an_answer_is_kept_once(self, client: Client, redis_client: redis.Redis) -> None:
        job = self.seen(client, redis_client)
        assert job.is_finished
        assert job.return_value() is None
        assert not redis_client.exists(client.keys.rq_results(job.id))

    def test_a_setting_gives_it_to_rq_too(
        self, client: Client, server: LocalRedis, redis_client: redis.Redis
    ) -> None:
        with InProcessWorker(server.url, worker__rq_results=True):
            value: Any = self.seen(client, redis_client).return_value()
        assert value["choices"][0]["text"] == counted(TOKENS)
