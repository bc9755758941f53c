"""Jobs whose every token is known before the run."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mlx_serving.tally.tasks import TASKS, Example, check
from tests.worker_process import counted

if TYPE_CHECKING:
    from tests.chaos.plan import Engine


@dataclass(frozen=True)
class Work:
    """A job and its answer.

    `text` is None where it has to be measured (dice); `token_ids` come from an undisturbed run.
    """

    kind: str
    job: dict[str, Any]
    text: str | None
    token_ids: list[int] = field(default_factory=list)


def make(engine: Engine, count: int, seed: int) -> list[Work]:
    rng = random.Random(seed)
    if engine == "simulated":
        return [simulated(rng.randint(60, 160)) for _ in range(count)]
    makers = [counting, counting, counting_down, stopped, echo, dice, dice]
    return [makers[i % len(makers)](rng) for i in range(count)]


def simulated(tokens: int) -> Work:
    job = {"model": "tally", "prompt": "x", "max_tokens": tokens}
    return Work("simulated", job, counted(tokens), list(range(1, tokens + 1)))


def _ask(prompt: str, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt}]
    return {"model": "tally", "messages": messages, "max_tokens": 1000, "temperature": 0.0} | fields


def _span(rng: random.Random) -> tuple[int, int]:
    first = rng.randint(1, 800)
    return first, first + rng.randint(40, 130)


def counting(rng: random.Random) -> Work:
    first, last = _span(rng)
    text = " ".join(map(str, range(first, last + 1)))
    return Work("count", _ask(f"count from {first} to {last}"), text)


def counting_down(rng: random.Random) -> Work:
    first, last = _span(rng)
    text = " ".join(map(str, range(last, first - 1, -1)))
    return Work("count_down", _ask(f"count down from {last} to {first}"), text)


def stopped(rng: random.Random) -> Work:
    """A count that ends at a long stop string, of which every attempt holds some back."""
    first, last = _span(rng)
    end = last - rng.randint(1, 10)
    text = " ".join(map(str, range(first, end - 2)))
    stop = f" {end - 2} {end - 1} {end}"
    # Near misses: they are held back, then released.
    others = [f" {n} {n + 1} X" for n in rng.sample(range(first, end - 4), 3)]
    return Work("stop", _ask(f"count from {first} to {last}", stop=[stop, *others]), text)


def echo(rng: random.Random) -> Work:
    """Characters of up to four bytes, each byte a token."""
    while True:
        example: Example = TASKS["echo"].sample(rng)
        text = example.answer or ""
        if len(text.encode()) >= 30 and not text.isascii():
            return Work("echo", _ask(example.messages[-1]["content"]), text)


def dice(rng: random.Random) -> Work:
    """Every digit is drawn: the same tokens only where the noise continues exactly."""
    size = rng.randint(60, 80)
    job = _ask(f"dice {size}", temperature=1.0, seed=rng.getrandbits(64))
    return Work("dice", job, None)


def is_right(work: Work, text: str) -> bool:
    if work.text is not None:
        return text == work.text
    messages = work.job["messages"]
    return check(Example("dice", messages, None, None, ""), text)
