"""How a model marks reasoning and tool calls, from mlx-lm; reads calls by mlx-lm's parsers."""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from mlx_serving.worker.engine.interface import ParsedToolCall
from mlx_serving.worker.engine.structured.parser import (
    CALL,
    REASONING,
    TEXT,
    MarkedTextParser,
    Transitions,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

_ID_CHARS: Final = 128  # longest id that a model may give a call: a longer one is no valid message


@dataclass(frozen=True, slots=True)
class ModelFormat:
    """A model's markers. `parse` is mlx-lm's parser of one call; None: no tool calling.

    `transitions` are those of mlx-lm's server for a request with tools. `initial` is the state
    that the model's template leaves it in; None: it depends on the prompt.
    """

    think_start: str | None
    think_end: str | None
    tool_start: str | None
    tool_end: str | None
    parser_name: str | None
    parse: Any
    transitions: Transitions
    initial: str | None

    @classmethod
    def of(cls, tokenizer: Any) -> "ModelFormat":  # noqa: ANN401 - mlx-lm's wrapper forwards by getattr
        """Read it from mlx-lm's TokenizerWrapper."""
        return cls(
            think_start=tokenizer.think_start,
            think_end=tokenizer.think_end,
            tool_start=tokenizer.tool_call_start,
            tool_end=tokenizer.tool_call_end,
            parser_name=tokenizer.init_kwargs.get("tool_parser_type"),
            parse=tokenizer.tool_parser,
            transitions=_transitions(tokenizer),
            initial=tokenizer.response_initial_state,
        )

    @property
    def markers(self) -> list[str]:
        """All markers."""
        return sorted({marker for edges in self.transitions.values() for marker, _ in edges})

    def without_calls(self) -> Transitions:
        """Return the transitions of a request without tools: a call's marker is plain text."""
        return {
            state: tuple(edge for edge in edges if edge[1] != CALL)
            for state, edges in self.transitions.items()
            if state != CALL
        }


def _transitions(tokenizer: Any) -> Transitions:  # noqa: ANN401 - see above
    """Return the markers of each state and the states that they lead to, as in mlx-lm's server."""
    edges: dict[str, list[tuple[str, str]]] = {TEXT: []}
    if tokenizer.has_thinking:
        edges[TEXT].append((tokenizer.think_start, REASONING))
        edges[REASONING] = [(tokenizer.think_end, TEXT)]
    response: Mapping[str, list[tuple[str, str]]] = tokenizer.response_transitions
    if tokenizer.has_tool_calling:
        targets = {target for found in response.values() for _, target in found}
        # If the response format has transitions to calls, they say where calls begin.
        sources = [TEXT] if CALL not in targets else []
        for source in [*sources, *([REASONING] if tokenizer.has_thinking else [])]:
            edges[source].append((tokenizer.tool_call_start, CALL))
        edges[CALL] = [(tokenizer.tool_call_end, TEXT)] if tokenizer.tool_call_end else []
    edges[TEXT] += [(marker, TEXT) for marker in tokenizer.structural_markers]
    for state, found in response.items():
        edges.setdefault(state, []).extend(found)
    return {state: tuple(found) for state, found in edges.items()}


@dataclass(frozen=True, slots=True)
class RequestFormat:
    """How one request's text is to be read; implements `interface.OutputFormat`.

    `tools` as the chat template got them; if there are none, no calls are read.
    """

    model: ModelFormat
    state: str
    tools: tuple[dict[str, Any], ...]

    def open(self, request_id: str, choice: int) -> MarkedTextParser:
        """Return a parser for a new row."""
        transitions = self.model.transitions if self.tools else self.model.without_calls()
        job_id = request_id.partition(":")[0]  # the same in every attempt
        return MarkedTextParser(transitions, self.state, self.read_calls, f"{job_id}\0{choice}")

    def read_calls(self, text: str) -> list[ParsedToolCall] | None:
        """Read the calls in a call's text; None if it is malformed or names an unknown tool.

        The parser is foreign code, and its text may be anything: any error counts as malformed.
        """
        try:
            found = self.model.parse(text, list(self.tools))
            calls = [_checked(call) for call in (found if isinstance(found, list) else [found])]
        except Exception:  # noqa: BLE001 - see above
            return None
        names = [tool["function"]["name"] for tool in self.tools]
        return calls if calls and all(call.name in names for call in calls) else None


def _checked(call: Any) -> ParsedToolCall:  # noqa: ANN401 - what a parser returns
    """Return the call with its arguments as JSON text. A malformed one raises some error."""
    arguments = call.get("arguments", {})
    if isinstance(arguments, str):  # some models write them as a JSON text
        arguments = json.loads(arguments)
    if not isinstance(arguments, dict):
        raise TypeError
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    text.encode()  # an event can't hold a lone surrogate
    identity = call.get("id")
    usable = isinstance(identity, str) and identity.isprintable() and 0 < len(identity) <= _ID_CHARS
    return ParsedToolCall(0, identity if usable else "", call["name"], text)
