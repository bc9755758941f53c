"""Detokenizing for models whose markers are special tokens, which plain text leaves out.

Qwen's `<think>` and `<tool_call>` are ordinary added tokens and are a part of the text. Gemma's,
Kimi's and Mistral's markers are special tokens: the text of a row that is parsed must have them,
that of any other row must not. So such a model has two detokenizers, and each slot is of one.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mlx_serving.worker.engine.acceleration import choose_detokenizer
from mlx_serving.worker.engine.structured.tool_formats import ModelFormat
from mlx_serving.worker.engine.text.detokenizer import DetokenizerProtocol
from mlx_serving.worker.engine.text.vocabulary import read_vocabulary


class MarkedDetokenizer:
    """Two detokenizers as one; implements `DetokenizerProtocol`.

    Slots with even numbers are of the plain one; those with odd numbers have markers in their text.
    """

    def __init__(self, plain: DetokenizerProtocol, marked: DetokenizerProtocol) -> None:
        """Take the one that leaves special tokens out, and the one that writes markers."""
        self._both = (plain, marked)

    def open(self, stops: Sequence[str] = ()) -> int:
        """Open a slot whose text has no special tokens."""
        return 2 * self._both[0].open(stops)

    def open_marked(self, stops: Sequence[str] = ()) -> int:
        """Open a slot whose text has markers that are special tokens."""
        return 2 * self._both[1].open(stops) + 1

    def push(self, slots: list[int], tokens: list[int]) -> list[tuple[str, bool]]:
        """Feed one token to each of some slots, as `Detokenizer.push`."""
        pushed: dict[int, tuple[str, bool]] = {}
        for kind, detokenizer in enumerate(self._both):
            own = [(s, t) for s, t in zip(slots, tokens, strict=True) if s % 2 == kind]
            if own:
                found = detokenizer.push([slot // 2 for slot, _ in own], [t for _, t in own])
                pushed |= zip([slot for slot, _ in own], found, strict=True)
        return [pushed[slot] for slot in slots]

    def replay(self, slot: int, tokens: list[int]) -> tuple[str, bool]:
        """Feed many tokens to one slot, as `Detokenizer.replay`."""
        return self._both[slot % 2].replay(slot // 2, tokens)

    def finish(self, slot: int) -> str:
        """Release what a slot has kept back, as `Detokenizer.finish`."""
        return self._both[slot % 2].finish(slot // 2)

    def close(self, slot: int) -> None:
        """Free a slot, as `Detokenizer.close`."""
        self._both[slot % 2].close(slot // 2)


def with_markers(
    plain: DetokenizerProtocol,
    tokenizer: Any,  # noqa: ANN401 - mlx-lm's wrapper forwards by getattr
    *,
    prefer_native: bool,
) -> DetokenizerProtocol:
    """Return a detokenizer that can also write markers, if the model has any that are special.

    It then writes every special token except those that begin, end or pad a text: a call of such
    a model has many of them.
    """
    if not hasattr(tokenizer, "tool_call_start"):  # not mlx-lm's wrapper: no markers are known
        return plain
    table = read_vocabulary(tokenizer)
    markers = ModelFormat.of(tokenizer).markers
    tokens = [t for m in markers for t in tokenizer.encode(m, add_special_tokens=False)]
    if table.special_ids.isdisjoint(tokens):
        return plain
    edges = {*tokenizer.eos_token_ids, tokenizer.bos_token_id, tokenizer.pad_token_id}
    make, _ = choose_detokenizer(prefer_native=prefer_native)
    return MarkedDetokenizer(plain, make(replace(table, special_ids=table.special_ids & edges)))
