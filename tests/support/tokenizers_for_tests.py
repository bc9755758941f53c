"""Small real tokenizers, built in memory: byte-level BPE, Llama's and Gemma's byte-fallback."""

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from mlx_serving.worker.engine.text.vocabulary import byte_alphabet

_TEXT_TOKENS = ["▁", "a", "b", "é", "你", "▁a", "▁ab", "ab", "x▁", "\ufffd", "<0x4>", "<0xABC>"]


@dataclass(frozen=True)
class Reference:
    """A `tokenizers.Tokenizer`, whose decode is the truth."""

    tokenizer: Tokenizer

    @property
    def size(self) -> int:
        """Ids, the added ones included."""
        return self.tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, no special ones around it."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Sequence[int]) -> str:
        """What the detokenizer must release."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True)

    def ids(self, *spellings: str) -> list[int]:
        """Ids by spelling."""
        vocab = self.tokenizer.get_vocab(with_added_tokens=True)
        return [vocab[spelling] for spelling in spellings]


def _with_added(tokenizer: Tokenizer) -> Reference:
    tokenizer.add_tokens([AddedToken("<tool call>"), AddedToken("naïve"), AddedToken("日本")])
    return Reference(tokenizer)


def _byte_level() -> Reference:
    alphabet = sorted(byte_alphabet(), key=lambda character: byte_alphabet()[character])
    vocab = {character: byte for byte, character in enumerate(alphabet)}
    merges = [("a", "b"), ("Ġ", "a"), ("ä", "½"), ("ä½", "ł"), ("ð", "Ł"), ("Ġ", "ä")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return _with_added(tokenizer)


def _byte_fallback(*, strip: bool) -> Reference:
    spellings = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {spelling: n for n, spelling in enumerate([*spellings, *_TEXT_TOKENS])}
    merges = [("▁", "a"), ("a", "b")]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True)  # noqa: S106
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if strip:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return _with_added(tokenizer)


BYTE_LEVEL = _byte_level()
BYTE_FALLBACK = _byte_fallback(strip=True)
GEMMA = _byte_fallback(strip=False)
BYTE_LEVEL_IDS = list(range(256))
