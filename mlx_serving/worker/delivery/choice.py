"""One choice of a held job: its tokens and text, and how much of them Redis has been sent."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from msgspec import Struct

from mlx_serving.common.events import (
    ChoiceDelta,
    ChoiceLogprobs,
    FunctionDelta,
    TokenLogprob,
    ToolCallDelta,
)
from mlx_serving.common.results import ChoiceResult, joined_calls
from mlx_serving.worker.delivery.token_text import render
from mlx_serving.worker.engine.interface import TokenLogprobs

if TYPE_CHECKING:
    from mlx_serving.worker.delivery.token_text import Spell
    from mlx_serving.worker.engine.interface import Output, ParsedToolCall


@dataclass(frozen=True, slots=True)
class CommittedChoice:
    """What earlier attempts committed of one choice, since the last reset."""

    token_ids: tuple[int, ...] = ()
    text: str = ""
    finish_reason: str | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()


NOTHING = CommittedChoice()


@dataclass(frozen=True, slots=True)
class Committed:
    """What earlier attempts committed of a job, by choice, and whose model wrote it."""

    choices: dict[int, CommittedChoice] = field(default_factory=dict)
    model_revision: str | None = None
    tokenizer_hash: str | None = None

    def of(self, index: int) -> CommittedChoice:
        """One choice's part."""
        return self.choices.get(index, NOTHING)

    @property
    def has_tokens(self) -> bool:
        """Whether any choice has begun."""
        return any(choice.token_ids for choice in self.choices.values())

    def ends(self, count: int) -> bool:
        """Whether so many choices have all ended."""
        return all(self.of(index).finish_reason for index in range(count))


class Choice(Struct, eq=False):
    """One choice over all attempts. What lies beyond `sent` is pending."""

    index: int
    token_ids: list[int] = []  # every one decoded
    text: list[str] = []
    logprobs: list[TokenLogprob] = []  # of the tokens that were sent
    reasoning: list[str] = []
    tool_calls: list[ToolCallDelta] = []
    finish_reason: str | None = None
    sent: int = 0  # of `token_ids`
    text_sent: int = 0  # of `text`
    reasoning_sent: int = 0  # of `reasoning`
    calls_sent: int = 0  # of `tool_calls`
    finish_sent: bool = False
    unspelled: list[TokenLogprobs] = []  # of the pending tokens
    token_at: float = 0.0  # monotonic seconds of this attempt's last token so far

    def resume(self, committed: CommittedChoice) -> None:
        """Take over what earlier attempts committed."""
        self.token_ids.extend(committed.token_ids)
        self.text.append(committed.text)
        self.logprobs.extend(committed.logprobs)
        self.reasoning.append(committed.reasoning)
        self.tool_calls.extend(committed.tool_calls)
        self.finish_reason = committed.finish_reason
        self._note_sent()

    def add(self, output: Output) -> None:
        """Take a step's output."""
        self.token_ids += output.token_ids
        if output.text:
            self.text.append(output.text)
        if output.reasoning:
            self.reasoning.append(output.reasoning)
        if output.tool_calls:
            self.tool_calls += map(_delta, output.tool_calls)
        if output.logprobs:
            self.unspelled += output.logprobs
        if output.finish_reason:
            self.finish_reason = output.finish_reason

    @property
    def pending(self) -> bool:
        """Whether there is anything that Redis has not been sent."""
        untold = self.finish_reason is not None and not self.finish_sent
        return (
            len(self.token_ids) > self.sent
            or len(self.text) > self.text_sent
            or untold
            or (len(self.reasoning) > self.reasoning_sent or len(self.tool_calls) > self.calls_sent)
        )

    def delta(self, spell: Spell) -> ChoiceDelta:
        """Take what is pending."""
        delta = ChoiceDelta(
            self.index,
            "".join(self.text[self.text_sent :]),
            self.token_ids[self.sent :],
            self._spelled(spell) if self.unspelled else None,
            (self.tool_calls[self.calls_sent :] or None) if self.tool_calls else None,
            ("".join(self.reasoning[self.reasoning_sent :]) or None) if self.reasoning else None,
            self.finish_reason,
        )
        self._note_sent()
        return delta

    def _note_sent(self) -> None:
        self.sent, self.text_sent = len(self.token_ids), len(self.text)
        self.reasoning_sent, self.calls_sent = len(self.reasoning), len(self.tool_calls)
        self.finish_sent = self.finish_reason is not None

    def _spelled(self, spell: Spell) -> ChoiceLogprobs:
        content = render(self.unspelled, spell)
        self.unspelled = []
        self.logprobs += content
        return ChoiceLogprobs(content)

    def result(self) -> ChoiceResult:
        """All of it, once nothing is pending."""
        return ChoiceResult(
            index=self.index, text="".join(self.text), token_ids=self.token_ids,
            finish_reason=self.finish_reason,
            logprobs=ChoiceLogprobs(self.logprobs) if self.logprobs else None,
            tool_calls=joined_calls(self.tool_calls),
            reasoning="".join(self.reasoning) or None,
        )  # fmt: skip


def _delta(call: ParsedToolCall) -> ToolCallDelta:
    """A whole call, as an event carries it."""
    function = FunctionDelta(call.name, call.arguments)
    return ToolCallDelta(call.index, call.id, "function", function)
