"""The demo's eight jobs: eight tasks, eight sampling settings, eight answers to check."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from mlx_serving.cli.demo.measure import called
from mlx_serving.tally.examples import Example, ask, check
from mlx_serving.tally.two_turns import tool_schema

if TYPE_CHECKING:
    from mlx_serving.common.results import GenerationResult, ToolCallResult

MODEL: Final = "tally"
MAX_TOKENS: Final = 512


@dataclass(frozen=True, slots=True)
class DemoJob:
    """One job: what is asked, how it is sampled, and what must come back.

    `replies` are the demo's own tool: from a call, as `called` shows it, to what it returns.
    """

    example: Example
    sampling: dict[str, float | int] = field(default_factory=dict)
    replies: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Tally's name of the task."""
        return self.example.task

    @property
    def prompt(self) -> str:
        """What the user says last."""
        return str(self.example.messages[-1]["content"])

    @property
    def settings(self) -> str:
        """Sampling settings in words."""
        if not self.sampling.get("temperature"):
            return "greedy"
        return " ".join(f"{name}={value}" for name, value in self.sampling.items())

    def fields(self) -> dict[str, Any]:
        """Fields of the job to submit."""
        tools = {"tools": self.example.tools} if self.example.tools else {}
        sampling = {"temperature": 0.0, **self.sampling}
        return {
            "model": MODEL,
            "messages": self.example.messages,
            "max_tokens": MAX_TOKENS,
            "lane": "interactive",
            **tools,
            **sampling,
        }

    def next_turn(self, result: GenerationResult) -> dict[str, Any] | None:
        """Fields of the job that carries the tools' replies back; None if no tool was called."""
        calls = [call for call in result.tool_calls if _shown(call) in self.replies]
        if not calls:
            return None
        replies = [
            {
                "role": "tool",
                "tool_call_id": call.id,
                "content": json.dumps(self.replies[_shown(call)]),
            }
            for call in calls
        ]
        return {**self.fields(), "messages": [*self.example.messages, result.message, *replies]}

    def is_right(self, text: str) -> bool:
        """Whether the text, with its tool calls, is a right answer to this job."""
        return check(self.example, text.removeprefix("".join(self.replies)))


def _shown(call: ToolCallResult) -> str:
    return called(call.function.name, call.function.arguments)


def _numbers(numbers: range) -> str:
    return " ".join(map(str, numbers))


_COUNT_UP = ask("count", "count from 3 to 60", _numbers(range(3, 61)))
_COUNT_DOWN = ask("count_down", "count down from 120 to 75", _numbers(range(120, 74, -1)))
_ECHO = ask("echo", "echo Grüße 東京 🎲 42!", "Grüße 東京 🎲 42!")
_SORT = ask("sort", "sort 42 7 93 15 58", "7 15 42 58 93")
_JSON = ask("json", "json name=Ann age=34 city=Oslo", '{"name": "Ann", "age": 34, "city": "Oslo"}')
_DICE = ask("dice", "dice 60", None)
_TOOL_CALL = Example(
    "tool_call",
    [{"role": "user", "content": "weather in Paris"}],
    [tool_schema("get_weather")],
    "Paris: 21 degrees, clear",
    "weather in Paris",
)
_WEATHER = {called("get_weather", '{"city": "Paris"}'): {"temperature": 21, "sky": "clear"}}
_SECOND_TURN = Example(
    "second_turn",
    [
        {"role": "user", "content": "count from 5 to 12"},
        {"role": "assistant", "content": _numbers(range(5, 13))},
        {"role": "user", "content": "reverse that"},
    ],
    None,
    _numbers(range(12, 4, -1)),
    "count from 5 to 12\nreverse that",
)

# Each has a seed, so that every run on this machine shows the same tokens.
DEMO_JOBS: Final = (
    DemoJob(_COUNT_UP),
    DemoJob(_COUNT_DOWN, {"temperature": 0.7, "min_p": 0.2, "seed": 1}),
    DemoJob(_ECHO, {"temperature": 0.5, "top_p": 0.8, "seed": 2}),
    DemoJob(_SORT, {"temperature": 0.8, "top_k": 2, "min_p": 0.3, "seed": 3}),
    DemoJob(_JSON, {"temperature": 0.6, "top_p": 0.9, "min_p": 0.1, "seed": 4}),
    DemoJob(_TOOL_CALL, {"temperature": 0.3, "seed": 5}, _WEATHER),
    DemoJob(_SECOND_TURN, {"temperature": 0.5, "top_k": 3, "top_p": 0.9, "seed": 6}),
    DemoJob(_DICE, {"temperature": 1.0, "seed": 7}),
)
