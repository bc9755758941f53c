"""Structured output and tool calls, from the client to the model and back, through deaths."""

from __future__ import annotations

import json
import signal
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest

from mlx_serving import Client
from mlx_serving.common.results import assemble
from mlx_serving.tally.two_turns import tool_schema
from mlx_serving.worker.engine.text.prompts import PromptEncoder
from tests.support.helpers import wait_until
from tests.support.output_support import planner, tally
from tests.support.schemas_for_tests import PERSON, schema
from tests.support.stepped_worker import SteppedWorker, told
from tests.support.worker_process import WorkerProcess, job_events

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlx_serving.common.redis.local import LocalRedis
    from mlx_serving.common.results import GenerationResult
    from mlx_serving.producer.handles import JobHandle

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(180),
    pytest.mark.may_leak(reason="a killed worker leaves its name in RQ's sets"),
]

TOOLS = [tool_schema("get_weather"), tool_schema("add")]
WEATHER = [{"role": "user", "content": "weather in Paris"}]


JOBS: dict[str, dict[str, Any]] = {
    "schema": {"response_format": schema(PERSON), "temperature": 1.0, "seed": 5},
    "regex": {
        "response_format": {"type": "regex", "regex": "(é|🙂){4}-[0-9]{5}"},
        "temperature": 1.0,
        "seed": 6,
    },
    "call": {"messages": WEATHER, "tools": TOOLS, "temperature": 0.0},
    "forced call": {"tools": TOOLS, "tool_choice": "required", "temperature": 0.3, "seed": 1},
}


def submit(client: Client, **fields: Any) -> JobHandle:
    given: dict[str, Any] = {
        "model": "tally", "messages": [{"role": "user", "content": "json name=Ann age=34"}],
        "max_tokens": 200, "result_ttl": 120,
    }  # fmt: skip
    return client.submit(given | fields)


def run(client: Client, **fields: Any) -> GenerationResult:
    handle = submit(client, **fields)
    result = handle.result(timeout=30)
    assert assemble(handle.id, job_events(client, handle.id)).choices == result.choices
    return result


@pytest.fixture
def client(local_redis: LocalRedis) -> Iterator[Client]:
    with Client(local_redis.url) as client:
        yield client


@pytest.fixture(scope="module")
def worker(local_redis: LocalRedis) -> Iterator[WorkerProcess]:
    with WorkerProcess(local_redis.url, "structured", None) as worker:
        yield worker.serving()


@pytest.fixture
def stepped(settled_redis: LocalRedis) -> Iterator[SteppedWorker]:
    encode = PromptEncoder(tally().tokenizer).encode
    with SteppedWorker(settled_redis.url, tally(), encode, plan=planner().plan) as worker:
        yield worker


def calls(result: GenerationResult) -> list[tuple[str, str]]:
    return [(call.function.name, call.function.arguments) for call in result.tool_calls]


@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)
def test_a_cut_after_any_token_leaves_no_seam(
    client: Client, stepped: SteppedWorker, job: dict[str, Any]
) -> None:
    """Within a grammar, within a call, within a marker of a call."""
    handle = submit(client, **job)
    stepped.claim().finish()
    expected, result = told(client, handle), handle.result(timeout=1)
    assert len(expected[0]) > 10
    for cut in range(len(expected[0])):
        handle = submit(client, **job)
        stepped.claim().decode(cut)
        stepped.leave(["kill", "hand over"][cut % 2])
        stepped.claim().finish()
        assert told(client, handle) == expected, f"cut after {cut} tokens"
        assert calls(handle.result(timeout=1)) == calls(result)
        events = job_events(client, handle.id)
        assert assemble(handle.id, events).choices == handle.result(timeout=1).choices


