"""Submitting: what is enqueued, once, and what is refused."""

from __future__ import annotations

import json
import zlib
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import SecretStr
from rq import Queue
from rq.serializers import JSONSerializer

from mlx_serving import (
    AsyncClient,
    Client,
    GenerationJob,
    IdempotencyConflict,
    InvalidJob,
    InvalidSettings,
    JobState,
    PayloadTooLarge,
    QueueUnavailable,
)
from tests.support.scripted_worker import Row, ScriptedWorker, queued

if TYPE_CHECKING:
    import redis

    from mlx_serving.common.settings import Settings

PROMPT = "count from 3 to 12, said the customer"


@pytest.fixture
def worker(redis_client: redis.Redis, client: Client) -> ScriptedWorker:
    return ScriptedWorker(redis_client, client.keys)


def submit(client: Client, **fields: object) -> str:
    return client.submit(**{"model": "tally", "prompt": PROMPT, "result_ttl": 60} | fields).id


class TestWrongTypes:
    @pytest.mark.parametrize("job", ["hello", 7, ["a"], b"{}"])
    def test_what_is_no_job_is_refused_by_its_type(self, client: Client, job: Any) -> None:
        with pytest.raises(InvalidJob, match=f"not {type(job).__name__}"):
            client.submit(job)
        with pytest.raises(InvalidJob) as raised:
            client.submit_many([{"model": "tally", "prompt": PROMPT}, job])
        assert [error.path for error in raised.value.errors] == ["jobs[1]"]

    def test_one_job_is_not_many(self, client: Client) -> None:
        fields: Any = {"model": "tally", "prompt": PROMPT}
        with pytest.raises(InvalidJob, match="not str"):
            client.submit_many(fields)

    @pytest.mark.parametrize("job_id", [None, 7, b"x"])
    def test_what_is_no_id_is_not_called_an_outage(self, client: Client, job_id: Any) -> None:
        calls: list[Any] = [client.status, client.cancel, client.result, client.stream]
        for call in calls:
            with pytest.raises(TypeError, match="job_id: must be a string, not"):
                call(job_id)


