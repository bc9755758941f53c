"""Malformed jobs: each is refused at submit, by the path of the field that is wrong."""

from __future__ import annotations

import json
import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_serving.common import limits
from mlx_serving.common.errors import InvalidJob, PayloadTooLarge
from mlx_serving.common.job.checks import UNSUPPORTED
from mlx_serving.common.job.schema import GenerationJob
from mlx_serving.common.validation import _size, check_data, is_modest, scan

USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "f"}}


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def chat(*messages: Any, **fields: Any) -> dict[str, Any]:
    return {"model": "tally", "messages": list(messages), **fields}


def prompt(**fields: Any) -> dict[str, Any]:
    return {"model": "tally", "prompt": "hi", **fields}


def call(arguments: object) -> dict[str, Any]:
    function = {"name": "f", "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}


MALFORMED: list[tuple[object, str]] = [
    # the whole
    ([], ""),
    ("{}", ""),
    ({"prompt": "hi"}, "model"),
    ({"model": "tally"}, "messages"),
    (prompt(messages=[USER]), "prompt"),
    (prompt(temprature=1), "temprature"),
    (prompt(v=2), "v"),
    # model
    (prompt(model=""), "model"),
    (prompt(model="a:b"), "model"),
    (prompt(model="../x"), "model"),
    (prompt(model="a b"), "model"),
    (prompt(model="tally\n"), "model"),
    (prompt(model=3), "model"),
    (prompt(model="m" * 200), "model"),
    # messages
    (chat(), "messages"),
    (chat("hi"), "messages[0]"),
    (chat(USER, {"role": "robot", "content": "x"}), "messages[1].role"),
    (chat(USER, USER, {"role": "user", "content": 5}), "messages[2].content"),
    (chat({"role": "user"}), "messages[0].content"),
    (chat({"role": "user", "content": []}), "messages[0].content"),
    (
        chat({"role": "user", "content": [{"type": "image_url", "text": "x"}]}),
        "messages[0].content[0].type",
    ),
    (chat({"role": "user", "content": [{"type": "text"}]}), "messages[0].content[0].text"),
    (chat({"role": "user", "content": "x", "name": "Ann"}), "messages[0].name"),
    (chat({"role": "user", "content": "\ud800"}), "messages[0].content"),
    (chat({"role": "user", "content": "x", "tool_calls": []}), "messages[0].tool_calls"),
    (chat({"role": "user", "content": "x", "tool_call_id": "1"}), "messages[0].tool_call_id"),
    (chat(call("{")), "messages[0].tool_calls[0].function.arguments"),
    (chat(call("[1]")), "messages[0].tool_calls[0].function.arguments"),
    (chat(call({"a": 1})), "messages[0].tool_calls[0].function.arguments"),
    (chat(call("[" * 100_000)), "messages[0].tool_calls[0].function.arguments"),
    # prompt
    (prompt(prompt=""), "prompt"),
    (prompt(prompt=["a"]), "prompt"),
    (prompt(prompt=b"hi"), "prompt"),
    # how much
    (prompt(max_tokens=0), "max_tokens"),
    (prompt(max_tokens="12"), "max_tokens"),
    (prompt(max_tokens=1.0), "max_tokens"),
    (prompt(max_tokens=True), "max_tokens"),
    (prompt(max_tokens=limits.TOKENS + 1), "max_tokens"),
    (prompt(max_completion_tokens=-1), "max_completion_tokens"),
    (prompt(max_tokens=1, max_completion_tokens=2), "max_completion_tokens"),
    (prompt(stop=[""]), "stop[0]"),
    (prompt(stop=["x"] * 17), "stop"),
    (prompt(stop=["a", 3]), "stop[1]"),
    (prompt(stop="s" * 257), "stop[0]"),
    # sampling
    (prompt(temperature=-0.1), "temperature"),
    (prompt(temperature=2.1), "temperature"),
    (prompt(temperature=math.nan), "temperature"),
    (prompt(temperature="1"), "temperature"),
    (prompt(top_p=0), "top_p"),
    (prompt(top_p=math.inf), "top_p"),
    (prompt(top_k=-1), "top_k"),
    (prompt(top_k=1.5), "top_k"),
    (prompt(min_p=1.01), "min_p"),
    (prompt(seed=-1), "seed"),
    (prompt(seed=2**64), "seed"),
    (prompt(repetition_penalty=0), "repetition_penalty"),
    (prompt(presence_penalty=3), "presence_penalty"),
    (prompt(frequency_penalty=-2.1), "frequency_penalty"),
    (prompt(logit_bias={"50256": 100.5}), "logit_bias.50256"),
    (prompt(logit_bias={"50256": -101}), "logit_bias.50256"),
    (prompt(logit_bias={"50256": math.nan}), "logit_bias.50256"),
    (prompt(logit_bias={"50256": "1"}), "logit_bias.50256"),
    (prompt(logit_bias={"-1": 1}), "logit_bias.-1"),
    (prompt(logit_bias={"007": 1}), "logit_bias.007"),
    (prompt(logit_bias={"": 1}), "logit_bias."),
    (prompt(logit_bias={"one": 1}), "logit_bias.one"),
    (prompt(logit_bias={"9" * 11: 1}), f"logit_bias.{'9' * 11}"),
    (prompt(logit_bias=[1]), "logit_bias"),
    (prompt(logit_bias={str(i): 1 for i in range(limits.LOGIT_BIASES + 1)}), "logit_bias"),
    # choices and log probabilities
    (prompt(n=0), "n"),
    (prompt(n=limits.CHOICES + 1), "n"),
    (prompt(n=2.0), "n"),
    (prompt(n=2**40), "n"),
    (prompt(n=limits.CHOICES, max_tokens=limits.TOKENS // limits.CHOICES + 1), "n"),
    (prompt(logprobs=3), "logprobs"),
    (prompt(top_logprobs=5), "top_logprobs"),
    (prompt(logprobs=False, top_logprobs=1), "top_logprobs"),
    (prompt(logprobs=True, top_logprobs=21), "top_logprobs"),
    (prompt(logprobs=True, top_logprobs=-1), "top_logprobs"),
    (prompt(logprobs=True, top_logprobs=20, n=8, max_tokens=8192), "top_logprobs"),
    # tools
    (chat(USER, tools=[{**TOOL, "type": "search"}]), "tools[0].type"),
    (chat(USER, tools=[TOOL, {"type": "function"}]), "tools[1].function"),
    (
        chat(USER, tools=[{"type": "function", "function": {"name": "a b"}}]),
        "tools[0].function.name",
    ),
    (prompt(tools=[TOOL]), "tools"),
    (prompt(chat_template_kwargs={"enable_thinking": False}), "chat_template_kwargs"),
    (chat(USER, chat_template_kwargs={"x": math.nan}), "chat_template_kwargs.x"),
    # the queue's own
    (prompt(lane="fast"), "lane"),
    (prompt(stream=1), "stream"),
    (prompt(deadline=0), "deadline"),
    (prompt(deadline=-5), "deadline"),
    (prompt(timeout="10s"), "timeout"),
    (prompt(abandon_after=math.inf), "abandon_after"),
    (prompt(result_ttl=0), "result_ttl"),
    (prompt(result_ttl=limits.SECONDS + 1), "result_ttl"),
    (prompt(max_attempts=0), "max_attempts"),
    (prompt(idempotency_key=""), "idempotency_key"),
    (prompt(idempotency_key="a\0b"), "idempotency_key"),
    (prompt(tenant="a b"), "tenant"),
    (prompt(metadata={"a": 1}), "metadata.a"),
    (prompt(metadata={"a": "x" * 513}), "metadata.a"),
    (prompt(metadata={"": "x"}), "metadata."),
    (prompt(metadata={str(i): "x" for i in range(17)}), "metadata"),
    (prompt(traceparent="00-abc-def-01"), "traceparent"),
]


@pytest.mark.parametrize(("data", "path"), MALFORMED, ids=[path or "job" for _, path in MALFORMED])
def test_a_malformed_job_is_refused_by_the_path_of_its_field(data: object, path: str) -> None:
    with pytest.raises(InvalidJob) as raised:
        GenerationJob.parse(data)
    assert [error.path for error in raised.value.errors] == [path]
    assert raised.value.errors[0].reason
    assert str(raised.value.errors[0]) in str(raised.value)


UNSUPPORTED_EXAMPLES: dict[str, Any] = {
    "kind": "embed",
    "adapter": "my-lora",
}


@pytest.mark.parametrize("field", [line.field for line in UNSUPPORTED])
def test_what_the_engine_cannot_do_is_refused_by_name(field: str) -> None:
    with pytest.raises(InvalidJob) as raised:
        GenerationJob.parse(chat(USER, **{field: UNSUPPORTED_EXAMPLES[field]}))
    (error,) = raised.value.errors
    assert error.path == field
    assert "supported" in error.reason


def test_each_wrong_field_is_named_at_once() -> None:
    with pytest.raises(InvalidJob) as raised:
        GenerationJob.build(model="a:b", prompt="hi", top_k=-1, lane="x")
    assert [error.path for error in raised.value.errors] == ["model", "top_k", "lane"]


def test_more_than_twenty_errors_are_counted_and_not_listed() -> None:
    with pytest.raises(InvalidJob) as raised:
        GenerationJob.parse(chat(*[{"role": "x", "content": "y"}] * 50))
    assert len(raised.value.errors) == 21
    assert raised.value.errors[-1] == ("", "and 30 more")


@pytest.mark.parametrize("depth", [100, 30_000])
def test_deep_nesting_is_refused_without_recursion(depth: int) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"x": nested(depth)}}}
    with pytest.raises(InvalidJob) as raised:
        GenerationJob.parse(chat(USER, tools=[tool]))
    (error,) = raised.value.errors
    assert error.path.startswith("tools[0].function.parameters.x[0]")
    assert "deeper" in error.reason