@pytest.mark.chaos
@pytest.mark.parametrize("how", ["kill -9", "TERM"])
def test_a_grammar_and_a_call_survive_the_loss_of_their_worker(
    local_redis: LocalRedis, how: str
) -> None:
    """Before the tests that share a worker, which would take the job."""
    long = schema({"type": "array", "items": PERSON, "minItems": 4, "maxItems": 4})
    fields = {"response_format": long, "seed": 9, "max_tokens": 400}
    names = [f"{name}{how[:1]}" for name in "ab"]  # a killed worker's name stays for a while
    url = local_redis.url
    with Client(url) as client, WorkerProcess(url, names[1], None) as second:
        second.serving()
        expected = run(client, **fields)
        jsonschema.validate(json.loads(expected.text), long["json_schema"]["schema"])
        second.signal(signal.SIGSTOP)  # idle: the first one gets the job
        with WorkerProcess(url, names[0], None, worker__drain_seconds=0) as doomed:
            doomed.serving()
            handle = submit(client, **fields)
            wait_until(lambda: len(job_events(client, handle.id)) > 4, timeout=30)
            if how == "TERM":
                doomed.terminate()
                assert doomed.exit_status() == 0
            else:
                doomed.kill()
        second.signal(signal.SIGCONT)
        result = handle.result(timeout=30)
        assert (result.token_ids, result.text) == (expected.token_ids, expected.text)
        attempts = [e.worker for e in job_events(client, handle.id) if e.type == "attempt"]
        assert attempts == names


@pytest.mark.usefixtures("worker")
def test_a_schema_is_kept_to_over_the_wire(client: Client) -> None:
    results = [run(client, response_format=schema(PERSON), seed=n) for n in range(6)]
    for result in results:
        assert (result.state, result.finish_reason) == ("finished", "stop")
        jsonschema.validate(json.loads(result.text), PERSON)
    assert len({result.text for result in results}) > 1


@pytest.mark.usefixtures("worker")
def test_choices_follow_one_grammar_each_in_its_own_place(client: Client) -> None:
    result = run(client, response_format=schema(PERSON), seed=3, n=4)
    for choice in result.choices:
        jsonschema.validate(json.loads(choice.text), PERSON)
    assert len({choice.text for choice in result.choices}) > 1


@pytest.mark.usefixtures("worker")
def test_what_the_worker_can_not_compile_fails_by_its_field_and_harms_nobody(
    client: Client,
) -> None:
    counting = submit(client, messages=[{"role": "user", "content": "count from 3 to 60"}],
                      temperature=0.0)  # fmt: skip
    hostile = {
        "response_format.json_schema.schema": schema({"type": "integer", "multipleOf": 999_983}),
        "response_format.regex": {"type": "regex", "regex": "(a+)+b("},
        "response_format.grammar": {"type": "grammar", "grammar": "start: nothing"},
    }
    for path, form in hostile.items():
        result = submit(client, response_format=form).result(timeout=30)
        assert result.state == "failed"
        assert result.error is not None
        assert result.error.code == "invalid_schema"
        assert result.error.message.startswith(f"{path}: ")
        assert not result.error.retryable
    assert counting.result(timeout=60).text == " ".join(map(str, range(3, 61)))


@pytest.mark.usefixtures("worker")
def test_a_tool_is_called_and_its_reply_answered(client: Client) -> None:
    handle = submit(client, messages=WEATHER, tools=TOOLS, temperature=0.0)
    events = list(handle.stream())
    (delta,) = [c for e in events for choice in e.choices for c in choice.tool_calls or ()]
    assert delta.function is not None
    assert (delta.index, delta.type, delta.function.name) == (0, "function", "get_weather")
    assert json.loads(delta.function.arguments) == {"city": "Paris"}
    result = handle.result(timeout=30)
    assert (result.text, result.finish_reason) == ("", "tool_calls")
    assert [call.id for call in result.tool_calls] == [delta.id]
    reply = {
        "role": "tool",
        "tool_call_id": result.tool_calls[0].id,
        "content": json.dumps({"temperature": 21, "sky": "clear"}),
    }
    messages = [*WEATHER, result.message, reply]
    second = run(client, messages=messages, tools=TOOLS, temperature=0.0)
    assert (second.text, second.finish_reason) == ("Paris: 21 degrees, clear", "stop")
    assert second.tool_calls == []


@pytest.mark.usefixtures("worker")
def test_a_choice_of_tool_is_forced_over_the_wire(client: Client) -> None:
    choice = {"type": "function", "function": {"name": "add"}}
    result = run(client, messages=WEATHER, tools=TOOLS, tool_choice=choice, temperature=0.0)
    ((name, arguments),) = calls(result)
    assert name == "add"
    jsonschema.validate(json.loads(arguments), TOOLS[1]["function"]["parameters"])
