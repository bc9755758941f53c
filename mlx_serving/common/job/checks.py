"""Checks of a job that single fields can't express, each naming the field's path."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from mlx_serving.common import limits
from mlx_serving.common.errors import FieldError, InvalidJob, PayloadTooLarge
from mlx_serving.common.job.messages import message_problem
from mlx_serving.common.validation import TOO_LARGE, pydantic_errors

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pydantic import ValidationError

    from mlx_serving.common.job.messages import Message


class Unsupported(NamedTuple):
    """A field that the engine can't honour yet, the values that change nothing, and why."""

    field: str
    neutral: tuple[object, ...]
    reason: str


UNSUPPORTED: Final[tuple[Unsupported, ...]] = (
    Unsupported("kind", ("generate",), "only 'generate' is supported yet"),
    Unsupported("adapter", (None,), "adapters are not supported yet"),
)
"""Refused by name, never ignored. When the engine honours a field, remove its line here and give
the field its protocol number in `schema.FEATURE_PROTOCOL`."""


def source_errors(messages: Sequence[Message] | None, prompt: str | None) -> Iterator[FieldError]:
    """Check that there is one of messages and prompt, and that messages fit their roles."""
    if messages is None and prompt is None:
        yield FieldError("messages", "give messages or a prompt")
    elif messages is not None and prompt is not None:
        yield FieldError("prompt", "give messages or a prompt, not both")
    for index, message in enumerate(messages or ()):
        problem = message_problem(message)
        if problem:
            yield FieldError(f"messages[{index}].{problem[0]}", problem[1])


def chat_only_errors(fields: Mapping[str, Any]) -> Iterator[FieldError]:
    """Refuse what the chat template would render: a prompt goes to the model as it is."""
    if fields["prompt"] is not None:
        for field in ("tools", "tool_choice", "chat_template_kwargs"):
            if fields[field] is not None:
                yield FieldError(field, "needs messages: a prompt passes no chat template")


def size_errors(
    n: int, max_tokens: int, top_logprobs: int | None, *, logprobs: bool
) -> Iterator[FieldError]:
    """Bound what one job may ask for in all, and the size of its result."""
    most = f"more than {limits.TOKENS} tokens"
    if n * max_tokens > limits.TOKENS:
        yield FieldError("n", f"{n} choices of max_tokens {max_tokens} are {most}")
    elif top_logprobs and not logprobs:
        yield FieldError("top_logprobs", "needs logprobs: true")
    elif n * max_tokens * (1 + (top_logprobs or 0)) > limits.TOKENS:
        reason = f"{top_logprobs} alternatives at {n} x {max_tokens} positions are {most}"
        yield FieldError("top_logprobs", reason)


def listener_errors(abandon_after: float | None, *, stream: bool) -> Iterator[FieldError]:
    """Refuse a job that ends without listeners but publishes no tokens to listen to."""
    if abandon_after is not None and not stream:
        yield FieldError("abandon_after", "needs stream: true, whose listeners it counts")


def unsupported_errors(fields: Mapping[str, Any]) -> Iterator[FieldError]:
    """Refuse what the engine can't do yet."""
    for field, neutral, reason in UNSUPPORTED:
        if fields[field] not in neutral:
            yield FieldError(field, reason)


def invalid_job(error: ValidationError) -> InvalidJob:
    """Our error from pydantic's: paths as `messages[2].content`, never the value itself."""
    errors = pydantic_errors(error)
    too_large = TOO_LARGE.partition("{")[0]
    if any(reason.startswith(too_large) for _, reason in errors):
        return PayloadTooLarge(errors)
    return InvalidJob(errors)
