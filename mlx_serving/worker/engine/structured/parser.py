"""Splits a row's text, as it streams, into text, reasoning and tool calls.

A model marks its reasoning and its calls by markers in its text, such as `<think>`. The parser has
a state between them, as mlx-lm's server does. An end of the text that may still become a marker is
kept back, and nothing else, so no part of a marker leaks. Of two markers the one that is complete
first counts. So the result depends on the text and not on the pieces in which it came.

A call is released whole, when its end marker is there: only then mlx-lm's parser can tell whether
it is a call. A call that it can't read becomes text again, markers included.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final

from mlx_serving.worker.engine.interface import (
    FINISH_STOP,
    FINISH_TOOL_CALLS,
    INVALID_TOKEN,
    Output,
    ParsedToolCall,
    Parts,
    RowError,
)
from mlx_serving.worker.engine.row import Row

TEXT: Final = "normal"
REASONING: Final = "reasoning"
CALL: Final = "tool"

Transitions = Mapping[str, tuple[tuple[str, str], ...]]
"""State → its markers, each with the state that it leads to. States are named as in mlx-lm."""


ReadCalls = Callable[[str], list[ParsedToolCall] | None]
"""From a call's text, without its markers, to the calls in it; None: it holds none."""


class MarkedTextParser:
    """One row's parser; implements `interface.OutputParser`."""

    def __init__(
        self, transitions: Transitions, state: str, read_calls: ReadCalls, seed: str
    ) -> None:
        """Start in a state; ids of calls are derived from `seed`: the same after a resume."""
        self._transitions, self._state = transitions, state
        self._read_calls, self._seed = read_calls, seed
        self._unsure = ""  # the end of the text that may become a marker
        self._opening = ""  # the marker that opened the present call
        self._before = TEXT  # the state before that marker
        self._body: list[str] = []  # text of the present call
        self._calls = 0

    @property
    def called(self) -> bool:
        """Whether a tool call was read."""
        return self._calls > 0

    def push(self, text: str) -> Parts:
        """Take the row's next text; an end that may still become a marker is kept back."""
        parts = Parts()
        rest = self._unsure + text
        while True:
            markers = self._transitions.get(self._state, ())
            found = _first(rest, markers)
            if found is None:
                break
            at, marker, target = found
            self._release(rest[:at], parts)
            rest = rest[at + len(marker) :]
            self._enter(marker, target, parts)
        keep = max((_overlap(rest, marker) for marker, _ in markers), default=0)
        self._release(rest[: len(rest) - keep], parts)
        self._unsure = rest[len(rest) - keep :]
        return parts

    def finish(self, *, whole: bool) -> Parts:
        """Release what was kept back.

        A call without its end marker is read only if the model ended the text itself: a call that
        was cut off may look whole and lack arguments.
        """
        parts = Parts()
        self._release(self._unsure, parts)
        self._unsure = ""
        if self._state == CALL:
            self._close_call("", parts, readable=whole)
            self._state = TEXT
        return parts

    def _enter(self, marker: str, target: str, parts: Parts) -> None:
        if self._state == CALL:
            if not self._close_call(marker, parts):
                target = self._before
        elif target == CALL:
            self._opening, self._before = marker, self._state
        self._state = target

    def _release(self, text: str, parts: Parts) -> None:
        """Add text to the part of the present state; text in unknown states is dropped."""
        if self._state == TEXT:
            parts.text += text
        elif self._state == REASONING:
            parts.reasoning += text
        elif self._state == CALL:
            self._body.append(text)

    def _close_call(self, closing: str, parts: Parts, *, readable: bool = True) -> bool:
        """Read the present call, or give its text back to the state before it."""
        body = "".join(self._body)
        self._body.clear()
        calls = self._read_calls(body) if readable else None
        if calls is None:
            self._state = self._before
            self._release(f"{self._opening}{body}{closing}", parts)
            return False
        for call in calls:
            parts.tool_calls.append(replace(call, index=self._calls, id=call.id or self._new_id()))
            self._calls += 1
        return True

    def _new_id(self) -> str:
        digest = hashlib.sha256(f"{self._seed}\0{self._calls}".encode()).hexdigest()
        return f"call_{digest[:24]}"


def _first(text: str, markers: tuple[tuple[str, str], ...]) -> tuple[int, str, str] | None:
    """Return position, text and target of the first complete marker; the longer of two at once."""
    found = [
        (at + len(marker), at, marker, target)
        for marker, target in markers
        if (at := text.find(marker)) >= 0
    ]
    return min(found)[1:] if found else None


def _overlap(text: str, marker: str) -> int:
    """Return the length of the longest end of `text` that `marker` begins with."""
    longest = min(len(text), len(marker) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(marker[:n])), 0)


NAN_LOGITS: Final = RowError("nan_logits", "the model's logits for this row were not finite")


def row_error(row: Row, token: int) -> RowError | None:
    """Return why the row can't continue with this token; None if it can."""
    failure = row.matcher.failure if row.matcher is not None else None
    if failure is not None:
        return RowError("grammar_failed", f"the grammar can't be followed further: {failure}")
    return NAN_LOGITS if token == INVALID_TOKEN else None


def grammar_ended(row: Row) -> bool:
    """Whether the row's grammar is satisfied, so that nothing more can follow."""
    return row.matcher is not None and row.matcher.ended


def parse_output(row: Row, output: Output, *, ended_itself: bool) -> None:
    """Split the output's text into its parts, in place; set the finish reason of tool calls.

    `ended_itself`: the model or the grammar ended the text, not a stop string or a limit.
    """
    if row.parser is None:
        return
    parts = row.parser.push(output.text)
    if output.finish_reason is not None:
        parts += row.parser.finish(whole=ended_itself)
    output.text, output.reasoning = parts.text, parts.reasoning
    output.tool_calls = parts.tool_calls
    if output.finish_reason == FINISH_STOP and row.parser.called:
        output.finish_reason = FINISH_TOOL_CALLS
