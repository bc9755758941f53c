"""Text to typed parts, streamed: what is text, what is reasoning, what is a tool call.

A model marks its reasoning and its calls by markers in its text, such as `<think>`. The parser
walks through states between them, as mlx-lm's server does. The end of the text that could still
become a marker is held back, and no more, so no part of a marker leaks; of two markers the one
that is complete first counts. So what is released depends on the text so far and not on the
pieces in which it came.

A call is released whole, when its end marker is there: only then mlx-lm's parser can say whether
it is one. What it can't read becomes text again, markers included.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from mlx_serving.worker.engine.row import (
    FINISH_STOP,
    FINISH_TOOL_CALLS,
    INVALID_TOKEN,
    Output,
    Parts,
    Row,
    RowError,
    ToolCall,
)

TEXT: Final = "normal"
REASONING: Final = "reasoning"
CALL: Final = "tool"

Transitions = Mapping[str, tuple[tuple[str, str], ...]]
"""State → its markers, each with the state that it leads to. States are named as in mlx-lm."""


@dataclass(frozen=True, slots=True)
class ReadCall:
    """A call as a model's parser read it; `id` None where the model gave none."""

    name: str
    arguments: str
    id: str | None = None


ReadCalls = Callable[[str], list[ReadCall] | None]
"""From a call's text, without its markers, to the calls in it; None where it holds none."""


class MarkedTextParser:
    """One row's parser; answers to `sequence.OutputParser`."""

    def __init__(
        self, transitions: Transitions, state: str, read_calls: ReadCalls, seed: str
    ) -> None:
        """Start in a state; ids of calls are drawn from `seed`, so that a resume draws the same."""
        self._transitions, self._state = transitions, state
        self._read_calls, self._seed = read_calls, seed
        self._held = ""  # the end of the text that may become a marker
        self._opening = ""  # the marker that opened the call under way, and
        self._before = TEXT  # the state that it was found in
        self._body: list[str] = []  # of that call
        self._calls = 0

    @property
    def called(self) -> bool:
        """Whether a tool call was read."""
        return self._calls > 0

    def push(self, text: str) -> Parts:
        """Take the row's next text; what may still become a marker waits."""
        parts = Parts()
        rest = self._held + text
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
        self._held = rest[len(rest) - keep :]
        return parts

    def finish(self, *, whole: bool) -> Parts:
        """Release what waits.

        A call without its end marker is read only where the model ended the text itself: one that
        was cut off may look whole and lack arguments.
        """
        parts = Parts()
        self._release(self._held, parts)
        self._held = ""
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
        """Put text of the present state where it belongs; states of no known name have none."""
        if self._state == TEXT:
            parts.text += text
        elif self._state == REASONING:
            parts.reasoning += text
        elif self._state == CALL:
            self._body.append(text)

    def _close_call(self, closing: str, parts: Parts, *, readable: bool = True) -> bool:
        """Read the call under way, or give its text back to the state that it was found in."""
        body = "".join(self._body)
        self._body.clear()
        calls = self._read_calls(body) if readable else None
        if calls is None:
            self._state = self._before
            self._release(f"{self._opening}{body}{closing}", parts)
            return False
        for call in calls:
            identity = call.id or self._new_id()
            parts.tool_calls.append(ToolCall(self._calls, identity, call.name, call.arguments))
            self._calls += 1
        return True

    def _new_id(self) -> str:
        digest = hashlib.sha256(f"{self._seed}\0{self._calls}".encode()).hexdigest()
        return f"call_{digest[:24]}"


def _first(text: str, markers: tuple[tuple[str, str], ...]) -> tuple[int, str, str] | None:
    """The marker that is complete first, the longer of two that end together: where, and its."""
    found = [
        (at + len(marker), at, marker, target)
        for marker, target in markers
        if (at := text.find(marker)) >= 0
    ]
    return min(found)[1:] if found else None


def _overlap(text: str, marker: str) -> int:
    """The length of the longest end of `text` that `marker` begins with."""
    longest = min(len(text), len(marker) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(marker[:n])), 0)


NAN_LOGITS: Final = RowError("nan_logits", "the model's logits for this row were not finite")


def row_error(row: Row, token: int) -> RowError | None:
    """Why the row can't go on with this token; None where it can."""
    failure = row.matcher.failure if row.matcher is not None else None
    if failure is not None:
        return RowError("grammar_failed", f"the grammar can't be followed further: {failure}")
    return NAN_LOGITS if token == INVALID_TOKEN else None


def grammar_ended(row: Row) -> bool:
    """Whether the row's grammar is satisfied, so that nothing more can follow."""
    return row.matcher is not None and row.matcher.ended


def parse_output(row: Row, output: Output, *, ended_itself: bool) -> None:
    """Split the output's text into its parts, in place; a row that called tools ends by that.

    `ended_itself`: the model or the grammar ended the text, no stop string or limit.
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
