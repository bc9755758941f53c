"""The job: one text generation, validated at submit, in the words of the OpenAI chat API.

Every parameter is honoured or refused with its path and the reason. On the wire defaults are
left out, so the defaults of released fields never change (golden fixtures hold them).
"""

from __future__ import annotations

import hashlib
import uuid
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    AliasChoices,
    BaseModel,
    Field,
    JsonValue,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from mlx_serving.common import limits
from mlx_serving.common.errors import CorruptJob, FieldError, InvalidJob
from mlx_serving.common.job.checks import (
    chat_only_errors,
    invalid_job,
    listener_errors,
    size_errors,
    source_errors,
    unsupported_errors,
)
from mlx_serving.common.job.messages import STRICT, Message, Tool
from mlx_serving.common.job.output_format import TEXT, format_errors
from mlx_serving.common.queues import PROTOCOL, Lane, queue_name
from mlx_serving.common.validation import check_data, rules_error

JOB_FUNCTION: Final = "mlx_serving.worker.task.generate"
"""The one function that our RQ jobs name; producers never import it."""

FEATURE_PROTOCOL: Final[dict[str, int]] = {}
"""Fields that only workers of a later protocol than 1 honour, with that protocol. None yet."""

# A model's name is a part of queue names and keys: no ':', no braces, no blanks.
ModelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,127}$")]
Seconds = Annotated[float, Field(gt=0, le=limits.SECONDS)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
TokenId = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,9})$")]
Bias = Annotated[float, Field(ge=-limits.LOGIT_BIAS, le=limits.LOGIT_BIAS)]
StopString = Annotated[str, Field(min_length=1, max_length=limits.STOP_CHARS)]
Label = Annotated[str, Field(pattern=limits.LABEL)]
MetadataKey = Annotated[str, Field(min_length=1, max_length=limits.METADATA_KEY_CHARS)]
MetadataValue = Annotated[str, Field(max_length=limits.METADATA_VALUE_CHARS)]


MODEST: Final[dict[str, Any]] = {}
"""Validation context of data that is too small for `check_data` to find anything."""


