"""`n`, log probabilities, penalties and biases, honoured from the client to the model and back."""

from __future__ import annotations

import math
import signal
from typing import TYPE_CHECKING, Any

import pytest

from mlx_serving import Client
from mlx_serving.common.results import assemble
from mlx_serving.tally.examples import digits_of
from tests.support.helpers import wait_until
from tests.support.worker_process import WorkerProcess, job_events

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlx_serving.common.events import ChoiceLogprobs
    from mlx_serving.common.redis.local import LocalRedis
    from mlx_serving.common.results import ChoiceResult, GenerationResult
    from mlx_serving.producer.handles import JobHandle

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(180),
    pytest.mark.may_leak(reason="a killed worker leaves its name in RQ's sets"),
]

DICE: dict[str, Any] = {"content": "dice 30", "temperature": 1.0, "seed": 11}
COUNT: dict[str, Any] = {"content": "count from 3 to 12", "temperature": 0.0}


@pytest.fixture(scope="module")
def first(local_redis: LocalRedis) -> Iterator[WorkerProcess]:
    with WorkerProcess(local_redis.url, "first", None, batch__max_rows=12) as worker:
        yield worker.serving()


@pytest.fixture
def client(local_redis: LocalRedis) -> Iterator[Client]:
    with Client(local_redis.url) as client:
        yield client


def submit(client: Client, content: str, **fields: Any) -> JobHandle:
    messages = [{"role": "user", "content": content}]
    given = {"model": "tally", "messages": messages, "max_tokens": 200, "result_ttl": 120}
    return client.submit(given | fields)


def run(client: Client, **fields: Any) -> GenerationResult:
    handle = submit(client, **fields)
    result = handle.result(timeout=60)
    if result.error is None:
        assert assemble(handle.id, job_events(client, handle.id)).choices == result.choices
    return result


def told(result: GenerationResult) -> list[tuple[list[int], str, str | None]]:
    assert result.error is None
    return [(c.token_ids, c.text, c.finish_reason) for c in result.choices]


@pytest.mark.usefixtures("first")
def test_choices_are_drawn_apart_and_each_the_same_every_time(client: Client) -> None:
    four = run(client, **DICE, n=4)
    assert [choice.index for choice in four.choices] == [0, 1, 2, 3]
    assert all(len(digits_of(choice.text)) >= 28 for choice in four.choices)
    assert len({choice.text for choice in four.choices}) == 4
    assert told(run(client, **DICE, n=4)) == told(four)
    assert told(run(client, **DICE, n=2)) == told(four)[:2]
    assert told(run(client, **DICE)) == told(four)[:1]
    assert four.usage is not None
    assert four.usage.completion_tokens == sum(len(c.token_ids) for c in four.choices)
    assert len({tuple(c.token_ids) for c in run(client, **COUNT, n=3).choices}) == 1  # greedy


@pytest.mark.usefixtures("first")
def test_more_choices_than_the_batch_has_rows_fail_by_name(client: Client) -> None:
    result = run(client, **DICE, n=13)
    assert result.error is not None
    assert (result.error.code, result.error.message[:2]) == ("job_too_large", "n:")


def of_choice(choice: ChoiceResult) -> ChoiceLogprobs:
    assert choice.logprobs is not None
    assert len(choice.logprobs.content) == len(choice.token_ids)
    return choice.logprobs


