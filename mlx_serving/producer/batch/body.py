"""Turns the body of a request, in OpenAI's form, into the fields of a job.

A field is honoured, perhaps by another name; or it changes nothing about the generation and is
reported as ignored; or it is an error with its path.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from mlx_serving.common.errors import FieldError
from mlx_serving.producer.batch.objects import CHAT, COMPLETIONS

IGNORED: Final = frozenset(
    {
        "metadata",
        "prediction",  # only a hint for speed
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "stream",
        "stream_options",
        "user",
    }
)
"""Accepted, and named in the answer's `ignored`: none changes what is generated."""

NEUTRAL: Final[dict[str, tuple[object, ...]]] = {
    "best_of": (1,),
    "echo": (False,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True,),
    "suffix": ("",),
    "verbosity": ("medium",),
}
"""Fields that are accepted only with these values, which are OpenAI's defaults."""

OURS: Final = frozenset(
    {
        "abandon_after",
        "deadline",
        "idempotency_key",
        "kind",
        "lane",
        "max_attempts",
        "on_model_change",
        "result_ttl",
        "tenant",
        "timeout",
        "traceparent",
        "v",
    }
)
"""Fields of a job that the batch sets."""

_WRONG_PLACE: Final = {
    CHAT: ("prompt", f"goes with {COMPLETIONS}: give messages"),
    COMPLETIONS: ("messages", f"goes with {CHAT}: give a prompt"),
}


class BodyFields(NamedTuple):
    """What a body holds: a job's fields, names of ignored fields, and errors."""

    fields: dict[str, Any]
    ignored: tuple[str, ...]
    errors: list[FieldError]


def job_fields(body: dict[str, Any], url: str | None) -> BodyFields:
    """Read a body; `url` None takes messages or a prompt. Paths are relative to the body."""
    fields: dict[str, Any] = {}
    errors: list[FieldError] = []
    for name, value in body.items():
        if value is None or name in IGNORED:
            continue
        if name in NEUTRAL:
            if value not in NEUTRAL[name]:
                errors.append(FieldError(name, f"only {_spelled(NEUTRAL[name][0])} is supported"))
        elif name in OURS:
            errors.append(FieldError(name, "is set for the batch, not by a line"))
        elif url is not None and name == _WRONG_PLACE[url][0]:
            errors.append(FieldError(*_WRONG_PLACE[url]))
        else:
            fields[name] = value
    if url == COMPLETIONS:
        errors += _completions(fields)
    if isinstance(fields.get("messages"), list):
        fields["messages"] = [_without_nulls(message) for message in fields["messages"]]
    ignored = tuple(sorted(n for n in IGNORED & body.keys() if body[n] is not None))
    return BodyFields(fields, ignored, errors)


def _spelled(value: object) -> str:
    """Write a value as JSON does."""
    return {"True": "true", "False": "false"}.get(str(value), repr(value).replace("'", '"'))


def _without_nulls(message: object) -> object:
    """Drop the nulls and empty lists that SDKs write into a message.

    A null `content` is dropped too: a message with tool calls needs none.
    """
    if not isinstance(message, dict):
        return message
    empty = ("annotations", "tool_calls")
    return {
        name: value
        for name, value in message.items()
        if not (value is None or (name in empty and value == []))
    }


def _completions(fields: dict[str, Any]) -> list[FieldError]:
    """Settle in place what plain completions spell in another way than chat."""
    prompt = fields.get("prompt")
    if isinstance(prompt, list):
        if len(prompt) != 1 or not isinstance(prompt[0], str):
            return [FieldError("prompt", "one prompt a line: a string, or a list of one")]
        fields["prompt"] = prompt[0]
    count = fields.get("logprobs")
    if isinstance(count, int) and not isinstance(count, bool):
        fields |= {"logprobs": True, "top_logprobs": count}
    return []
