"""Token ids as text, for log probabilities: a producer has no vocabulary, so the worker spells.

A token is spelled as the tokenizer would decode it by itself; special tokens, which no text ever
shows, by their own names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from mlx_serving.common.events import TokenLogprob, TopLogprob

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mlx_serving.worker.engine.interface import TokenLogprobs
    from mlx_serving.worker.engine.text.vocabulary import VocabularyTable

Spell = Callable[[int], bytes]

LEAST_LOGPROB: Final = -9999.0
"""Stands for minus infinity, which JSON can't say; OpenAI's own value for "next to nothing"."""

DECIMALS: Final = 6  # about what float32 holds; more digits are twice the bytes of an event


def unspelled(token_id: int) -> bytes:
    """Stand in until an engine is loaded."""
    raise LookupError(f"nothing to spell token {token_id} with")


def speller(table: VocabularyTable) -> Spell:
    """Return what spells a token id of this vocabulary; `b""` for an id that it lacks."""
    # Imported here: who only renders needs no vocabulary.
    from mlx_serving.worker.engine.text.vocabulary import Vocabulary

    # Without special ids: those have pieces too, their names.
    vocabulary = Vocabulary(table.tokens, table.kind, set())
    if table.kind == "byte_level":
        return vocabulary.piece_bytes
    return _fallback(vocabulary.piece_text)


def _fallback(piece: Callable[[int], str | int]) -> Spell:
    def spell(token_id: int) -> bytes:
        text = piece(token_id)
        return bytes([text]) if isinstance(text, int) else text.encode()

    return spell


def render(entries: Sequence[TokenLogprobs], spell: Spell) -> list[TokenLogprob]:
    """What the engine reports of a row's tokens, in the words of the OpenAI chat API."""
    return [
        TokenLogprob(
            *_spelled(spell(entry.token_id), entry.logprob),
            [TopLogprob(*_spelled(spell(token_id), logprob)) for token_id, logprob in entry.top],
        )
        for entry in entries
    ]


def _spelled(raw: bytes, logprob: float) -> tuple[str, float, list[int] | None]:
    """Text, log probability, and the bytes if the text does not say them."""
    # `max` with the bound first, so that a NaN becomes it too: JSON has neither.
    least = round(max(LEAST_LOGPROB, logprob), DECIMALS)
    try:
        return raw.decode(), least, None
    except UnicodeDecodeError:
        return raw.decode(errors="replace"), least, list(raw)
