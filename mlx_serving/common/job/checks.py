"""Checks of a job that single fields can't express, each naming the field's path."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from mlx_serving.common import limits
from mlx_serving.common.errors import FieldError, InvalidJob, PayloadTooLarge
from mlx_serving.common.job.messages import message_problem
from mlx_serving.common.job.output_format import format_errors
from mlx_serving.common.validation import TOO_LARGE, pydantic_errors, rules_error

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pydantic import ValidationError

    from mlx_serving.common.job.schema import GenerationJob


class Unsupported(NamedTuple):
    """A field that the engine can't honour yet, the values that change nothing, and why."""

    field: str
    neutral: tuple[object, ...]
    reason: str


UNSUPPORTED: Final[tuple[Unsupported, ...]] = (
    Unsupported("kind", ("generate",), "only 'generate' is supported yet"),
    Unsupported("adapter", (None,), "adapters are not supported yet"),
)
"""Refused by name, never ignored. When the engine honours a field, remove its line here and
give the field its protocol number in `schema.FEATURE_PROTOCOL`."""


def check_job(job: GenerationJob) -> None:
    """Refuse what the fields say together, and what the engine can't do."""
    rules = (
        _source, _messages, _chat_only, format_errors, _amount, _listeners, _unsupported,
    )  # fmt: skip
    errors = [error for rule in rules for error in rule(job)]
    if errors:
        raise rules_error(errors)


def _source(job: GenerationJob) -> Iterator[FieldError]:
    if job.messages is None and job.prompt is None:
        yield FieldError("messages", "give messages or a prompt")
    elif job.messages is not None and job.prompt is not None:
        yield FieldError("prompt", "give messages or a prompt, not both")


def _messages(job: GenerationJob) -> Iterator[FieldError]:
    for index, message in enumerate(job.messages or ()):
        problem = message_problem(message)
        if problem:
            yield FieldError(f"messages[{index}].{problem[0]}", problem[1])


def _chat_only(job: GenerationJob) -> Iterator[FieldError]:
    """A prompt goes to the model as it is, so what the chat template would render is refused."""
    if job.prompt is not None:
        for field in ("tools", "tool_choice", "chat_template_kwargs"):
            if getattr(job, field) is not None:
                yield FieldError(field, "needs messages: a prompt passes no chat template")


def _amount(job: GenerationJob) -> Iterator[FieldError]:
    """Bound what one job may ask for in all, and what its result may come to."""
    most = f"more than {limits.TOKENS} tokens"
    if job.n * job.max_tokens > limits.TOKENS:
        yield FieldError("n", f"{job.n} choices of max_tokens {job.max_tokens} are {most}")
    elif job.top_logprobs and not job.logprobs:
        yield FieldError("top_logprobs", "needs logprobs: true")
    elif job.n * job.max_tokens * (1 + (job.top_logprobs or 0)) > limits.TOKENS:
        reason = f"{job.top_logprobs} alternatives at {job.n} x {job.max_tokens} places are {most}"
        yield FieldError("top_logprobs", reason)


def _listeners(job: GenerationJob) -> Iterator[FieldError]:
    if job.abandon_after is not None and not job.stream:
        yield FieldError("abandon_after", "needs stream: true, whose listeners it counts")


def _unsupported(job: GenerationJob) -> Iterator[FieldError]:
    for field, neutral, reason in UNSUPPORTED:
        if getattr(job, field) not in neutral:
            yield FieldError(field, reason)


def invalid_job(error: ValidationError) -> InvalidJob:
    """Our error from pydantic's: paths as `messages[2].content`, never the value itself."""
    errors = pydantic_errors(error)
    too_large = TOO_LARGE.partition("{")[0]
    if any(reason.startswith(too_large) for _, reason in errors):
        return PayloadTooLarge(errors)
    return InvalidJob(errors)
