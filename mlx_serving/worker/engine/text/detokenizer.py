"""Tokens to text, streamed: the Python twin of `mlx_serving._native`.

A pushed token passes three stages, each with some state per slot:

1. bytes: the token's spelling becomes bytes, and bytes become whole characters. Byte-level
   vocabularies keep back at most three bytes of an unfinished character. Byte-fallback ones keep
   back a run of `<0xAB>` tokens until it ends, because the reference decodes the run as a whole:
   one bad byte turns every byte of its run into U+FFFD.
2. the leading space that Llama's decoder strips, once per text;
3. stop strings: the longest end of the text that may still become a stop string is kept back, and
   nothing else.

The released text, joined, equals `tokenizer.decode(tokens, skip_special_tokens=True,
clean_up_tokenization_spaces=False)` up to the stop string. The C++ module does the same by other
means (a UTF-8 state machine, Knuth-Morris-Pratt); one contract-test class runs over both.
"""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from mlx_serving.worker.engine.text.vocabulary import Vocabulary

REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"


class DetokenizerProtocol(Protocol):
    """What the engine calls; implemented by the native class and by the twin."""

    def open(self, stops: Sequence[str] = ()) -> int:
        """See `Detokenizer.open`."""

    def push(self, slots: list[int], tokens: list[int]) -> list[tuple[str, bool]]:
        """See `Detokenizer.push`."""

    def replay(self, slot: int, tokens: list[int]) -> tuple[str, bool]:
        """See `Detokenizer.replay`."""

    def finish(self, slot: int) -> str:
        """See `Detokenizer.finish`."""

    def close(self, slot: int) -> None:
        """See `Detokenizer.close`."""


class _ByteLevelText:
    """Bytes to whole characters; an unfinished one is kept back, a broken one becomes U+FFFD."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(self._vocabulary.piece_bytes(token))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _ByteFallbackText:
    """Text tokens pass through; a run of byte tokens is kept back until its end."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._run = bytearray()

    def push(self, token: int) -> str:
        piece = self._vocabulary.piece_text(token)
        if isinstance(piece, int):
            self._run.append(piece)
            return ""
        # An id without text (special, unknown) counts as absent: it ends no run.
        return self.flush() + piece if piece else ""

    def flush(self) -> str:
        run = bytes(self._run)
        self._run.clear()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return REPLACEMENT * len(run)


@dataclass(slots=True)
class _StopMatcher:
    """Finds the stop string that is complete first; of two that end together, the longer."""

    stops: tuple[str, ...]
    kept_back: str = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Return (the text to release, whether a stop string is complete)."""
        text = self.kept_back + text
        found = [(at + len(stop), at) for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            self.kept_back = ""
            return text[: min(found)[1]], True
        keep = max((_overlap(text, stop) for stop in self.stops), default=0)
        self.kept_back = text[len(text) - keep :]
        return text[: len(text) - keep], False


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that `stop` begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


@dataclass(slots=True)
class _Slot:
    text: _ByteLevelText | _ByteFallbackText
    matcher: _StopMatcher
    strip_pending: bool
    stopped: bool = False
    finished: bool = False

    def push(self, token: int) -> tuple[str, bool]:
        return self._release(self.text.push(token))

    def finish(self) -> str:
        self.finished = True
        released, stopped = self._release(self.text.flush())
        return released if stopped else released + self.matcher.kept_back

    def _release(self, text: str) -> tuple[str, bool]:
        if self.stopped or not text:
            return "", self.stopped
        if self.strip_pending:
            self.strip_pending = False
            text = text.removeprefix(" ")
        released, self.stopped = self.matcher.push(text)
        return released, self.stopped


@dataclass(slots=True)
class _Slots:
    """Open slots by number; a new slot gets the lowest free number."""

    open: dict[int, _Slot] = field(default_factory=dict)

    def add(self, slot: _Slot) -> int:
        number = next(n for n in range(len(self.open) + 1) if n not in self.open)
        self.open[number] = slot
        return number

    def get(self, slot: int) -> _Slot:
        found = self.open.get(slot)
        if found is None:
            msg = f"slot {slot} is not open"
            raise ValueError(msg)
        if found.finished:
            msg = f"slot {slot} is finished"
            raise ValueError(msg)
        return found


class Detokenizer:
    """Streams of tokens to streams of text: one slot for each stream, one call for the batch."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._slots = _Slots()

    def open(self, stops: Sequence[str] = ()) -> int:
        """Open a slot.

        Args:
            stops: strings that end the text right before them; none may be empty.

        Returns:
            The slot's number, the lowest that is free.

        Raises:
            ValueError: an empty stop string, or one with a lone surrogate.
        """
        for index, stop in enumerate(stops):
            _check_stop(stop, index)
        vocabulary = self._vocabulary
        is_byte_level = vocabulary.kind == "byte_level"
        text = _ByteLevelText(vocabulary) if is_byte_level else _ByteFallbackText(vocabulary)
        matcher = _StopMatcher(tuple(stops))
        return self._slots.add(_Slot(text, matcher, vocabulary.strip_leading_space))

    def push(self, slots: list[int], tokens: list[int]) -> list[tuple[str, bool]]:
        """Feed one token to each of some slots; after an error, no slot has changed.

        Args:
            slots: open slots, each at most once.
            tokens: one id for each slot; unknown ids release nothing, as in the reference.

        Returns:
            (released text, whether a stop string is complete) for each slot. After a stop string
            the text ends right before it, and later pushes release nothing.

        Raises:
            ValueError: a slot that is not open, finished or given twice, a negative id, lists of
                different lengths.
        """
        if len(slots) != len(tokens):
            msg = f"tokens: {len(tokens)} for {len(slots)} slots"
            raise ValueError(msg)
        rows = [self._slots.get(slot) for slot in slots]
        if len(set(slots)) != len(slots):
            msg = "slots: a slot occurs twice"
            raise ValueError(msg)
        _check_tokens(tokens)
        return [row.push(token) for row, token in zip(rows, tokens, strict=True)]

    def replay(self, slot: int, tokens: list[int]) -> tuple[str, bool]:
        """Feed many tokens to one slot, to rebuild its state; return (text, whether it stopped).

        Raises:
            ValueError: a slot that is not open or finished, a negative id.
        """
        row = self._slots.get(slot)
        _check_tokens(tokens)
        text = "".join([row.push(token)[0] for token in tokens])
        return text, row.stopped

    def finish(self, slot: int) -> str:
        """Release what a slot has kept back; an unfinished character becomes U+FFFD.

        Raises:
            ValueError: a slot that is not open, or finished before.
        """
        return self._slots.get(slot).finish()

    def close(self, slot: int) -> None:
        """Free a slot, finished or not.

        Raises:
            ValueError: a slot that is not open.
        """
        if self._slots.open.pop(slot, None) is None:
            msg = f"slot {slot} is not open"
            raise ValueError(msg)


def _check_tokens(tokens: Sequence[int]) -> None:
    for index, token in enumerate(tokens):
        if token < 0:
            msg = f"tokens[{index}]: {token} is negative"
            raise ValueError(msg)


def _check_stop(stop: str, index: int) -> None:
    if not stop:
        msg = f"stops[{index}]: must not be empty"
        raise ValueError(msg)
    try:
        stop.encode()
    except UnicodeEncodeError:
        msg = f"stops[{index}]: has a lone surrogate"
        raise ValueError(msg) from None
