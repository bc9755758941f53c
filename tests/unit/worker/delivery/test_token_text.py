"""Token ids as text: what a consumer reads in log probabilities."""

from __future__ import annotations

import math

import msgspec
import pytest

from mlx_serving.common.events import TokenLogprob
from mlx_serving.worker.delivery.token_text import render, speller, unspelled
from mlx_serving.worker.engine.interface import TokenLogprobs
from mlx_serving.worker.engine.text.vocabulary import VocabularyTable, read_vocabulary
from tests.support.tokenizers_for_tests import BYTE_FALLBACK, BYTE_LEVEL, GEMMA, Reference

BYTES = VocabularyTable(["Ġa".encode(), b"<end>", "é".encode(), b""], "byte_level", {1}, False)
FALLBACK = VocabularyTable(["▁a".encode(), b"</s>", b"<0xC3>", b"b"], "byte_fallback", {1}, True)


def test_byte_level_tokens_are_spelled_by_their_bytes() -> None:
    spell = speller(BYTES)
    assert [spell(n) for n in range(5)] == [b" a", b"<end>", b"\xe9", b"", b""]


def test_sentencepiece_tokens_are_spelled_with_their_space() -> None:
    spell = speller(FALLBACK)
    assert [spell(n) for n in range(5)] == [b" a", b"</s>", b"\xc3", b"b", b""]


@pytest.mark.parametrize("reference", [BYTE_LEVEL, BYTE_FALLBACK, GEMMA])
def test_the_spellings_of_a_text_are_the_text(reference: Reference) -> None:
    spell = speller(read_vocabulary(reference.tokenizer))
    text = "a né 👋🏽 世界 <tool call>"
    assert b"".join(map(spell, reference.encode(text))).decode().removeprefix(" ") == text


def test_what_is_rendered_has_the_openai_form() -> None:
    entry = TokenLogprobs(0, -0.123456789, ((0, -0.123456789), (2, -math.inf)))
    (rendered,) = render([entry], speller(BYTES))
    assert msgspec.to_builtins(rendered) == {
        "token": " a",
        "logprob": -0.123457,
        "top_logprobs": [
            {"token": " a", "logprob": -0.123457},
            {"token": "\ufffd", "logprob": -9999.0, "bytes": [0xE9]},
        ],
    }


@pytest.mark.parametrize("odd", [math.nan, -math.inf, -1e30])
def test_no_number_is_one_that_json_lacks(odd: float) -> None:
    (rendered,) = render([TokenLogprobs(0, odd)], speller(BYTES))
    again = msgspec.json.decode(msgspec.json.encode(rendered), type=TokenLogprob)
    assert again == TokenLogprob(" a", -9999.0)


def test_before_an_engine_is_loaded_nothing_is_spelled() -> None:
    with pytest.raises(LookupError):
        unspelled(3)
