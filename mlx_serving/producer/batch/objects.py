"""The OpenAI Batch objects: the batch itself, its counts, its errors.

Field for field those of the `openai` package's types; tests parse them with these. Times are
seconds since the epoch by the runner's clock.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

BatchStatus = Literal[
    "validating",
    "failed",
    "in_progress",
    "finalizing",
    "completed",
    "expired",
    "cancelling",
    "cancelled",
]
ENDED: Final[frozenset[str]] = frozenset({"failed", "completed", "expired", "cancelled"})

CHAT: Final = "/v1/chat/completions"
COMPLETIONS: Final = "/v1/completions"
ENDPOINTS: Final = (CHAT, COMPLETIONS)

NAMED_ERRORS: Final = 100
"""Most line errors that the batch object lists; the error file has all of them."""


class LineError(msgspec.Struct, frozen=True, kw_only=True):
    """What is wrong with a line: `param` is the field's path, `line` counts from 1."""

    code: str
    message: str
    param: str | None = None
    line: int | None = None


class ErrorList(msgspec.Struct):
    """The errors of a batch, at most `NAMED_ERRORS` of them."""

    data: list[LineError] = []
    object: str = "list"


class RequestCounts(msgspec.Struct):
    """How many lines there are, how many have finished and how many have failed."""

    total: int = 0
    completed: int = 0
    failed: int = 0

    @property
    def open(self) -> int:
        """Lines that have not ended."""
        return self.total - self.completed - self.failed


class InputDetails(msgspec.Struct):
    """Prompt tokens that came from a prefix cache."""

    cached_tokens: int = 0


class OutputDetails(msgspec.Struct):
    """OpenAI's type has it; reasoning tokens are not counted separately."""

    reasoning_tokens: int = 0


class BatchUsage(msgspec.Struct):
    """Tokens of all lines that finished."""

    input_tokens: int = 0
    output_tokens: int = 0
    total_tokens: int = 0
    input_tokens_details: InputDetails = msgspec.field(default_factory=InputDetails)
    output_tokens_details: OutputDetails = msgspec.field(default_factory=OutputDetails)

    def add(self, prompt: int, completion: int, cached: int) -> None:
        """Add the tokens of one answer."""
        self.input_tokens += prompt
        self.output_tokens += completion
        self.total_tokens += prompt + completion
        self.input_tokens_details.cached_tokens += cached


class Batch(msgspec.Struct, kw_only=True):
    """A batch, as `openai.types.Batch` describes it; file ids are paths."""

    id: str
    object: str = "batch"
    endpoint: str = CHAT
    errors: ErrorList | None = None
    input_file_id: str
    completion_window: str = "24h"
    status: BatchStatus = "validating"
    output_file_id: str | None = None
    error_file_id: str | None = None
    model: str | None = None
    created_at: int
    in_progress_at: int | None = None
    expires_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts = msgspec.field(default_factory=RequestCounts)
    usage: BatchUsage = msgspec.field(default_factory=BatchUsage)
    metadata: dict[str, str] | None = None

    @property
    def ended(self) -> bool:
        """Whether it is over, in any way."""
        return self.status in ENDED

    def move(self, status: BatchStatus, now_s: float) -> None:
        """Set the status, and the time in the status's field if it has one that is not set."""
        self.status = status
        field = f"{status}_at"
        if getattr(self, field, 0) is None:
            setattr(self, field, int(now_s))