class GenerationJob(BaseModel):
    """One text generation. Fields that are None, absent or null take their stated default.

    `build` and `parse` raise InvalidJob; the constructor itself raises pydantic's own error, as
    any pydantic model does.
    """

    model_config = STRICT

    v: Literal[1] = Field(default=1, description="version of the job's form")
    kind: str = Field(default="generate", description="what to do: only `generate` yet")

    # What to generate from: one of the two
    model: ModelName = Field(description="alias of the model, as the workers' settings name it")
    messages: (
        Annotated[
            tuple[Message, ...],
            Field(strict=False, min_length=1, max_length=limits.MESSAGES),
        ]
        | None
    ) = Field(
        default=None,
        repr=False,  # a job that is printed shows nothing of what it says
        description="the conversation, which the model's chat template renders: each with `role` "
        "(system, developer, user, assistant, tool) and `content` (text, or text parts)",
    )
    prompt: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        repr=False,
        description="text that goes to the model as it is, instead of messages",
    )
    tools: Annotated[tuple[Tool, ...], Field(strict=False, max_length=limits.TOOLS)] | None = Field(
        default=None,
        description="functions that the model may call; those with `strict: true` are called with "
        "arguments that follow their schema",
    )
    tool_choice: JsonValue = Field(
        default=None,
        description='`auto` (the default), `none`, `required`, or `{"type": "function", '
        '"function": {"name": ...}}`: a call is then forced, in any format that mlx-lm knows',
    )
    chat_template_kwargs: dict[str, JsonValue] | None = Field(
        default=None, description="more variables for the chat template, as `enable_thinking`"
    )
    adapter: str | None = Field(default=None, description="a LoRA adapter: refused yet")

    # How much
    max_tokens: int = Field(
        default=256,
        ge=1,
        le=limits.TOKENS,
        validation_alias=AliasChoices("max_tokens", "max_completion_tokens"),
        description="most tokens of each choice, with the prompt within the model's context; the "
        "engine keeps room for all of them",
    )
    stop: Annotated[tuple[StopString, ...], Field(max_length=limits.STOP_STRINGS)] = Field(
        default=(),
        strict=False,
        description="a text or several that end a choice; none of them is in the result",
    )
    n: int = Field(
        default=1, ge=1, le=limits.CHOICES, description="choices, one row of the batch each"
    )

    # Sampling
    temperature: float = Field(
        default=1.0, ge=0, le=2, description="what logits are divided by; 0 takes the likeliest"
    )
    top_p: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="only the likeliest tokens that together have this probability",
    )
    top_k: int = Field(
        default=0, ge=0, le=2**31 - 1, description="only so many of the likeliest tokens; 0 is off"
    )
    min_p: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="only tokens with at least this part of the likeliest one's probability",
    )
    seed: int | None = Field(
        default=None,
        ge=0,
        lt=limits.SEED,
        description="of the random numbers: the same job with the same seed gives the same "
        "tokens, where logits are the same; drawn at submit when None",
    )
    repetition_penalty: float = Field(
        default=1.0,
        gt=0,
        le=10,
        description="divides positive logits of tokens of prompt and completion, multiplies "
        "negative ones; 1 is off",
    )
    presence_penalty: Penalty = Field(
        default=0.0, description="taken off the logits of tokens that the completion has"
    )
    frequency_penalty: Penalty = Field(
        default=0.0, description="the same, times how often the completion has the token"
    )
    logit_bias: Annotated[dict[TokenId, Bias], Field(max_length=limits.LOGIT_BIASES)] | None = (
        Field(default=None, description="added to logits, by token id as decimal text")
    )
    logprobs: bool = Field(
        default=False,
        description="the log probability of each token, in the model's own distribution",
    )
    top_logprobs: Annotated[int, Field(ge=0, le=limits.TOP_LOGPROBS)] | None = Field(
        default=None, description="how many of the likeliest tokens to tell at each place"
    )
    response_format: dict[str, JsonValue] | None = Field(
        default=None,
        description="what the text has to be, by `type`: `text`, `json_object`, `json_schema`, "
        "`regex`, `grammar` (llguidance's Lark dialect)",
    )

    # How the queue treats it; times in seconds
    lane: Lane = Field(
        default="default", description="which queue of the model: claimed in this order"
    )
    stream: bool = Field(
        default=True,
        description="publish events as they come; without it they are committed every 16 tokens "
        "or 500 ms, and no tokens are published",
    )
    deadline: Seconds | None = Field(
        default=None, description="seconds from enqueue, by Redis TIME, to its end"
    )
    timeout: Seconds | None = Field(
        default=None, description="seconds from the first claim to its end"
    )
    abandon_after: Seconds | None = Field(
        default=None, description="seconds without a listener that end it"
    )
    result_ttl: int = Field(
        default=3600,
        ge=1,
        le=limits.SECONDS,
        description="seconds that result and events are kept after its end",
    )
    max_attempts: int = Field(
        default=2,
        ge=1,
        le=limits.ATTEMPTS,
        description="crashes of the engine that it may be charged with before it is `dead`",
    )
    on_model_change: Literal["fail", "reset"] = Field(
        default="fail",
        description="what becomes of a job that has tokens of another revision of the model: it "
        "fails (`model_changed`), or begins anew after a `reset` event",
    )
    idempotency_key: Label | None = Field(
        default=None,
        description="jobs of a tenant with one key are one job, enqueued once, until its "
        "`result_ttl` is over; with another payload the key is refused",
    )
    tenant: Label | None = Field(
        default=None,
        description="on whose behalf: tenants share no prefix cache and no idempotency keys",
    )
    metadata: Annotated[
        dict[MetadataKey, MetadataValue], Field(max_length=limits.METADATA_ITEMS)
    ] = Field(
        default_factory=dict,
        description="kept with the job in Redis; no worker looks at it, no log shows it",
    )
    traceparent: (
        Annotated[str, Field(pattern=r"^00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}$")] | None
    ) = Field(
        default=None, description="W3C trace context; its trace id is in the worker's log records"
    )

    @model_validator(mode="before")
    @classmethod
    def _before(cls, data: Any, info: ValidationInfo) -> Any:  # noqa: ANN401 -- anything may come in
        if info.context is not MODEST:
            check_data(data)
        return _plain_fields(data) if isinstance(data, dict) else data

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop_string(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _after(self) -> Self:
        fields = self.__dict__
        errors = [
            *source_errors(self.messages, self.prompt),
            *chat_only_errors(fields),
            *format_errors(self.response_format, self.tools, self.tool_choice),
            *size_errors(self.n, self.max_tokens, self.top_logprobs, logprobs=self.logprobs),
            *listener_errors(self.abandon_after, stream=self.stream),
            *unsupported_errors(fields),
        ]
        if errors:
            raise rules_error(errors)
        return self

    @classmethod
    def build(cls, **fields: Any) -> Self:
        """Build from keywords. Raises InvalidJob with each wrong field's path."""
        return cls.parse(fields)

    @classmethod
    def parse(cls, data: object, *, modest: bool = False) -> Self:
        """Build from plain data, as JSON gives it. Raises InvalidJob with each wrong path.

        `modest`: msgspec parsed it from JSON text for which `validation.is_modest` is true.
        """
        try:
            return cls.model_validate(data, context=MODEST if modest else None)
        except ValidationError as error:
            raise invalid_job(error) from None

    @classmethod
    def from_wire(cls, wire: object, *, modest: bool = False) -> Self:
        """Read what a producer sent. Raises CorruptJob if not an object, InvalidJob if wrong.

        A worker checks everything again: not only our producers can write to Redis. `modest` as in
        `parse`.
        """
        if not isinstance(wire, dict):
            raise CorruptJob("the job's payload is not an object")
        needed = wire.get("min_protocol", 1)
        if type(needed) is not int or not 1 <= needed <= PROTOCOL:
            reason = f"is not a protocol from 1 to {PROTOCOL}, which this worker speaks"
            raise InvalidJob([FieldError("min_protocol", reason)])
        fields = wire.copy()
        fields.pop("min_protocol", None)
        return cls.parse(fields, modest=modest)

    def to_wire(self) -> dict[str, Any]:
        """Plain JSON data without defaults: what the RQ job carries."""
        fields = self.model_dump(mode="json", exclude_defaults=True)
        return {"v": self.v, "min_protocol": self.min_protocol, **fields}

    def job_id(self) -> str:
        """32 hex digits: the same for the same tenant and idempotency key, else new each time."""
        if self.idempotency_key is None:
            return uuid.uuid4().hex
        name = f"{self.tenant or ''}\0{self.idempotency_key}"
        return hashlib.sha256(name.encode()).hexdigest()[:32]

    @property
    def min_protocol(self) -> int:
        """Oldest protocol whose workers honour every field that this job sets."""
        needs = (protocol for field, protocol in FEATURE_PROTOCOL.items() if self._asks(field))
        return max(needs, default=1)

    def _asks(self, field: str) -> bool:
        """Whether a field has a value that changes anything: {} and 0 mean the same as None."""
        value, default = getattr(self, field), type(self).model_fields[field].default
        return bool(value != default and (value or default))

    @property
    def queue(self) -> str:
        """Name of its RQ queue."""
        return queue_name(self.model, self.lane)

    def template_messages(self) -> list[dict[str, Any]]:
        """Messages as chat templates expect them; empty if the job has a prompt."""
        return [message.for_template() for message in self.messages or ()]

    def template_tools(self) -> list[dict[str, Any]] | None:
        """Tools for the chat template; None if there are none or tool_choice is "none"."""
        if not self.tools or self.tool_choice == "none":
            return None
        return [tool.model_dump(mode="json", exclude_none=True) for tool in self.tools]


def _plain_fields(data: dict[Any, Any]) -> dict[Any, Any]:
    """Drop null fields, as the OpenAI API does; check that max_tokens agrees with its alias."""
    fields = {key: value for key, value in data.items() if value is not None}
    if fields.get("response_format") == TEXT:  # the default, spelled out
        del fields["response_format"]
    if "max_tokens" in fields and "max_completion_tokens" in fields:
        if fields["max_tokens"] != fields["max_completion_tokens"]:
            reason = "is an alias of max_tokens, which has another value"
            raise rules_error([FieldError("max_completion_tokens", reason)])
        del fields["max_completion_tokens"]
    return fields
