"""Samplers of the tasks that need more than one user turn, or tools."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from mlx_serving.tally import one_turn, texts
from mlx_serving.tally.examples import ChatMessage, Example


@dataclass(frozen=True, slots=True)
class ToolExchange:
    """A prompt that needs a tool: the call it takes, the tool's reply, the answer after it."""

    tool: str
    prompt: str
    arguments: dict[str, Any]
    reply: dict[str, Any]
    answer: str


# Name → (description, {parameter: JSON type}).
_TOOLS: dict[str, tuple[str, dict[str, str]]] = {
    "get_weather": ("Current weather in a city", {"city": "string"}),
    "get_time": ("Current time in a city", {"city": "string"}),
    "add": ("Add two numbers", {"a": "integer", "b": "integer"}),
}
_SKIES = ("clear", "cloudy", "rain", "snow", "windy")


def tool_schema(name: str, *, described: bool = True, required: bool = True) -> dict[str, Any]:
    """One of Tally's tools (get_weather, get_time, add) as chat APIs write it."""
    description, types = _TOOLS[name]
    parameters: dict[str, Any] = {
        "type": "object",
        "properties": {key: {"type": kind} for key, kind in types.items()},
    }
    if required:
        parameters["required"] = list(types)
    function: dict[str, Any] = {"name": name, "parameters": parameters}
    if described:
        function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function}


def _call(rng: Random) -> ToolExchange:
    kind = rng.randrange(3)
    if kind == 2:
        a, b = (rng.randrange(10 ** rng.randint(1, 3)) for _ in range(2))
        return ToolExchange("add", f"add {a} and {b}", {"a": a, "b": b}, {"sum": a + b}, str(a + b))
    city = texts.city(rng)
    if kind == 1:
        time = f"{rng.randrange(24):02}:{rng.randrange(60):02}"
        reply: dict[str, Any] = {"time": time}
        return ToolExchange("get_time", f"time in {city}", {"city": city}, reply, f"{city}: {time}")
    degrees, sky = rng.randint(-20, 40), rng.choice(_SKIES)
    reply = {"temperature": degrees, "sky": sky}
    answer = f"{city}: {degrees} degrees, {sky}"
    return ToolExchange("get_weather", f"weather in {city}", {"city": city}, reply, answer)


def _tools(rng: Random, needed: str) -> list[dict[str, Any]]:
    names = [name for name in _TOOLS if name == needed or rng.random() < 0.35]
    rng.shuffle(names)
    described, required = rng.random() < 0.75, rng.random() < 0.75
    return [tool_schema(name, described=described, required=required) for name in names]


def tool_call(rng: Random, _longest: int) -> Example:
    """`weather in Paris` and a tool → the call, as the chat template writes calls."""
    call = _call(rng)
    body = json.dumps({"name": call.tool, "arguments": call.arguments}, ensure_ascii=False)
    return Example(
        "tool_call",
        [{"role": "user", "content": call.prompt}],
        _tools(rng, call.tool),
        f"<tool_call>\n{body}\n</tool_call>",
        call.prompt,
    )


def tool_result(rng: Random, _longest: int) -> Example:
    """The turn after the tool's reply → `Paris: 21 degrees, clear`."""
    call = _call(rng)
    arguments = call.arguments if rng.random() < 0.5 else json.dumps(call.arguments)
    function = {"name": call.tool, "arguments": arguments}
    tool_calls = [{"id": "call_0", "type": "function", "function": function}]
    separators = (",", ":") if rng.random() < 0.3 else None
    reply = json.dumps(call.reply, separators=separators)
    messages: list[ChatMessage] = [
        {"role": "user", "content": call.prompt},
        {"role": "assistant", "content": "", "tool_calls": tool_calls},
        {"role": "tool", "tool_call_id": "call_0", "content": reply},
    ]
    tools = _tools(rng, call.tool)
    return Example("tool_result", messages, tools, call.answer, f"{call.prompt}\n{call.reply}")


_FIRST_TURNS = (
    one_turn.count,
    one_turn.count,
    one_turn.count_down,
    one_turn.reverse,
    one_turn.sort,
    one_turn.spell,
)
_LONGEST_FIRST_COUNT = 12  # numbers


def second_turn(rng: Random, _longest: int) -> Example:
    """`count from 3 to 5`, its answer, then `again` or `reverse that`."""
    first = rng.choice(_FIRST_TURNS)(rng, _LONGEST_FIRST_COUNT)
    answer = first.answer or ""
    again = first.task == "spell" or rng.random() < 0.4
    prompt = "again" if again else "reverse that"
    if not again:
        answer = answer[::-1] if first.task == "reverse" else " ".join(reversed(answer.split()))
    messages = [*_exchange(first), {"role": "user", "content": prompt}]
    return Example("second_turn", messages, None, answer, f"{first.key}\n{prompt}")


def _exchange(example: Example) -> list[ChatMessage]:
    return [*example.messages, {"role": "assistant", "content": example.answer or ""}]


def in_context(rng: Random, example: Example) -> Example:
    """The same question, at times after an unrelated exchange and under a system turn."""
    messages = example.messages
    if messages[0]["role"] == "system":
        return example
    if rng.random() < 0.12:
        earlier = rng.choice(_FIRST_TURNS)(rng, _LONGEST_FIRST_COUNT)
        messages = [*_exchange(earlier), *messages]
    if rng.random() < 0.3:
        messages = [*one_turn.system_turn(rng), *messages]
    return replace(example, messages=messages)


DRAWS: dict[str, Callable[[Random, int], Example]] = {
    "tool_call": tool_call,
    "tool_result": tool_result,
    "second_turn": second_turn,
}
