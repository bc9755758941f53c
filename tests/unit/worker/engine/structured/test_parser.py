"""Text, reasoning and tool calls: told apart piece by piece, as they are in one piece."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.generate import TextStateMachine

from mlx_serving.worker.engine.interface import ParsedToolCall, Parts
from mlx_serving.worker.engine.structured.parser import (
    CALL,
    REASONING,
    TEXT,
    MarkedTextParser,
)

TRANSITIONS = {
    TEXT: (("<think>", REASONING), ("<tool_call>", CALL)),
    REASONING: (("</think>", TEXT), ("<tool_call>", CALL)),
    CALL: (("</tool_call>", TEXT),),
}
FRAGMENTS = (
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool", "_call>", "<", "/", "think>",
    '{"name": "f", "arguments": {}}', '{"name": "f"', "é", "🙂", "\n", "a", " ",
)  # fmt: skip
texts = st.lists(st.sampled_from(FRAGMENTS), max_size=20).map("".join)


def read(text: str) -> list[ParsedToolCall] | None:
    try:
        found = json.loads(text)
        return [ParsedToolCall(0, "", found["name"], json.dumps(found["arguments"]))]
    except (ValueError, KeyError, TypeError):
        return None


def parser(state: str = TEXT) -> MarkedTextParser:
    return MarkedTextParser(TRANSITIONS, state, read, "job\x000")


def whole(text: str, state: str = TEXT, *, ended: bool = True) -> Parts:
    made = parser(state)
    return made.push(text) + made.finish(whole=ended)


CALL_TEXT = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


def test_text_without_markers_is_text() -> None:
    assert whole("a < b, a <b> c") == Parts("a < b, a <b> c")


def test_reasoning_is_apart_from_text() -> None:
    assert whole("<think>so\nso</think>\n\nyes") == Parts("\n\nyes", "so\nso")


def test_a_prompt_that_opened_the_reasoning_begins_in_it() -> None:
    assert whole("so</think>yes", REASONING) == Parts("yes", "so")


def test_a_call_is_read_whole_and_its_markers_are_no_text() -> None:
    parts = whole(f"I look.\n{CALL_TEXT}\n{CALL_TEXT}")
    assert parts.text == "I look.\n\n"
    assert [(call.index, call.name, call.arguments) for call in parts.tool_calls] == [
        (0, "f", '{"a": 1}'),
        (1, "f", '{"a": 1}'),
    ]
    assert parts.tool_calls[0].id != parts.tool_calls[1].id


def test_the_same_job_and_choice_gives_a_call_the_same_id() -> None:
    def identity(seed: str) -> str:
        return MarkedTextParser(TRANSITIONS, TEXT, read, seed).push(CALL_TEXT).tool_calls[0].id

    assert identity("job\x000") == identity("job\x000")
    assert identity("job\x000") != identity("job\x001")


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>no JSON</tool_call>",
        '<tool_call>{"name": 3}</tool_call>',
        "<tool_call></tool_call>",
        "a<tool_call>b<tool_call>c</tool_call>d",
    ],
)
def test_a_malformed_call_is_text_to_the_letter(text: str) -> None:
    assert whole(text) == Parts(text)


def test_a_malformed_call_within_reasoning_is_reasoning() -> None:
    assert whole("<think>a <tool_call> b</tool_call> c</think>d") == Parts(
        "d", "a <tool_call> b</tool_call> c"
    )


def test_a_call_without_its_end_is_read_only_where_the_model_ended_there() -> None:
    cut = '<tool_call>{"name": "f", "arguments": {}}'
    assert [call.name for call in whole(cut).tool_calls] == ["f"]
    assert whole(cut, ended=False) == Parts(cut)


def test_a_marker_cut_off_at_the_end_is_text() -> None:
    made = parser()
    assert made.push("a <tool_ca") == Parts("a ")
    assert made.finish(whole=True) == Parts("<tool_ca")


def test_nothing_is_held_back_that_can_be_no_marker() -> None:
    made = parser()
    assert made.push("a <tool") == Parts("a ")
    assert made.push("s") == Parts("<tools")


@given(
    text=texts,
    cuts=st.lists(st.integers(0, 60), max_size=8),
    ended=st.booleans(),
    reasoning=st.booleans(),
)
def test_pieces_give_what_the_whole_gives(
    text: str, cuts: list[int], *, ended: bool, reasoning: bool
) -> None:
    state = REASONING if reasoning else TEXT
    made = parser(state)
    got = Parts()
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    for start, stop in pairwise(edges):
        got += made.push(text[start:stop])
    assert got + made.finish(whole=ended) == whole(text, state, ended=ended)


@given(texts)
def test_what_is_released_depends_on_the_text_so_far_alone(text: str) -> None:
    """So a resume, which replays the committed text in one piece, goes on where it was."""
    made, got = parser(), Parts()
    for position, character in enumerate(text):
        got += made.push(character)
        assert got == parser().push(text[: position + 1])


@given(texts)
def test_nothing_is_lost(text: str) -> None:
    """Characters are text, reasoning, a call's or a marker's: there are no others."""
    parts = whole(text)
    kept = len(parts.text) + len(parts.reasoning)
    calls = sum(len('{"name": "f", "arguments": {}}') for _ in parts.tool_calls)
    assert kept + calls <= len(text)
    if "<" not in text:
        assert parts == Parts(text)


@given(texts.filter(lambda text: "tool" not in text))
def test_states_change_as_in_mlx_lm(text: str) -> None:
    machine = TextStateMachine({k: list(v) for k, v in TRANSITIONS.items()})
    state, segments = TextStateMachine.split(machine.make_state(TEXT), text)
    _, rest, name = TextStateMachine.flush(state)
    expected: dict[str, str] = {TEXT: "", REASONING: ""}
    for found, piece in [*segments, (name, rest)]:
        expected[found] += piece
    parts = whole(text)
    assert (parts.text, parts.reasoning) == (expected[TEXT], expected[REASONING])


def test_states_of_no_known_name_are_neither_text_nor_reasoning() -> None:
    transitions: Any = {TEXT: (("[", "header"),), "header": (("]", TEXT),)}
    made = MarkedTextParser(transitions, TEXT, read, "")
    assert made.push("a[b]c") + made.finish(whole=True) == Parts("ac")
