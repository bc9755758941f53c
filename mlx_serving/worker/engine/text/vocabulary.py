"""A tokenizer's table of tokens, in the form the detokenizer needs.

`read_vocabulary` takes it from a Hugging Face fast tokenizer (or mlx-lm's wrapper around one);
`Vocabulary` is the Python twin of `mlx_serving._native.Vocabulary`.

The text equals `tokenizer.decode(tokens, skip_special_tokens=True,
clean_up_tokenization_spaces=False)`. The clean-up, which deletes spaces before punctuation, is
never applied, even if the tokenizer asks for it: it changes what the model wrote (code above all)
and can't be streamed.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Final, Literal

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VocabularyKind = Literal["byte_level", "byte_fallback"]

KINDS: Final = ("byte_level", "byte_fallback")
WORD_BOUNDARY: Final = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's visible space

# The reference parses the two digits with Rust's from_str_radix, which takes a plus sign too.
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f+][0-9A-Fa-f])>")


class UnsupportedVocabularyError(ValueError):
    """The tokenizer's decoder can't be streamed exactly."""


@dataclass(frozen=True, slots=True)
class VocabularyTable:
    """The arguments of `Vocabulary`, read from a tokenizer; the native class takes the same."""

    tokens: list[bytes]
    kind: VocabularyKind
    special_ids: set[int]
    strip_leading_space: bool


def read_vocabulary(tokenizer: Any) -> VocabularyTable:  # noqa: ANN401 - a wrapper forwards by getattr
    """Read a fast tokenizer's table; takes some 0.2 s for 150,000 tokens: once per model.

    Args:
        tokenizer: mlx-lm's TokenizerWrapper, a transformers fast tokenizer, or a
            `tokenizers.Tokenizer`.

    Raises:
        UnsupportedVocabularyError: a slow tokenizer, or a decoder other than byte-level BPE and
            byte-fallback. There is no slower way: a model whose text can't be streamed exactly
            is refused when it loads, by the name of its decoder.
    """
    backend = _backend(tokenizer)
    kind, strip = _classify(_decoder_config(backend))
    size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    # Not get_vocab's spellings: an added token is decoded to its normalised form.
    spellings = [backend.id_to_token(token_id) or "" for token_id in range(size)]
    tokens = [spelling.encode() for spelling in spellings]
    # The reference compares spellings with those of special tokens, and not ids.
    added = backend.get_added_tokens_decoder().values()
    special = {token.content for token in added if token.special}
    special_ids = {token_id for token_id, spelling in enumerate(spellings) if spelling in special}
    return VocabularyTable(tokens, kind, special_ids, strip)


def _backend(tokenizer: Any) -> "Tokenizer":  # noqa: ANN401 - see read_vocabulary
    inner = getattr(tokenizer, "_tokenizer", tokenizer)  # mlx-lm's wrapper, or transformers' own
    inner = getattr(inner, "backend_tokenizer", inner)
    if not (hasattr(inner, "get_added_tokens_decoder") and hasattr(inner, "decoder")):
        msg = f"tokenizer: {type(tokenizer).__name__} is not a fast tokenizer (tokenizer.json)"
        raise UnsupportedVocabularyError(msg)
    fast: Tokenizer = inner
    return fast


def _decoder_config(backend: "Tokenizer") -> dict[str, Any] | None:
    """Return the decoder as in tokenizer.json; its pickle state is that JSON."""
    if backend.decoder is None:
        return None
    config: dict[str, Any] = json.loads(backend.decoder.__getstate__())
    return config


def _classify(decoder: dict[str, Any] | None) -> tuple[VocabularyKind, bool]:
    """Return (kind, whether to strip one leading space) of a tokenizer.json's decoder."""
    steps = _steps(decoder)
    names = [step.get("type") for step in steps]
    if names == ["ByteLevel"]:
        return "byte_level", False
    if names[:2] == ["Replace", "ByteFallback"] and _is_word_boundary(steps[0]):
        rest = names[2:]
        if rest in ([], ["Fuse"]):
            return "byte_fallback", False
        if rest == ["Fuse", "Strip"] and (strip := _strips_one_space(steps[3])) is not None:
            return "byte_fallback", strip
    msg = (
        f"decoder: {json.dumps(decoder)[:200]} can't be streamed; supported are ByteLevel, and "
        "Replace, ByteFallback, Fuse with or without Strip"
    )
    raise UnsupportedVocabularyError(msg)


