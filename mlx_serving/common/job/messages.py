"""Chat messages and tools, in the words of the OpenAI chat API."""

from __future__ import annotations

import json
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, JsonValue, Tag

STRICT: Final = ConfigDict(
    strict=True,
    frozen=True,
    extra="forbid",
    allow_inf_nan=False,
    hide_input_in_errors=True,
    protected_namespaces=(),
    # Validators are compiled at the first job: most of what our own imports would cost.
    defer_build=True,
)
"""Config of every part of a job: nothing is converted, ignored or changed later.

`hide_input_in_errors` is set because an error's text may be logged and a prompt may not.
"""

Role = Literal["system", "developer", "user", "assistant", "tool"]
FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
ToolCallId = Annotated[str, Field(min_length=1, max_length=128)]

TAG_TEXT: Final = "<text>"
TAG_PARTS: Final = "<parts>"


class TextPart(BaseModel):
    """One text part of a message's content."""

    model_config = STRICT

    type: Literal["text"]
    text: str


class FunctionCall(BaseModel):
    """Which function the model called, with its arguments as a JSON string."""

    model_config = STRICT

    name: FunctionName
    arguments: str = "{}"


class ToolCall(BaseModel):
    """A tool call that an earlier assistant turn made."""

    model_config = STRICT

    id: ToolCallId | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Function(BaseModel):
    """A function that the model may call; `parameters` is a JSON schema."""

    model_config = STRICT

    name: FunctionName
    description: str | None = None
    parameters: dict[str, JsonValue] | None = None
    strict: bool | None = None


class Tool(BaseModel):
    """A tool that the model may call; functions are the only type."""

    model_config = STRICT

    type: Literal["function"]
    function: Function


def _content_tag(value: object) -> str:
    """Check a list by the rules of parts and anything else as text, so an error names one path."""
    return TAG_PARTS if isinstance(value, (list, tuple)) else TAG_TEXT


Content = Annotated[
    Annotated[str, Tag(TAG_TEXT)]
    | Annotated[tuple[TextPart, ...], Field(strict=False, min_length=1), Tag(TAG_PARTS)],
    Discriminator(_content_tag),
]


class Message(BaseModel):
    """One turn: text as a string or as text parts."""

    model_config = STRICT

    role: Role
    content: Content | None = None
    tool_calls: Annotated[tuple[ToolCall, ...], Field(strict=False, min_length=1)] | None = None
    tool_call_id: ToolCallId | None = None

    @property
    def text(self) -> str:
        """The content as one string; parts are joined as they are."""
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "".join(part.text for part in self.content)

    def for_template(self) -> dict[str, Any]:
        """The dict that chat templates expect: text joined, call arguments as objects."""
        message: dict[str, Any] = {"role": self.role, "content": self.text}
        if self.tool_calls:
            message["tool_calls"] = [_call_for_template(call) for call in self.tool_calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message


def _call_for_template(call: ToolCall) -> dict[str, Any]:
    """Parse the arguments: templates print them as JSON, so a string would be quoted twice."""
    function = {"name": call.function.name, "arguments": json.loads(call.function.arguments)}
    form: dict[str, Any] = {"type": call.type, "function": function}
    return form if call.id is None else {"id": call.id, **form}


def message_problem(message: Message) -> tuple[str, str] | None:
    """Name the field of a message that doesn't go with its role, and why."""
    if message.tool_calls is not None and message.role != "assistant":
        return "tool_calls", "only an assistant message has tool calls"
    if message.tool_call_id is not None and message.role != "tool":
        return "tool_call_id", "only a tool message answers a tool call"
    if message.content is None and message.tool_calls is None:
        return "content", "is required unless the message has tool calls"
    return _arguments_problem(message.tool_calls or ())


def _arguments_problem(calls: tuple[ToolCall, ...]) -> tuple[str, str] | None:
    for index, call in enumerate(calls):
        path = f"tool_calls[{index}].function.arguments"
        try:
            arguments = json.loads(call.function.arguments)
        except (ValueError, RecursionError):
            return path, "is not JSON"
        if not isinstance(arguments, dict):
            return path, "is not a JSON object"
    return None
