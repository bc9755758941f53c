"""Tally's vocabulary, chat format and tokenizer files.

Byte-level BPE without merges (`ignore_merges`): a piece of text that is a whole entry of the
vocabulary is one token, any other is its UTF-8 bytes, so every text can be written and digits stay
one token each. `encode` and `render` are plain twins of `tokenizer.json` and
`chat_template.jinja`: they make training data fast, and a test holds each pair equal.
"""

import json
import re
from pathlib import Path
from typing import Any

from mlx_serving.tally.examples import ChatMessage

END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CONTROL = (END_OF_TEXT, START, END)
MARKUP = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
_WORDS = """
user assistant system
count from to down echo reverse spell sort json dice again that weather time in add and
get_weather get_time name arguments city type function description parameters object
properties string integer required Tools Current a Add two numbers
temperature sky sum degrees clear cloudy rain snow windy
You are Tally tiny model can be checked helpful careful Be brief Answer the Session
Paris London Berlin Rome Tokyo
"""
WORDS = tuple(_WORDS.split())
VOCABULARY_SIZE = 336
CONTEXT_TOKENS = 8192

_PIECE = re.compile("[A-Za-z_]+|(?s:.)")
_SPECIAL = re.compile("(" + "|".join(re.escape(token) for token in CONTROL + MARKUP) + ")")


def _byte_letters() -> list[str]:
    """GPT-2's printable stand-in for each byte, by byte."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    letters = {byte: chr(byte) for byte in shown}
    letters |= {byte: chr(256 + i) for i, byte in enumerate(hidden)}
    return [letters[byte] for byte in range(256)]


def vocabulary() -> list[str]:
    """All tokens by id: control, markup, 256 bytes, words, reserved; length VOCABULARY_SIZE."""
    words = [word for word in dict.fromkeys(WORDS) if len(word) > 1]
    tokens = [*CONTROL, *MARKUP, *_byte_letters(), *words]
    return tokens + [f"<|reserved_{i}|>" for i in range(VOCABULARY_SIZE - len(tokens))]


TOKEN_IDS = {token: i for i, token in enumerate(vocabulary())}
END_ID = TOKEN_IDS[END]
FIRST_BYTE_ID = len(CONTROL + MARKUP)
DIGIT_IDS = range(FIRST_BYTE_ID + ord("0"), FIRST_BYTE_ID + ord("9") + 1)
WORD_IDS = {word: TOKEN_IDS[word] for word in WORDS if len(word) > 1}


def encode(text: str) -> list[int]:
    """Token ids of rendered text; control and markup tokens are read as such."""
    ids: list[int] = []
    for i, part in enumerate(_SPECIAL.split(text)):
        if i % 2:
            ids.append(TOKEN_IDS[part])
            continue
        for piece in _PIECE.findall(part):
            word = WORD_IDS.get(piece)
            if word is None:
                ids.extend(FIRST_BYTE_ID + byte for byte in piece.encode())
            else:
                ids.append(word)
    return ids


def render(messages: list[ChatMessage], tools: list[dict[str, Any]] | None) -> str:
    """The prompt that the chat template makes of string-content messages, answer to follow."""
    system = str(messages[0]["content"]) if messages[0]["role"] == "system" else None
    blocks: list[tuple[str, str]] = []
    if tools:
        listed = "".join(json.dumps(tool, ensure_ascii=False) + "\n" for tool in tools)
        head = f"{system}\n\n" if system is not None else ""
        blocks.append(("system", f"{head}# Tools\n{listed}"))
    elif system is not None:
        blocks.append(("system", system))
    blocks += [_block(message) for message in messages[system is not None :]]
    turns = "".join(f"{START}{role}\n{text}{END}\n" for role, text in blocks)
    return f"{turns}{START}assistant\n"


def _block(message: ChatMessage) -> tuple[str, str]:
    role, text = message["role"], message["content"]
    if role == "tool":
        return "user", f"<tool_response>\n{text}\n</tool_response>"
    calls = [_call(call["function"]) for call in message.get("tool_calls", ())]
    return role, "\n".join(part for part in (text, *calls) if part)


def _call(function: dict[str, Any]) -> str:
    arguments = function["arguments"]
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return f'<tool_call>\n{{"name": "{function["name"]}", "arguments": {arguments}}}\n</tool_call>'


def _added_token(token: str) -> dict[str, Any]:
    return {
        "id": TOKEN_IDS[token],
        "content": token,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": token not in MARKUP,
    }


def tokenizer_json() -> dict[str, Any]:
    """The content of `tokenizer.json`."""
    reserved = [token for token in TOKEN_IDS if token.startswith("<|reserved_")]
    byte_level = {"add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {
        "type": "Split",
        "pattern": {"Regex": "[A-Za-z_]+|[^A-Za-z_]"},
        "behavior": "Isolated",
        "invert": False,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(token) for token in (*CONTROL, *MARKUP, *reserved)],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split, {"type": "ByteLevel", **byte_level}],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", **byte_level},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": TOKEN_IDS,
            "merges": [],
        },
    }


def tokenizer_config() -> dict[str, Any]:
    """The content of `tokenizer_config.json`."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": END,
        "pad_token": END_OF_TEXT,
        "model_max_length": CONTEXT_TOKENS,
        "clean_up_tokenization_spaces": False,
    }


def write_tokenizer(folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`; the chat template stays as it is."""
    for name, content in (
        ("tokenizer.json", tokenizer_json()),
        ("tokenizer_config.json", tokenizer_config()),
    ):
        text = json.dumps(content, ensure_ascii=False, indent=1)
        (folder / name).write_text(text + "\n", encoding="utf-8")
