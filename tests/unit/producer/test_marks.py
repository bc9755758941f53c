"""Marks: the same for jobs whose prompts begin alike where it pays, and for no others."""

from __future__ import annotations

import re
from typing import Any

import pytest

from mlx_serving.common.job.schema import GenerationJob
from mlx_serving.producer.envelope import seal
from mlx_serving.producer.marks import BEGINNING_CHARS, PROMPT_CHARS, marks

LONG = "You answer politely. " * 30
FORM = re.compile(r"([0-9a-f]{16})?,([0-9a-f]{16})?")


def chat(*turns: str, **fields: Any) -> tuple[str, str]:
    """Marks of a conversation: a system turn, then user and assistant in turn; '': no such turn."""
    system, *rest = turns
    roles = ["user", "assistant"] * len(rest)
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": role, "content": text} for role, text in zip(roles, rest, strict=False)]
    return of(messages=messages, **fields)


def of(**fields: Any) -> tuple[str, str]:
    found = marks(GenerationJob.build(**({"model": "tally"} | fields)))
    if not found:
        return "", ""
    assert FORM.fullmatch(found)
    conversation, _, beginning = found.partition(",")
    return conversation, beginning


def test_every_turn_of_a_conversation_has_its_marks() -> None:
    first = chat(LONG, "hello")
    assert all(first)
    assert chat(LONG, "hello", "hi", "and?") == first
    assert chat(LONG, "hello", "hi", "and?", "so", "on") == first


def test_conversations_share_the_beginning_alone() -> None:
    first, other = chat(LONG, "hello"), chat(LONG, "good day")
    assert first[0] != other[0]
    assert first[1] == other[1]
    assert chat("Other. " + LONG, "hello")[1] != first[1]


def test_nothing_is_marked_that_is_short() -> None:
    short = "x" * (BEGINNING_CHARS // 4)
    assert chat(short, short) == ("", "")
    assert chat("", "hello") == ("", "")
    assert of(prompt="x" * (BEGINNING_CHARS - 1)) == ("", "")


def test_a_conversation_that_grew_long_has_a_mark_though_it_began_short() -> None:
    conversation, beginning = chat("Be brief.", "hello", LONG, "and?")
    assert conversation
    assert not beginning, "what others share with it is short"
    assert chat("Be brief.", "hello", LONG, "and?", "so", "on") == (conversation, "")


def test_a_long_first_turn_may_begin_as_others_do() -> None:
    """Examples before a question, in one turn."""
    first, other = chat("Be brief.", LONG + "1?"), chat("Be brief.", LONG + "2?")
    assert first[0] != other[0]
    assert first[1] == other[1] != ""


def test_plain_prompts_share_their_first_characters() -> None:
    text = "x" * BEGINNING_CHARS
    assert of(prompt=text + "a") == of(prompt=text + "b")
    assert of(prompt=text) == ("", of(prompt=text + "a")[1])
    long = "x" * PROMPT_CHARS
    assert all(of(prompt=long))
    assert of(prompt=long + "a") == of(prompt=long + "b")
    assert of(prompt=long)[0] != of(prompt="y" + long)[0]


def test_a_bulk_line_is_no_conversation() -> None:
    assert chat(LONG, "hello", lane="bulk") == ("", chat(LONG, "hello")[1])
    assert of(prompt="x" * PROMPT_CHARS, lane="bulk")[0] == ""
    assert chat("Be brief.", "hello", LONG, "and?", lane="bulk") == ("", "")


@pytest.mark.parametrize(
    "fields",
    [{"tenant": "acme"}, {"model": "other"}, {"chat_template_kwargs": {"enable_thinking": True}}],
    ids=str,
)
def test_what_the_prefix_cache_keeps_apart_has_other_marks(fields: dict[str, Any]) -> None:
    pairs = zip(chat(LONG, "hello"), chat(LONG, "hello", **fields), strict=True)
    assert all(one != other for one, other in pairs)


def test_what_does_not_change_the_prompt_changes_no_mark() -> None:
    other: dict[str, Any] = {"temperature": 0.5, "seed": 1, "lane": "interactive", "max_tokens": 9}
    assert chat(LONG, "hello", **other) == chat(LONG, "hello")


def test_tools_are_a_part_of_the_beginning() -> None:
    tool = {"type": "function", "function": {"name": "look_up", "description": LONG}}
    short = chat("", "hello")
    with_tools = chat("", "hello", tools=[tool])
    assert short == ("", "")
    assert all(with_tools)
    assert chat("", "good day", tools=[tool])[1] == with_tools[1]
    assert chat("", "hello", tools=[tool], tool_choice="none") == short, "no template sees them"


def test_turns_in_parts_are_read_as_one_text() -> None:
    parts = [{"type": "text", "text": LONG[:99]}, {"type": "text", "text": LONG[99:]}]
    messages = [{"role": "system", "content": parts}, {"role": "user", "content": "hello"}]
    assert of(messages=messages) == chat(LONG, "hello")


def test_a_conversation_without_a_user_has_marks() -> None:
    assert all(of(messages=[{"role": "system", "content": LONG}]))


def test_the_envelope_carries_them() -> None:
    job = GenerationJob.build(model="tally", prompt="x" * BEGINNING_CHARS)
    assert seal(job, max_payload_bytes=1 << 20).marks == marks(job) != ""
