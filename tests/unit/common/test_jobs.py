"""The job's schema: defaults, what is accepted, ids, the wire form, what templates get."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
from pydantic import ValidationError

from mlx_serving.common import limits
from mlx_serving.common.errors import CorruptJob, InvalidJob
from mlx_serving.common.job import schema
from mlx_serving.common.job.schema import GenerationJob
from mlx_serving.common.queues import LANES, PROTOCOL, queue_name

NEWER = PROTOCOL + 1

CALL = {
    "id": "c1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Oslo"}'},
}
CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be short."},
    {"role": "developer", "content": "Be right."},
    {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "4 °C", "tool_call_id": "c1"},
]
TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
}


def job(**fields: Any) -> GenerationJob:
    if fields.get("messages") is None:
        fields.setdefault("prompt", "hi")
    return GenerationJob.build(model="tally", **fields)


def test_defaults_are_the_stated_ones() -> None:
    made = job()
    assert (made.max_tokens, made.temperature, made.top_p, made.top_k) == (256, 1.0, 1.0, 0)
    assert (made.lane, made.stream, made.max_attempts, made.result_ttl) == (
        "default",
        True,
        2,
        3600,
    )


def test_every_role_and_form_of_content_is_accepted() -> None:
    assert [message.role for message in job(messages=CHAT).messages or ()] == [
        "system",
        "developer",
        "user",
        "assistant",
        "tool",
    ]


def test_templates_get_joined_text_and_arguments_as_objects() -> None:
    messages = job(messages=CHAT).template_messages()
    assert messages[2] == {"role": "user", "content": "Hello"}
    assert messages[3]["content"] == ""
    assert messages[3]["tool_calls"][0]["function"]["arguments"] == {"city": "Oslo"}
    assert messages[4] == {"role": "tool", "content": "4 °C", "tool_call_id": "c1"}


def test_templates_get_tools_unless_the_choice_is_none() -> None:
    assert job(messages=CHAT, tools=[TOOL]).template_tools() == [TOOL]
    assert job(messages=CHAT, tools=[TOOL], tool_choice="auto").template_tools() == [TOOL]
    assert job(messages=CHAT, tools=[TOOL], tool_choice="none").template_tools() is None
    assert job(messages=CHAT, tools=[]).template_tools() is None
    assert job(messages=CHAT).template_tools() is None


def test_a_prompt_has_no_template_messages() -> None:
    assert job().template_messages() == []


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 1},
        {"logprobs": False},
        {"top_logprobs": 0},
        {"repetition_penalty": 1},
        {"presence_penalty": 0},
        {"frequency_penalty": 0.0},
        {"logit_bias": {}},
        {"response_format": {"type": "text"}},
        {"kind": "generate"},
    ],
)
def test_neutral_values_are_accepted_and_say_no_more_than_none(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if only a newer worker honoured the field: it has nothing to honour."""
    monkeypatch.setattr(schema, "FEATURE_PROTOCOL", dict.fromkeys(fields, NEWER))
    assert job(**fields).min_protocol == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 2},
        {"n": limits.CHOICES, "max_tokens": limits.TOKENS // limits.CHOICES},
        {"logprobs": True},
        {"logprobs": True, "top_logprobs": 0},
        {"logprobs": True, "top_logprobs": 20, "max_tokens": limits.TOKENS // 21},
        {"repetition_penalty": 1.1},
        {"presence_penalty": -2},
        {"frequency_penalty": 2.0},
        {"logit_bias": {"0": -100, "50256": 100}},
    ],
)
def test_other_values_are_carried_and_need_a_worker_that_honours_them(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = job(**fields)
    assert made.min_protocol == 1
    assert GenerationJob.from_wire(made.to_wire()) == made
    monkeypatch.setattr(schema, "FEATURE_PROTOCOL", dict.fromkeys(fields, NEWER))
    assert job(**fields).min_protocol == NEWER


def test_null_means_not_given() -> None:
    assert job(temperature=None, stop=None, seed=None, messages=None) == job()


def test_max_completion_tokens_is_an_alias() -> None:
    assert job(max_completion_tokens=7).max_tokens == 7
    assert job(max_tokens=7, max_completion_tokens=7).max_tokens == 7


def test_stop_is_a_string_or_a_list_of_them() -> None:
    assert job(stop="END").stop == ("END",)
    assert job(stop=["a", "b"]).stop == ("a", "b")


@pytest.mark.parametrize("seed", [0, 2**63, 2**64 - 1])
def test_seeds_of_64_bits_survive_the_wire(seed: int) -> None:
    wire = json.loads(json.dumps(job(seed=seed).to_wire()))
    assert GenerationJob.from_wire(wire).seed == seed


def test_ids_are_new_each_time_without_a_key() -> None:
    made = job()
    ids = {made.job_id() for _ in range(10)}
    assert len(ids) == 10
    assert all(len(job_id) == 32 and int(job_id, 16) >= 0 for job_id in ids)


def test_ids_follow_the_idempotency_key_and_the_tenant() -> None:
    made = job(idempotency_key="k").job_id()
    assert made == job(idempotency_key="k", temperature=0).job_id()
    assert made != job(idempotency_key="k", tenant="t").job_id()
    assert made != job(idempotency_key="l").job_id()
    # Every release has to give the same id, or a resubmitted job runs twice.
    assert (
        job(idempotency_key="order-1", tenant="acme").job_id() == "af5f4f1841e88ebcae502028d51c062c"
    )


def test_queues_are_named_by_model_and_lane() -> None:
    assert job(lane="bulk").queue == "tally:bulk"
    assert [queue_name("m", lane) for lane in LANES] == ["m:interactive", "m:default", "m:bulk"]


def test_the_wire_form_leaves_defaults_out() -> None:
    assert job().to_wire() == {"v": 1, "min_protocol": 1, "model": "tally", "prompt": "hi"}


def test_the_wire_form_is_read_back_equal() -> None:
    made = job(messages=CHAT, tools=[TOOL], stop=["x"], temperature=0, metadata={"a": "b"})
    assert GenerationJob.from_wire(json.loads(json.dumps(made.to_wire()))) == made


@pytest.mark.parametrize("wire", [None, [], "x", 3])
def test_a_payload_that_is_no_object_is_corrupt(wire: object) -> None:
    with pytest.raises(CorruptJob):
        GenerationJob.from_wire(wire)


@pytest.mark.parametrize("needed", [0, PROTOCOL + 1, True, "1", None, 1.0])
def test_a_payload_of_another_protocol_is_refused(needed: object) -> None:
    with pytest.raises(InvalidJob, match="min_protocol"):
        GenerationJob.from_wire(job().to_wire() | {"min_protocol": needed})


def test_a_payload_with_unknown_fields_is_refused() -> None:
    with pytest.raises(InvalidJob, match="grammar: is not a known field"):
        GenerationJob.from_wire(job().to_wire() | {"grammar": "x"})


def test_a_feature_of_a_later_protocol_raises_what_a_job_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(schema.FEATURE_PROTOCOL, "top_k", 3)
    monkeypatch.setitem(schema.FEATURE_PROTOCOL, "min_p", 2)
    assert job().min_protocol == 1
    assert job(min_p=0.1).min_protocol == 2
    assert job(min_p=0.1, top_k=4).to_wire()["min_protocol"] == 3


def test_jobs_are_frozen_and_can_be_pickled() -> None:
    made = job(messages=CHAT)
    with pytest.raises(ValidationError):
        made.model = "other"
    assert pickle.loads(pickle.dumps(made)) == made  # noqa: S301 -- our own bytes


def test_the_repr_shows_no_prompt() -> None:
    assert "hush" not in repr(job(prompt="hush"))
    assert "hush" not in repr(job(messages=[{"role": "user", "content": "hush"}]))


def test_the_constructor_raises_as_pydantic_does_and_shows_no_prompt() -> None:
    with pytest.raises(ValidationError) as raised:
        GenerationJob(model="tally", prompt="hush", top_k=-1, n=2)
    assert "hush" not in str(raised.value)
