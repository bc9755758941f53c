"""Workers with several models under a budget that holds one, on the simulated engine."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import redis

from mlx_serving.common.protocol.keys import Keys
from mlx_serving.worker.models.loading import SIMULATED_BYTES
from tests.support.helpers import wait_until
from tests.support.worker_process import (
    InProcessWorker,
    check_answers,
    job_events,
    submit,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlx_serving import Client
    from mlx_serving.common.redis.local import LocalRedis

TOKENS = 5


class ModelsWorker(InProcessWorker):
    """Serves tally and others; the budget holds `room` models."""

    def __init__(
        self, url: str, name: str, *others: str, room: int = 1, patience: float = 0.5, **more: Any
    ) -> None:
        budget = {
            "worker__model_budget_bytes": room * SIMULATED_BYTES,
            "worker__model_wait_seconds": patience,
        }
        super().__init__(url, name, 200.0, others, **(budget | more))

    def loads(self, model: str) -> int:
        counts, _ = self.child.counters.read()
        return int(counts.get("model_loads", {}).get(model, 0))

    @property
    def resident(self) -> tuple[str, ...]:
        return self.child.loaded_models.resident()


@pytest.fixture
def worker(settled_redis: LocalRedis) -> Iterator[ModelsWorker]:
    with ModelsWorker(settled_redis.url, "w1", "big") as worker:
        yield worker


def test_an_idle_worker_brings_up_what_is_waited_for(client: Client, worker: ModelsWorker) -> None:
    wait_until(lambda: worker.resident == ("tally",))
    jobs = submit(client, 3, TOKENS, model="big")
    check_answers(client, jobs, TOKENS)
    assert worker.resident == ("big",)
    check_answers(client, submit(client, 3, TOKENS), TOKENS)
    assert (worker.loads("tally"), worker.loads("big")) == (2, 1)


def test_each_job_is_decoded_by_its_own_model(client: Client, settled_redis: LocalRedis) -> None:
    with ModelsWorker(settled_redis.url, "w1", "big", room=2) as worker:
        wait_until(lambda: worker.resident == ("tally", "big"))
        engine = worker.child.loaded_models.get("big")
        assert engine is not None
        revision = replace(engine.engine.model_info, revision="of big")
        engine.engine.model_info = revision  # type: ignore[misc]
        for model, expected in (("tally", "simulated"), ("big", "of big")):
            jobs = submit(client, 4, TOKENS, model=model)
            check_answers(client, jobs, TOKENS)
            opened = [job_events(client, job.id)[0] for job in jobs]
            assert {event.model_revision for event in opened} == {expected}
            assert {event.model for event in opened} == {model}
        assert (worker.loads("tally"), worker.loads("big")) == (1, 1)


def test_a_model_that_is_waited_for_too_long_gets_its_turn_while_the_other_has_work(
    client: Client, settled_redis: LocalRedis
) -> None:
    with ModelsWorker(settled_redis.url, "w1", "big", batch__max_rows=2) as worker:
        steady = submit(client, 40, 20)  # 20 times 0.1 s
        waits = submit(client, 2, TOKENS, model="big")
        check_answers(client, waits, TOKENS)
        assert worker.loads("big") == 1
        check_answers(client, steady, 20)
        assert worker.loads("tally") <= 3


def test_a_pinned_model_stays_and_what_has_no_room_beside_it_is_left(
    client: Client, settled_redis: LocalRedis
) -> None:
    with ModelsWorker(settled_redis.url, "w1", "big", worker__pinned_models=["tally"]) as worker:
        (left,) = submit(client, 1, TOKENS, model="big")
        check_answers(client, submit(client, 2, TOKENS), TOKENS)
        with ModelsWorker(settled_redis.url, "w2", "big"):
            check_answers(client, [left], TOKENS)
        assert (worker.loads("tally"), worker.loads("big")) == (1, 0)


def test_two_workers_share_two_models(client: Client, settled_redis: LocalRedis) -> None:
    with (
        ModelsWorker(settled_redis.url, "w1", "big") as one,
        ModelsWorker(settled_redis.url, "w2", "big") as two,
    ):
        wait_until(lambda: one.resident == two.resident == ("tally",))
        for _ in range(10):
            jobs = submit(client, 4, TOKENS) + submit(client, 4, TOKENS, model="big")
            check_answers(client, jobs, TOKENS)
        assert sum(w.loads("big") for w in (one, two)) == 1
        assert {*one.resident, *two.resident} == {"tally", "big"}


def test_a_load_that_is_longer_than_a_lease_costs_no_job_its_lease(
    client: Client, settled_redis: LocalRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_serving.worker.models.loading.SIMULATED_SLICES", 1)
    times: dict[str, Any] = {
        "worker__lease_seconds": 0.5,
        "engine__stall_seconds": 0.8,
    }
    with (
        ModelsWorker(settled_redis.url, "w1", "big", "third", room=2, **times) as worker,
        InProcessWorker(
            settled_redis.url, "reaper", **times, conditions__hours=["00:00-00:01"]
        ) as _,
    ):
        wait_until(lambda: worker.resident == ("tally", "big"))
        slow = replace(worker.child._spec.engine, load_seconds=1.2)
        worker.child._spec = replace(worker.child._spec, engine=slow)
        (runs,) = submit(client, 1, 100)
        wait_until(worker.child.publisher.held)
        check_answers(client, submit(client, 1, TOKENS, model="third"), TOKENS)
        check_answers(client, [runs], 100)
        assert client.result(runs.id).attempts == 1
        assert worker.resident == ("tally", "third")


def test_presence_says_which_models_are_here_and_which_can_not_be(
    client: Client, worker: ModelsWorker, monkeypatch: pytest.MonkeyPatch, settled_redis: LocalRedis
) -> None:
    wait_until(lambda: worker.resident == ("tally",))
    monkeypatch.setattr("mlx_serving.worker.process.child.load", broken)
    (left,) = submit(client, 1, TOKENS, model="big")
    with redis.Redis.from_url(settled_redis.url, decode_responses=True) as connection:

        def said(field: str) -> str:
            return str(connection.hget(Keys().worker("w1"), field))

        wait_until(lambda: said("unloadable") == "big: FileNotFoundError: no such model")
        assert (said("model"), said("resident")) == ("tally,big", "tally")
        assert said("capacities") == f"tally={said('kv_tokens_capacity')}"
    check_answers(client, submit(client, 2, TOKENS), TOKENS)
    assert client.status(left.id).state.value == "queued"
    assert worker.loads("tally") == 1


def broken(*_: object) -> Iterator[None]:
    raise FileNotFoundError("no such model")