class TestSubmit:
    def test_a_job_is_queued_where_rq_sees_it(
        self, client: Client, redis_client: redis.Redis, worker: ScriptedWorker
    ) -> None:
        handle = client.submit(model="tally", prompt=PROMPT, seed=7, result_ttl=60)
        assert (handle.created, handle.state) == (True, JobState.QUEUED)
        queue = Queue("tally:default", connection=redis_client, serializer=JSONSerializer)
        (job,) = queue.jobs
        assert job.id == handle.id
        assert job.func_name == "mlx_serving.worker.task.generate"
        assert job.args[0]["prompt"] == PROMPT
        assert job.args[0]["seed"] == 7
        assert job.description == "generate tally:default"
        assert job.get_status() == "queued"
        worker.serve(["a"])

    def test_the_seed_is_drawn_at_submit(self, client: Client, worker: ScriptedWorker) -> None:
        submit(client)
        row = worker.claim_one()
        assert isinstance(json.loads(zlib.decompress(row.job.data))[2][0]["seed"], int)
        row.end()

    def test_a_job_object_and_a_mapping_are_taken_too(
        self, client: Client, worker: ScriptedWorker
    ) -> None:
        fields = {"model": "tally", "prompt": PROMPT, "result_ttl": 60}
        ids = [client.submit(GenerationJob.build(**fields)).id, client.submit(fields).id]
        assert [row.job.job_id for row in self.end_all(worker)] == ids

    def test_a_job_and_keywords_together_are_refused(self, client: Client) -> None:
        with pytest.raises(TypeError, match="not both"):
            client.submit({"model": "tally"}, prompt=PROMPT)

    def test_an_idempotency_key_enqueues_once(
        self, client: Client, redis_client: redis.Redis, worker: ScriptedWorker
    ) -> None:
        first = client.submit(model="tally", prompt=PROMPT, idempotency_key="order-1")
        again = client.submit(model="tally", prompt=PROMPT, idempotency_key="order-1")
        other = client.submit(
            model="tally", prompt=PROMPT, idempotency_key="order-1", tenant="acme"
        )
        assert (first.id == again.id, first.created, again.created) == (True, True, False)
        assert (other.id == first.id, other.created) == (False, True)
        assert redis_client.llen("rq:queue:tally:default") == 2
        self.end_all(worker)
        last = client.submit(model="tally", prompt=PROMPT, idempotency_key="order-1")
        assert (last.created, last.state) == (False, JobState.FINISHED)

    @pytest.mark.parametrize(
        "other",
        [{"prompt": "another"}, {"model": "other"}, {"lane": "bulk"}, {"seed": 7}, {"n": 2},
         {"max_tokens": 9}, {"metadata": {"a": "b"}}, {"timeout": 5.0}],
    )  # fmt: skip
    @pytest.mark.parametrize("ended", [False, True])
    def test_a_key_of_another_payload_is_a_conflict_by_name(
        self, client: Client, redis_client: redis.Redis, other: dict[str, Any], *, ended: bool
    ) -> None:
        job = {"model": "tally", "prompt": PROMPT, "idempotency_key": "order-1", "result_ttl": 60}
        first = client.submit(job)
        if ended:
            first.cancel()
        before = {key: redis_client.dump(key) for key in redis_client.scan_iter()}
        with pytest.raises(IdempotencyConflict, match=r"^idempotency_key: 'order-1' names") as e:
            client.submit(job | other)
        error = e.value
        assert (error.code, error.retryable) == ("idempotency_key_reused", False)
        assert (error.errors[0].path, error.job_ids) == ("idempotency_key", (None,))
        assert first.id in str(error)
        assert {key: redis_client.dump(key) for key in redis_client.scan_iter()} == before
        again = client.submit(job)
        assert (again.id, again.created) == (first.id, False)

    def test_what_counts_from_the_submit_or_names_the_caller_is_no_other_payload(
        self, client: Client
    ) -> None:
        job = {"model": "tally", "prompt": PROMPT, "idempotency_key": "order-1", "result_ttl": 60}
        said: list[dict[str, Any]]
        trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        said = [{}, {"deadline": 60}, {"deadline": 59.5}, {"traceparent": trace},
                {"top_p": 1.0, "tenant": None, "stop": None}, {"max_tokens": 256}]  # fmt: skip
        assert [client.submit(job | more).created for more in said] == [True, *[False] * 5]
        client.cancel(client.submit(job).id)

    def test_a_key_is_free_again_once_its_job_is_gone(
        self, client: Client, redis_client: redis.Redis
    ) -> None:
        job = {"model": "tally", "prompt": PROMPT, "idempotency_key": "order-1", "result_ttl": 60}
        first = client.submit(job)
        client.cancel(first.id)
        redis_client.delete(client.keys.job(first.id))  # as its result_ttl does
        second = client.submit(job | {"prompt": "another"})
        assert (second.id, second.created) == (first.id, True)
        client.cancel(second.id)

    def test_of_many_jobs_each_conflict_is_named_and_the_others_are_enqueued(
        self, client: Client, redis_client: redis.Redis
    ) -> None:
        job = {"model": "tally", "prompt": PROMPT, "result_ttl": 60}
        one, two = job | {"idempotency_key": "one"}, job | {"idempotency_key": "two"}
        client.submit(one)
        jobs = [job, one | {"prompt": "x"}, two, one, two | {"n": 2}]
        with pytest.raises(IdempotencyConflict) as e:
            client.submit_many(jobs)
        paths = [error.path for error in e.value.errors]
        assert paths == ["jobs[1].idempotency_key", "jobs[4].idempotency_key"]
        assert [i is None for i in e.value.job_ids] == [False, True, False, False, True]
        assert len(queued(redis_client)) == 3
        redis_client.flushall()

    async def test_the_async_client_tells_a_conflict_alike(
        self, settings: Settings, redis_client: redis.Redis
    ) -> None:
        job = {"model": "tally", "prompt": PROMPT, "idempotency_key": "one"}
        async with AsyncClient(settings=settings) as client:
            await client.submit(job)
            with pytest.raises(IdempotencyConflict, match="'one'"):
                await client.submit(job | {"n": 2})
            with pytest.raises(IdempotencyConflict, match=r"jobs\[1\].idempotency_key: 'one'"):
                await client.submit_many([job, job | {"n": 2}])
        redis_client.flushall()

    def test_a_result_is_kept_as_long_as_the_job_says(
        self, client: Client, redis_client: redis.Redis
    ) -> None:
        for seconds in (7, 70):
            job_id = client.submit(model="tally", prompt=PROMPT, result_ttl=seconds).id
            client.cancel(job_id)
            left = [redis_client.pttl(key) for key in redis_client.scan_iter(f"*{job_id}*")]
            assert left
            assert all((seconds - 5) * 1000 < each <= seconds * 1000 for each in left)

    def test_many_jobs_keep_their_order(self, client: Client, redis_client: redis.Redis) -> None:
        jobs = [{"model": "tally", "prompt": f"{i}", "result_ttl": 60} for i in range(600)]
        ids = [handle.id for handle in client.submit_many(jobs)]
        assert queued(redis_client) == ids
        redis_client.flushall()

    def test_one_wrong_job_refuses_the_whole_call(
        self, client: Client, redis_client: redis.Redis
    ) -> None:
        good = {"model": "tally", "prompt": "x"}
        bad = {"model": "tally", "messages": [{"role": "user", "content": "a"}], "top_p": 7}
        with pytest.raises(InvalidJob) as caught:
            client.submit_many([good, good, good, bad, good, {"prompt": "x"}])
        assert [e.path for e in caught.value.errors] == ["jobs[3].top_p", "jobs[5].model"]
        assert redis_client.dbsize() == 0

    def test_a_payload_over_the_limit_is_refused(
        self, settings: Settings, redis_client: redis.Redis
    ) -> None:
        small = settings.replace(jobs__max_bytes=1024)
        with Client(settings=small) as client, pytest.raises(PayloadTooLarge, match="1024"):
            client.submit(model="tally", prompt="x" * 2000)
        assert redis_client.dbsize() == 0

    def test_a_redis_that_is_away_is_a_retryable_error(self) -> None:
        with Client("unix:///nonexistent/redis.sock") as client:
            with pytest.raises(QueueUnavailable) as caught:
                client.submit(model="tally", prompt=PROMPT)
            with pytest.raises(QueueUnavailable):
                next(client.stream("0" * 32))
        assert (caught.value.code, caught.value.retryable) == ("queue_unavailable", True)
        assert PROMPT not in str(caught.value)

    def test_a_refusal_of_redis_is_the_same_error(
        self, client: Client, redis_client: redis.Redis
    ) -> None:
        redis_client.config_set("maxmemory", "1")
        try:
            with pytest.raises(QueueUnavailable):
                client.submit(model="tally", prompt=PROMPT)
        finally:
            redis_client.config_set("maxmemory", "0")

    def test_a_job_of_a_model_on_another_redis_is_refused(self, settings: Settings) -> None:
        other = SecretStr("redis://other:6379")
        split = settings.replace(redis__by_model={"large": other})
        with Client(settings=split) as client, pytest.raises(InvalidJob, match="another Redis"):
            client.submit(model="large", prompt=PROMPT)
        with Client(settings=split, model="large") as client:
            assert client.endpoint.url == other.get_secret_value()

    def test_a_wrong_url_is_refused_by_name(self) -> None:
        with pytest.raises(InvalidSettings, match=r"redis\.url"):
            Client("http://localhost")

    @staticmethod
    def end_all(worker: ScriptedWorker) -> list[Row]:
        rows = worker.claim(100)
        for row in rows:
            row.end()
        return rows