def test_a_list_that_holds_itself_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(InvalidJob, match="deeper"):
        GenerationJob.parse(prompt(chat_template_kwargs={"x": loop}))


def test_a_job_of_too_many_bytes_is_refused() -> None:
    half = "é" * (limits.PAYLOAD_BYTES // 4 + 1)
    with pytest.raises(PayloadTooLarge) as raised:
        GenerationJob.parse(
            chat({"role": "user", "content": half}, {"role": "user", "content": half})
        )
    assert raised.value.code == "payload_too_large"


def test_errors_show_no_values_and_cut_long_keys() -> None:
    with pytest.raises(InvalidJob) as raised:
        GenerationJob.parse(
            prompt(prompt=["hush"], stop=["hush", 5], lane="hush", **{"k" * 5000: "hush"})
        )
    assert "hush" not in str(raised.value)
    assert len(str(raised.value)) < 500


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
ODD = [math.nan, -math.inf, "\ud800", {"\udfff": 1}, nested(40), nested(32), object(), (1,), b"x"]


@given(st.lists(PLAIN | st.sampled_from(ODD), max_size=4))
def test_the_quick_look_passes_only_what_the_thorough_one_does(data: list[Any]) -> None:
    if _size((data,), 1) < math.inf:
        assert list(scan(data)) == []


@given(PLAIN)
def test_the_quick_look_passes_whatever_is_plain_and_right(data: Any) -> None:
    assert (_size((data,), 1) < math.inf) == (list(scan(data)) == [])


@given(st.lists(PLAIN | st.sampled_from([nested(30), nested(31), nested(40), "\ud800", math.inf])))
def test_what_is_read_from_modest_json_the_quick_look_passes(data: list[Any]) -> None:
    text = json.dumps(data).encode()
    if is_modest(text):
        try:
            read = msgspec.json.decode(text)
        except msgspec.MsgspecError:  # numbers that are not finite, lone surrogates
            return
        check_data(read)


def test_json_that_is_large_or_may_be_deep_is_not_modest() -> None:
    assert is_modest(b"[" * limits.JSON_DEPTH)
    assert not is_modest(b"[" * limits.JSON_DEPTH + b"{")
    assert is_modest(b" " * limits.PAYLOAD_BYTES)
    assert not is_modest(b" " * (limits.PAYLOAD_BYTES + 1))


def test_modest_data_is_checked_for_all_else() -> None:
    with pytest.raises(InvalidJob, match="top_p"):
        GenerationJob.parse(prompt(top_p=3), modest=True)
    with pytest.raises(InvalidJob, match="nested deeper"):
        GenerationJob.parse(prompt(chat_template_kwargs={"x": nested(40)}))