@pytest.mark.usefixtures("first")
def test_log_probabilities_name_every_token(client: Client) -> None:
    plain = run(client, **COUNT)
    (choice,) = (scored := run(client, **COUNT, logprobs=True, top_logprobs=3)).choices
    assert told(scored) == told(plain)
    entries = of_choice(choice).content
    assert b"".join(entry.raw for entry in entries[:-1]).decode().strip() == choice.text.strip()
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].token == entry.token  # greedy: the likeliest
        values = [top.logprob for top in entry.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert sum(map(math.exp, values)) <= 1 + 1e-4
        assert entry.logprob == values[0] <= 0
    assert all(choice.logprobs is None for choice in plain.choices)


@pytest.mark.usefixtures("first")
def test_log_probabilities_are_the_models_own_whatever_the_sampling(client: Client) -> None:
    """A bias changes which token is drawn, not how likely the model finds it."""
    fields = {**COUNT, "max_tokens": 1, "logprobs": True, "top_logprobs": 5}
    (plain,) = run(client, **fields).choices
    banned = {str(plain.token_ids[0]): -100}
    (other,) = run(client, **fields, logit_bias=banned).choices
    assert other.token_ids != plain.token_ids
    assert of_choice(other).content[0].top_logprobs == of_choice(plain).content[0].top_logprobs
    chosen = of_choice(other).content[0]
    assert chosen.logprob < of_choice(plain).content[0].logprob


@pytest.mark.usefixtures("first")
def test_a_bias_forces_a_token_and_a_penalty_breaks_the_run(client: Client) -> None:
    token = run(client, **COUNT).token_ids[0]
    forced = {**COUNT, "logit_bias": {str(token): 100}, "max_tokens": 120}
    assert run(client, **forced).token_ids == [token] * 120
    # Two off a hundred each time: it wins fifty times or so, not a hundred and twenty.
    penalised = run(client, **forced, frequency_penalty=2.0).token_ids
    assert penalised[:20] == [token] * 20
    assert penalised.count(token) < 100


@pytest.mark.usefixtures("first")
@pytest.mark.parametrize(
    "penalty", [{"repetition_penalty": 3.0}, {"presence_penalty": 2.0}, {"frequency_penalty": -1.0}]
)
def test_each_penalty_changes_what_is_drawn(client: Client, penalty: dict[str, float]) -> None:
    """Dice are so even that any change of a logit shows."""
    plain, other = run(client, **DICE), run(client, **DICE, **penalty)
    assert other.token_ids != plain.token_ids
    assert other.token_ids == run(client, **DICE, **penalty).token_ids


@pytest.mark.usefixtures("first")
def test_a_bias_on_no_token_of_the_model_fails_by_its_path(client: Client) -> None:
    result = run(client, **COUNT, logit_bias={"999999": 1})
    assert result.error is not None
    assert result.error.code == "token_out_of_vocabulary"
    assert result.error.message.startswith("logit_bias.999999: ")


@pytest.mark.parametrize("how", ["kill -9", "TERM"])
def test_choices_survive_the_loss_of_their_worker(
    local_redis: LocalRedis, first: WorkerProcess, how: str
) -> None:
    """Each goes on where its own committed tokens end, with its own random numbers."""
    fields = {**DICE, "content": "dice 80", "n": 4, "presence_penalty": 0.3, "logprobs": True}
    name = f"doomed-by-{how[0]}"
    with Client(local_redis.url) as client:
        expected = run(client, **fields)
        first.signal(signal.SIGSTOP)  # idle: the other one gets the job
        try:
            with WorkerProcess(local_redis.url, name, None, worker__drain_seconds=0) as doomed:
                doomed.serving()
                handle = submit(client, **fields)
                wait_until(lambda: len(job_events(client, handle.id)) > 4, timeout=30)
                if how == "TERM":
                    doomed.terminate()
                    assert doomed.exit_status() == 0
        finally:
            first.signal(signal.SIGCONT)
        result = handle.result(timeout=60)
        assert told(result) == told(expected)
        for resumed, whole in zip(result.choices, expected.choices, strict=True):
            told_again, told_once = of_choice(resumed).content, of_choice(whole).content
            assert [e.token for e in told_again] == [e.token for e in told_once]
            scores = [entry.logprob for entry in told_once]
            assert [e.logprob for e in told_again] == pytest.approx(scores, abs=1e-4)
        attempts = [e.worker for e in job_events(client, handle.id) if e.type == "attempt"]
        assert attempts == [name, "first"]
