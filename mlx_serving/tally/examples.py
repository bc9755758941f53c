"""An example: a conversation and its right answer, its check, and the held-out split."""

import hashlib
from dataclasses import dataclass
from typing import Any

DICE_GROUP = 10  # digits between two spaces of a dice answer

ChatMessage = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation that asks for one more assistant turn, and the right one.

    `answer` is None if any of many texts is right (dice): ask `check`.
    `key` is what the prompt asks, context aside: it decides between training and held-out.
    """

    task: str
    messages: list[ChatMessage]
    tools: list[dict[str, Any]] | None
    answer: str | None
    key: str


def ask(task: str, prompt: str, answer: str | None) -> Example:
    """An example of one user turn."""
    return Example(task, [{"role": "user", "content": prompt}], None, answer, prompt)


def is_held_out(example: Example) -> bool:
    """Whether training must never see this prompt: one in ten, by a hash of its key."""
    digest = hashlib.sha256(f"{example.task}\0{example.key}".encode()).digest()
    return digest[0] < 26


def check(example: Example, text: str) -> bool:
    """Whether `text` is a right answer to the example; spaces at its ends do not count."""
    if example.answer is not None:
        return text.strip() == example.answer
    digits = digits_of(text)
    return text.strip() == group_digits(digits) and len(digits) == dice_size(example)


def dice_size(example: Example) -> int:
    """How many digits a dice example asks for."""
    return int(example.messages[-1]["content"].split()[-1])


def digits_of(text: str) -> str:
    """The ASCII digits of a dice answer, without the spaces between its groups."""
    return "".join(c for c in text if c in "0123456789")


def group_digits(digits: str) -> str:
    """Digits as a dice answer writes them: a space after every ten."""
    return " ".join(digits[i : i + DICE_GROUP] for i in range(0, len(digits), DICE_GROUP))
