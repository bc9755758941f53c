"""Samplers of the tasks that take one user turn: count, echo, sort and the like."""

import json
from collections.abc import Callable
from random import Random

from mlx_serving.tally import texts
from mlx_serving.tally.examples import ChatMessage, Example, ask
from mlx_serving.tally.tokenizer import WORD_IDS

LONGEST_NUMBER = 999
LONGEST_DICE = 80  # digits
SORT_COUNT = (2, 6)  # numbers a sort prompt lists
SORT_LIMIT = 99
REVERSE_LETTERS = (2, 7)
SPELL_LETTERS = (2, 12)
ECHO_BYTES = 48

_SYSTEM_TURNS = (
    "You are Tally.",
    "You are a helpful assistant.",
    "You are a careful assistant.",
    "You are Tally, a tiny model that can be checked.",
    "Be brief.",
    "Answer the user.",
)


def system_turn(rng: Random) -> list[ChatMessage]:
    """One system message, as a list to put before others."""
    text = rng.choice(_SYSTEM_TURNS)
    kind = rng.random()
    if kind < 0.4:
        text = f"{text} Session {rng.randrange(10000)}."
    elif kind < 0.5:
        text = texts.wild_text(rng, 24)
    return [{"role": "system", "content": text}]


def span(rng: Random, longest: int) -> tuple[int, int]:
    """First and last of at most `longest` consecutive numbers up to 999, small ones often."""
    length = max(1, min(longest, round(longest ** rng.uniform(0.3, 1.05))))
    limit = LONGEST_NUMBER - length + 1
    start = rng.randint(0, min(limit, rng.choice((1, 20, 100, LONGEST_NUMBER, LONGEST_NUMBER))))
    return start, start + length - 1


def count(rng: Random, longest: int) -> Example:
    """`count from 3 to 5` → `3 4 5`."""
    low, high = span(rng, longest)
    numbers = " ".join(map(str, range(low, high + 1)))
    return ask("count", f"count from {low} to {high}", numbers)


def count_down(rng: Random, longest: int) -> Example:
    """`count down from 5 to 3` → `5 4 3`."""
    low, high = span(rng, longest)
    numbers = " ".join(map(str, range(high, low - 1, -1)))
    return ask("count_down", f"count down from {high} to {low}", numbers)


def echo(rng: Random, _longest: int) -> Example:
    """`echo Grüße 🎲` → `Grüße 🎲`."""
    text = texts.wild_text(rng, ECHO_BYTES)
    return ask("echo", f"echo {text}", text)


def reverse(rng: Random, _longest: int) -> Example:
    """`reverse cat` → `tac`."""
    text = _letters(rng, REVERSE_LETTERS)
    return ask("reverse", f"reverse {text}", text[::-1])


def spell(rng: Random, _longest: int) -> Example:
    """`spell cat` → `c a t`."""
    text = _letters(rng, SPELL_LETTERS)
    return ask("spell", f"spell {text}", " ".join(text))


def _letters(rng: Random, size: tuple[int, int]) -> str:
    """A word written letter by letter: one that is a single token shows the model no letters."""
    while (text := texts.word(rng, *size)) in WORD_IDS:
        pass
    return text


def sort(rng: Random, _longest: int) -> Example:
    """`sort 5 3 9` → `3 5 9`."""
    limit = rng.choice((9, SORT_LIMIT, SORT_LIMIT))
    numbers = [rng.randint(0, limit) for _ in range(rng.randint(*SORT_COUNT))]
    asked, answer = (" ".join(map(str, row)) for row in (numbers, sorted(numbers)))
    return ask("sort", f"sort {asked}", answer)


def json_object(rng: Random, _longest: int) -> Example:
    """`json name=Ann age=34` → `{"name": "Ann", "age": 34}`."""
    pairs: dict[str, str | int] = {}
    for _ in range(rng.randint(1, 4)):
        key = rng.choice(texts.KEYS) if rng.random() < 0.5 else texts.word(rng, 1, 7)
        number = rng.randrange(10 ** rng.randint(1, 4))
        pairs[key] = number if rng.random() < 0.5 else texts.name(rng)
    asked = " ".join(f"{key}={value}" for key, value in pairs.items())
    return ask("json", f"json {asked}", json.dumps(pairs))


def dice(rng: Random, _longest: int) -> Example:
    """`dice 12` → twelve uniform digits, a space after every ten."""
    size = rng.randint(1, rng.choice((20, LONGEST_DICE, LONGEST_DICE)))
    # So few prompts exist that the system turn takes part in the split.
    system = system_turn(rng) if rng.random() < 0.5 else []
    messages = [*system, {"role": "user", "content": f"dice {size}"}]
    return Example("dice", messages, None, None, "\n".join(m["content"] for m in messages))


DRAWS: dict[str, Callable[[Random, int], Example]] = {
    "count": count,
    "count_down": count_down,
    "echo": echo,
    "reverse": reverse,
    "spell": spell,
    "sort": sort,
    "json": json_object,
    "dice": dice,
}
