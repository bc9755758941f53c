"""What is read from a tokenizer, and which tokenizers are refused."""

from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models

from mlx_serving.worker.engine.text.vocabulary import (
    UnsupportedVocabularyError,
    byte_alphabet,
    read_vocabulary,
)
from tests.support.tokenizers_for_tests import BYTE_FALLBACK, BYTE_LEVEL, GEMMA


def _tokenizer(decoder: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "▁": 2}, merges=[]))
    if decoder is not None:
        tokenizer.decoder = decoder
    return tokenizer


def test_kinds_are_told_by_the_decoder() -> None:
    tables = [read_vocabulary(ref.tokenizer) for ref in (BYTE_LEVEL, BYTE_FALLBACK, GEMMA)]
    assert [(table.kind, table.strip_leading_space) for table in tables] == [
        ("byte_level", False),
        ("byte_fallback", True),
        ("byte_fallback", False),
    ]


def test_special_ids_are_the_special_tokens_only() -> None:
    table = read_vocabulary(BYTE_LEVEL.tokenizer)
    assert table.special_ids == set(BYTE_LEVEL.ids("<|im_start|>", "<|im_end|>"))


def test_an_id_without_a_token_is_empty() -> None:
    assert read_vocabulary(_tokenizer(decoders.ByteLevel())).tokens == [b"a", b"", "▁".encode()]


def test_a_transformers_tokenizer_and_a_wrapper_give_the_same_table() -> None:
    transformers = pytest.importorskip("transformers")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=BYTE_LEVEL.tokenizer)
    wrapper = SimpleNamespace(_tokenizer=fast)
    expected = read_vocabulary(BYTE_LEVEL.tokenizer)
    assert read_vocabulary(fast) == read_vocabulary(wrapper) == expected


def test_a_special_token_added_later_is_special() -> None:
    tokenizer = _tokenizer(decoders.Sequence([decoders.ByteLevel()]))
    tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    assert read_vocabulary(tokenizer).special_ids == {tokenizer.token_to_id("<end>")}


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        decoders.WordPiece(),
        decoders.Metaspace(),
        decoders.Sequence([decoders.Replace("_", " "), decoders.ByteFallback()]),
        decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 2, 0),
            ]
        ),
    ],
    ids=str,
)
def test_a_decoder_that_cannot_be_streamed_is_refused_by_name(decoder: Any) -> None:
    with pytest.raises(UnsupportedVocabularyError, match=r"^decoder: .* can't be streamed"):
        read_vocabulary(_tokenizer(decoder))


def test_a_slow_tokenizer_is_refused() -> None:
    with pytest.raises(UnsupportedVocabularyError, match=r"^tokenizer: dict is not a fast"):
        read_vocabulary({})


def test_the_byte_alphabet_spells_every_byte_once() -> None:
    assert sorted(byte_alphabet().values()) == list(range(256))
    assert (byte_alphabet()["Ġ"], byte_alphabet()["Ċ"]) == (0x20, 0x0A)