def _steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    if decoder.get("type") == "Sequence":
        return [inner for step in decoder["decoders"] for inner in _steps(step)]
    return [decoder]


def _is_word_boundary(step: dict[str, Any]) -> bool:
    return step.get("pattern") == {"String": WORD_BOUNDARY} and step.get("content") == " "


def _strips_one_space(step: dict[str, Any]) -> bool | None:
    """Whether a Strip step drops the first space; None: it drops anything else."""
    if step.get("stop") != 0 or step.get("start") not in {0, 1} or step.get("content") != " ":
        return None
    return step.get("start") == 1


@cache
def byte_alphabet() -> dict[str, int]:
    """GPT-2's byte alphabet: printable bytes are themselves, the others begin at U+0100.

    Source: `bytes_to_unicode` in openai/gpt-2, src/encoder.py.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    spelled = {chr(byte): byte for byte in printable}
    return spelled | {chr(0x100 + n): byte for n, byte in enumerate(others)}


def _byte_level_piece(spelling: str) -> bytes:
    """Return a token's bytes; one with a character outside the alphabet is literal text."""
    alphabet = byte_alphabet()
    if all(character in alphabet for character in spelling):
        return bytes(alphabet[character] for character in spelling)
    return spelling.encode()


class Vocabulary:
    """The bytes of every token, decoded once per model and shared by all slots; immutable.

    Args:
        tokens: each id's spelling as the tokenizer lists it, UTF-8; b"" for an id without one.
        kind: "byte_level" (GPT-2's byte alphabet) or "byte_fallback" (SentencePiece with
            `<0xAB>` tokens).
        special_ids: ids that release no text.
        strip_leading_space: drop one space at the start of every text (Llama's decoder).

    Raises:
        ValueError: an unknown kind, a special id outside the vocabulary, a spelling that is
            not UTF-8.
    """

    def __init__(
        self,
        tokens: Sequence[bytes],
        kind: VocabularyKind,
        special_ids: set[int],
        strip_leading_space: bool = False,  # noqa: FBT001, FBT002 - as in the C++ signature
    ) -> None:
        if kind not in KINDS:
            msg = f"kind: must be byte_level or byte_fallback, not {kind!r}"
            raise ValueError(msg)
        _check_special_ids(special_ids, len(tokens))
        self.kind = kind
        self.special_ids = frozenset(special_ids)
        self.strip_leading_space = strip_leading_space
        spellings = [_decoded(token, token_id) for token_id, token in enumerate(tokens)]
        # Byte tokens of a byte-fallback vocabulary are ints, all other pieces bytes or str.
        if kind == "byte_level":
            self._bytes = [_byte_level_piece(spelling) for spelling in spellings]
            self._texts: list[str | int] = []
        else:
            self._bytes = []
            self._texts = [_byte_fallback_piece(spelling) for spelling in spellings]

    def __len__(self) -> int:
        return len(self._bytes or self._texts)

    def piece_bytes(self, token: int) -> bytes:
        """Return a byte-level token's bytes; none for special and unknown ids."""
        if token >= len(self._bytes) or token in self.special_ids:
            return b""
        return self._bytes[token]

    def piece_text(self, token: int) -> str | int:
        """Return a byte-fallback token's text, or the value of a byte token; "" for special ids."""
        if token >= len(self._texts) or token in self.special_ids:
            return ""
        return self._texts[token]


def _check_special_ids(special_ids: set[int], size: int) -> None:
    for token in sorted(special_ids):
        if not 0 <= token < size:
            msg = f"special_ids: {token} is not an id of a vocabulary of {size}"
            raise ValueError(msg)


def _decoded(token: bytes, token_id: int) -> str:
    try:
        return token.decode()
    except UnicodeDecodeError:
        msg = f"tokens[{token_id}]: the spelling is not UTF-8"
        raise ValueError(msg) from None


def _byte_fallback_piece(spelling: str) -> str | int:
    match = _BYTE_TOKEN.fullmatch(spelling)
    return int(match[1], 16) if match else spelling.replace(WORD_BOUNDARY, " ")
