"""A job's answer in a form that two runs can be compared by, and whether it is right."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Final

import jsonschema

from mlx_serving.tally.examples import Example, check

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mlx_serving.common.results import ChoiceResult
    from tests.chaos.work import Work

LOGPROB_TOLERANCE: Final = 1e-3  # logits differ in the last bits with the batch's size


def told(choices: Sequence[ChoiceResult]) -> list[dict[str, Any]]:
    """What a job's choices say, without the ids of calls, which are other ones for each job."""
    return [
        {
            "index": choice.index,
            "text": choice.text,
            "token_ids": choice.token_ids,
            "finish_reason": choice.finish_reason,
            "reasoning": choice.reasoning,
            "calls": [[c.function.name, c.function.arguments] for c in choice.tool_calls or ()],
            "logprobs": [entry.logprob for entry in choice.logprobs.content]
            if choice.logprobs
            else [],
        }
        for choice in choices
    ]


def difference(got: list[dict[str, Any]], known: list[dict[str, Any]]) -> str:
    """Where an answer parts from the one that is known; '' where it doesn't."""
    if len(got) != len(known):
        return f"{len(got)} choices for {len(known)}"
    for mine, wanted in zip(got, known, strict=True):
        for name, value in wanted.items():
            if not _same(name, mine[name], value):
                return f"choice {mine['index']}, {name}: {_parting(mine[name], value)}"
    return ""


def _same(name: str, got: Any, wanted: Any) -> bool:
    if name != "logprobs":
        return bool(got == wanted)
    return len(got) == len(wanted) and all(
        abs(a - b) < LOGPROB_TOLERANCE for a, b in zip(got, wanted, strict=True)
    )


def _parting(got: Any, wanted: Any) -> str:
    if not isinstance(got, list) or not isinstance(wanted, list):
        return f"{got!r} for {wanted!r}"
    same = next((i for i, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b), None)
    at = same if same is not None else min(len(got), len(wanted))
    return f"{len(got)} for {len(wanted)}, they part at {at}"


def wrong(work: Work, choices: list[dict[str, Any]]) -> str:
    """What an answer breaks of what was asked; '' where it is right."""
    if len(choices) != work.job.get("n", 1):
        return f"{len(choices)} choices"
    return next(filter(None, (_wrong(work, choice) for choice in choices)), "")


def _wrong(work: Work, choice: dict[str, Any]) -> str:
    text = choice["text"]
    if work.call:
        return _wrong_call(work, choice)
    if work.text is not None:
        return "" if text == work.text else f"text {text!r}"
    if work.pattern:
        return "" if re.fullmatch(work.pattern, text) else f"does not match: {text!r}"
    if work.schema:
        return _invalid(text, work.schema)
    dice = Example("dice", work.job["messages"], None, None, "")
    return "" if check(dice, text) else f"no such dice: {text!r}"


def _wrong_call(work: Work, choice: dict[str, Any]) -> str:
    """A call that was asked for by name or by the prompt, and nothing but it."""
    assert work.call is not None
    name, wanted = work.call
    calls = choice["calls"]
    if choice["finish_reason"] != "tool_calls" or choice["text"].strip() or not calls:
        return f"{choice['finish_reason']}, {len(calls)} calls, text {choice['text']!r}"
    for called, arguments in calls:
        if called != name:
            return f"calls {called}"
        if wanted is not None and json.loads(arguments) != wanted:
            return f"arguments {arguments}"
        if work.schema and (problem := _invalid(arguments, work.schema)):
            return problem
    return ""


def _invalid(text: str, schema: dict[str, Any]) -> str:
    try:
        jsonschema.validate(json.loads(text), schema)
    except (ValueError, jsonschema.ValidationError) as error:
        return f"{type(error).__name__}: {text!r}"
    return ""
