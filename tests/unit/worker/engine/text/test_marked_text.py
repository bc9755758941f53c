"""Reasoning and calls through the engine, over a runner that plays back a script."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlx_serving.worker.engine.acceleration import make_detokenizer
from mlx_serving.worker.engine.engine import Engine
from mlx_serving.worker.engine.interface import ModelInfo, Parts, Request, SamplingParams
from mlx_serving.worker.engine.row import SampledToken
from mlx_serving.worker.engine.scheduling.limits import BatchSize, SchedulerLimits
from mlx_serving.worker.engine.scheduling.scheduler import Scheduler
from mlx_serving.worker.engine.structured.tool_formats import ModelFormat, RequestFormat
from mlx_serving.worker.engine.text.marked_detokenizer import MarkedDetokenizer, with_markers

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable

TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f", "parameters": {}}}
MARKERS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<|other|>", "<|end|>")


@cache
def wrapper(*, special: bool) -> TokenizerWrapper:
    """Bytes and markers; the markers are special tokens or not."""
    from mlx_lm.tool_parsers import json_tools

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(alphabet)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_tokens([AddedToken(m, special=special or m == "<|end|>") for m in MARKERS])
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token=MARKERS[-1])
    return TokenizerWrapper(
        fast, tool_call_start="<tool_call>", tool_call_end="</tool_call>",
        tool_parser=json_tools.parse_tool_call,
    )  # fmt: skip


class Script:
    """A runner: every row gets the tokens of one script, one a step."""

    def __init__(self, tokens: list[int]) -> None:
        self._tokens, self._rows = tokens, dict[Any, None]()
        self.on_launch: Callable[[], None] = lambda: None

    def prefill(self, chunk: Any) -> None:
        """Nothing to compute."""

    def drop_prefill(self, lane: str) -> None:
        """Nothing to forget."""

    def join(self, chunk: Any) -> None:
        self._rows |= dict.fromkeys(chunk.rows)

    def remove(self, rows: Iterable[Any]) -> None:
        for row in rows:
            self._rows.pop(row, None)

    def reset(self) -> None:
        """Nothing to forget."""

    def park(self, rows: Iterable[Any], keep: Container[Any]) -> list[SampledToken]:
        del keep
        self.remove(rows)
        return []

    def resume(self, row: Any) -> None:
        self._rows[row] = None

    def decode(self) -> list[SampledToken]:
        return [SampledToken(row, self._tokens[row.decoded]) for row in self._rows]


def engine(tokenizer: TokenizerWrapper, tokens: list[int]) -> Engine:
    plain, _ = make_detokenizer(tokenizer, prefer_native=True)
    detokenizer = with_markers(plain, tokenizer, prefer_native=True)
    eos = frozenset(tokenizer.eos_token_ids)
    info = ModelInfo("script", "", "", len(tokenizer), eos)
    return Engine(
        Script(tokens), Scheduler(SchedulerLimits(BatchSize(8), 10_000, 512)), detokenizer, info
    )


def play(
    text: str, *, special: bool, parsed: bool, tools: bool = True, committed: int = 0,
    stop: tuple[str, ...] = (), max_tokens: int = 1000,
) -> tuple[Parts, str | None]:  # fmt: skip
    """What a row makes of this text, in one call, and why it ended."""
    tokenizer = wrapper(special=special)
    tokens = tokenizer.encode(f"{text}<|end|>", add_special_tokens=False)
    form = RequestFormat(ModelFormat.of(tokenizer), "normal", (TOOL,) if tools else ())
    made = engine(tokenizer, tokens)
    made.add(
        Request("job:1", (1,), SamplingParams(), max_tokens, stop, tuple(tokens[:committed]),
                format=form if parsed else None)
    )  # fmt: skip
    parts, reason = Parts(), None
    while made.has_work:
        for output in made.step():
            parts += Parts(output.text, output.reasoning, output.tool_calls)
            reason = output.finish_reason
    return parts, reason


CALL = '<tool_call>\n{"name": "f", "arguments": {"é": "🙂"}}\n</tool_call>'
TEXT = f"<think>hm 🙂 é</think>Well: {CALL} done"


@pytest.mark.parametrize("special", [False, True])
def test_reasoning_and_calls_are_told_from_text(*, special: bool) -> None:
    parts, reason = play(TEXT, special=special, parsed=True)
    assert (parts.text, parts.reasoning, reason) == ("Well:  done", "hm 🙂 é", "tool_calls")
    assert [call.arguments for call in parts.tool_calls] == ['{"é": "🙂"}']


def test_a_row_that_is_not_parsed_shows_ordinary_markers_and_hides_special_ones() -> None:
    assert play(TEXT, special=False, parsed=False)[0] == Parts(TEXT)
    hidden, reason = play(TEXT, special=True, parsed=False)
    assert hidden == Parts('hm 🙂 éWell: \n{"name": "f", "arguments": {"é": "🙂"}}\n done')
    assert reason == "stop"


def test_special_tokens_that_are_no_markers_show_in_parsed_text_alone() -> None:
    assert play("a<|other|>b", special=True, parsed=True)[0].text == "a<|other|>b"
    assert play("a<|other|>b", special=True, parsed=False)[0].text == "ab"


@pytest.mark.parametrize("special", [False, True])
def test_a_resume_at_any_token_tells_what_is_left(*, special: bool) -> None:
    tokenizer = wrapper(special=special)
    count = len(tokenizer.encode(TEXT, add_special_tokens=False))
    whole, _ = play(TEXT, special=special, parsed=True)
    told = Parts()
    for committed in range(1, count):
        rest, reason = play(TEXT, special=special, parsed=True, committed=committed)
        assert reason == "tool_calls"
        assert whole.text.endswith(rest.text)
        assert whole.reasoning.endswith(rest.reasoning)
        assert rest.tool_calls in ([], whole.tool_calls)
        assert len(rest.text) + len(rest.reasoning) <= len(whole.text) + len(whole.reasoning)
        told = rest
    assert told.tool_calls == []


def test_a_limit_within_a_call_makes_it_text() -> None:
    parts, reason = play(f"a{CALL}", special=False, parsed=True, max_tokens=9)
    assert parts == Parts('a<tool_call>\n{"name')
    assert reason == "length"


def test_a_stop_string_within_a_call_makes_it_text() -> None:
    parts, reason = play(f"a{CALL}", special=False, parsed=True, stop=("arguments",))
    assert parts == Parts('a<tool_call>\n{"name": "f", "')
    assert reason == "stop"


def test_without_tools_reasoning_is_still_apart() -> None:
    parts, reason = play(TEXT, special=False, parsed=True, tools=False)
    assert (parts.text, parts.reasoning) == (f"Well: {CALL} done", "hm 🙂 é")
    assert (parts.tool_calls, reason) == ([], "stop")


def test_two_detokenizers_are_there_only_where_markers_are_special() -> None:
    for special in (False, True):
        tokenizer = wrapper(special=special)
        plain, _ = make_detokenizer(tokenizer, prefer_native=False)
        made = with_markers(plain, tokenizer, prefer_native=False)
        assert isinstance(made, MarkedDetokenizer) is special
