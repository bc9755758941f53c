"""Jobs whose every token is known before the run."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from mlx_serving.tally.one_turn import system_turn
from mlx_serving.tally.tasks import TASKS
from mlx_serving.tally.two_turns import tool_schema
from tests.support.schemas_for_tests import PERSON
from tests.support.worker_process import counted

if TYPE_CHECKING:
    from collections.abc import Callable

    from mlx_serving.tally.examples import Example
    from tests.chaos.plan import Plan

TENANTS = (None, "a", "b")
PEOPLE = {"type": "array", "items": PERSON, "minItems": 2, "maxItems": 4}
REGEX = "([a-z]{3,6}(é|🙂)=[0-9]{2,5};){4,6}"
GRAMMAR = r"""start: line{4,6}
line: WORD " = " NUMBER ";\n"
WORD: /[a-z]{3,8}/
NUMBER: /[0-9]{2,5}/
"""
GRAMMAR_AS_REGEX = "([a-z]{3,8} = [0-9]{2,5};\n){4,6}"


@dataclass(frozen=True)
class Work:
    """A job, and what its answer has to be; see `answers`.

    `text` is None where it has to be measured. Each choice has to be valid under `schema`, to match
    `pattern` or make a `call`: a tool's name and its arguments, None for any that fit `schema`.
    `answer` is what an undisturbed run gave.
    """

    kind: str
    job: dict[str, Any]
    text: str | None = None
    schema: dict[str, Any] | None = None
    pattern: str | None = None
    call: tuple[str, Any] | None = None
    answer: list[dict[str, Any]] = field(default_factory=list)


def make(plan: Plan) -> list[Work]:
    rng = random.Random(plan.seed)
    if plan.engine == "simulated":
        return [simulated(rng.randint(60, 160)) for _ in range(plan.answers)]
    makers: list[Callable[[random.Random], Work]] = [counting, counting_down, stopped, echo, dice]
    makers += (
        [schema, regex, grammar, call, forced_call, choices] if plan.forms else [counting, dice]
    )
    shared = Sharing(rng)
    return [shared.put_before(makers[i % len(makers)](rng)) for i in range(plan.answers)]


class Sharing:
    """What several prompts begin with: a system turn and an earlier exchange; and tenants."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._histories = [self._history() for _ in range(4)]

    def _history(self) -> list[dict[str, Any]]:
        first = self._rng.randint(100, 900)
        numbers = " ".join(map(str, range(first, first + 12)))
        return [
            *system_turn(self._rng),
            {"role": "user", "content": f"count from {first} to {first + 11}"},
            {"role": "assistant", "content": numbers},
        ]

    def put_before(self, work: Work) -> Work:
        job = work.job | {"tenant": self._rng.choice(TENANTS)}
        if self._rng.random() < 0.5:
            before = self._rng.choice(self._histories)
            if "dice" in job["messages"][-1]["content"]:  # after a count, Tally may count on
                before = before[:1]
            job["messages"] = [*before, *job["messages"]]
        return replace(work, job=job)


def simulated(tokens: int) -> Work:
    job = {"model": "tally", "prompt": "x", "max_tokens": tokens}
    text = counted(tokens)
    answer = {"index": 0, "text": text, "token_ids": list(range(1, tokens + 1))}
    return Work("simulated", job, text, answer=[answer])


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
    return Work("dice", job)


def _drawn(rng: random.Random, what: str, **fields: Any) -> dict[str, Any]:
    """A job whose tokens are drawn, so that another seed gives another answer."""
    return _ask(what, temperature=0.5, seed=rng.getrandbits(64), **fields)


def schema(rng: random.Random) -> Work:
    form = {"type": "json_schema", "json_schema": {"name": "people", "schema": PEOPLE}}
    job = _drawn(rng, "json name=Ann age=34", response_format=form)
    return Work("schema", job, schema=PEOPLE)


def regex(rng: random.Random) -> Work:
    job = _drawn(rng, "spell cat", response_format={"type": "regex", "regex": REGEX})
    return Work("regex", job, pattern=REGEX)


def grammar(rng: random.Random) -> Work:
    job = _drawn(rng, "sort 5 3 9", response_format={"type": "grammar", "grammar": GRAMMAR})
    return Work("grammar", job, pattern=GRAMMAR_AS_REGEX)


def call(rng: random.Random) -> Work:
    """A tool that the model calls by itself."""
    example = TASKS["tool_call"].sample(rng)
    body = (example.answer or "").removeprefix("<tool_call>").removesuffix("</tool_call>")
    wanted = json.loads(body)
    job = _ask(example.messages[-1]["content"], tools=example.tools)
    return Work("call", job, call=(wanted["name"], wanted["arguments"]))


def forced_call(rng: random.Random) -> Work:
    """A tool that nothing in the prompt asks for."""
    tool = tool_schema(rng.choice(["get_weather", "get_time", "add"]))
    name = tool["function"]["name"]
    choice: Any = rng.choice(["required", {"type": "function", "function": {"name": name}}])
    job = _drawn(rng, "count from 3 to 9", tools=[tool], tool_choice=choice)
    return Work("forced call", job, schema=tool["function"]["parameters"], call=(name, None))


def choices(rng: random.Random) -> Work:
    """Three choices of one prompt, with log probabilities."""
    work = dice(rng)
    return replace(
        work, kind="choices", job=work.job | {"n": 3, "logprobs": True, "top_logprobs": 2}
    )
