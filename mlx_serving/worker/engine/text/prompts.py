"""From a job's messages or prompt to token ids, by the model's chat template and tokenizer."""

from typing import Any, Final

from jinja2 import TemplateError

from mlx_serving.common.errors import FieldError, InvalidJob
from mlx_serving.common.job.schema import GenerationJob

# Parameters of apply_chat_template itself: a job that set one would change what is rendered (even
# the template, a Jinja program) or the type of the result.
RESERVED_TEMPLATE_KWARGS: Final = frozenset(
    {
        "chat_template",
        "conversation",
        "documents",
        "max_length",
        "messages",
        "padding",
        "processor_kwargs",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    }
)


class PromptEncoder:
    """Renders and tokenizes prompts of one model."""

    def __init__(self, tokenizer: Any) -> None:  # noqa: ANN401 - the wrapper forwards by getattr
        """Take mlx-lm's TokenizerWrapper."""
        self._tokenizer = tokenizer
        template = getattr(tokenizer, "chat_template", None)
        self._knows_developer = "developer" in str(template or "")

    def encode(self, job: GenerationJob) -> tuple[int, ...]:
        """Return the token ids that the model is to continue.

        Raises:
            InvalidJob: the model can't take this prompt; it names "messages", "prompt" or
                "chat_template_kwargs.<name>".
        """
        if job.prompt is not None:
            tokens, field = self._tokenizer.encode(job.prompt), "prompt"
        else:
            tokens, field = self._render(job), "messages"
        if not tokens:
            raise InvalidJob([FieldError(field, "gives no token")])
        return tuple(tokens)

    def _render(self, job: GenerationJob) -> list[int]:
        if not self._tokenizer.has_chat_template:
            reason = "the model has no chat template; use prompt instead"
            raise InvalidJob([FieldError("messages", reason)])
        kwargs = {"add_generation_prompt": True, **(job.chat_template_kwargs or {})}
        reserved = sorted(RESERVED_TEMPLATE_KWARGS & kwargs.keys())
        if reserved:
            reason = "is set by the server"
            raise InvalidJob([FieldError(f"chat_template_kwargs.{n}", reason) for n in reserved])
        messages = [self._message(message) for message in job.template_messages()]
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tools=job.template_tools(), tokenize=False, **kwargs
            )
        except TemplateError as error:  # the template's own message, written to be read
            raise InvalidJob([FieldError("messages", f"chat template: {error}")]) from None
        except Exception as error:
            reason = f"the chat template raised {type(error).__name__}"
            raise InvalidJob([FieldError("messages", reason)]) from error
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def _message(self, message: dict[str, Any]) -> dict[str, Any]:
        """Rename the role "developer" to "system" if the template does not know it."""
        if message["role"] != "developer" or self._knows_developer:
            return message
        return {**message, "role": "system"}
