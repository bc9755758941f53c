"""The events of a job, as its stream and channel carry them. Frozen from the first release.

`seq` counts a job's events 1, 2, 3… over all choices and attempts. Types:

* `attempt` opens each attempt: who runs it (`worker`, `model`, `model_revision`,
  `tokenizer_hash`) and the seq it starts at (`start_seq`, its own).
* `tokens` carries the newly decoded tokens of one or more choices.
* `end` is the last event, exactly one a job: the terminal `state`, `usage`, `error`.
* `reset` takes back everything before it: the tokens of every choice are void, and the job begins
  anew. A job with `on_model_change: "reset"` may have one in its stream. A reader makes one itself,
  with seq 0, if Redis lost what it has delivered: the job's events then come from the first on.

`tag` tells who wrote an event. Redis may forget events, and a later attempt then writes others
under the same numbers, perhaps with the same `attempt`; its tag is another one (`Attempt.tag`). So
seq and tag together name one event and all before it: a cursor (`Event.cursor`).

Readers ignore fields and types that they don't know; writers omit what is absent.
"""

from __future__ import annotations

import builtins
import re
from typing import Final, NamedTuple

import msgspec

from mlx_serving.common.errors import CorruptEvent
from mlx_serving.common.protocol.fields import EVENT_OPENING

EVENT_VERSION: Final = 1
ATTEMPT: Final = "attempt"
TOKENS: Final = "tokens"
END: Final = "end"
RESET: Final = "reset"
KNOWN_TYPES: Final = frozenset({ATTEMPT, TOKENS, END, RESET})


def event_version() -> int:
    """Version of the schema; a factory, because msgspec omits plain defaults when it encodes."""
    return EVENT_VERSION


class Cursor(NamedTuple):
    """A reader's place in a job's stream: the last event that it has, written "<seq>-<tag>"."""

    seq: int
    tag: str

    def __str__(self) -> str:
        """As `Event.cursor` gives it and `parse` reads it."""
        return f"{self.seq}-{self.tag}" if self.seq else ""

    @classmethod
    def parse(cls, text: object, field: str) -> Cursor:
        """Read a cursor that a caller gave as `field`; '' is the beginning.

        Raises:
            TypeError: it is not a string. A plain seq does not say whose event it counts.
            ValueError: it is a string that no event gave.

        """
        if not isinstance(text, str):
            kind = type(text).__name__
            raise TypeError(f"{field}: must be an event's cursor, a string, not {kind}")
        if not text:
            return BEGINNING
        found = _CURSOR.fullmatch(text)
        if found is None:
            form = "must be an event's cursor (as 17-5f0c21d9), or '' for the beginning"
            raise ValueError(f"{field}: {form}, not {text[:40]!r}")
        return cls(int(found[1]), found[2])


BEGINNING: Final = Cursor(0, "")
_CURSOR: Final = re.compile(r"([1-9][0-9]{0,14})-([0-9a-f]{8})")  # 8: TAG_CHARS


class TopLogprob(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """A token and its log probability, in the words of the OpenAI chat API.

    `logprob` is natural, of the model's own distribution; -9999.0 stands for a probability of 0.
    `bytes` is None if it would be the UTF-8 of `token`. A token that is only a part of a
    character shows as U+FFFD in `token`, and its `bytes` are given.
    """

    token: str
    logprob: float
    bytes: list[int] | None = None

    @property
    def raw(self) -> builtins.bytes:
        """Bytes of the token, given or not."""
        return self.token.encode() if self.bytes is None else builtins.bytes(self.bytes)


class TokenLogprob(TopLogprob, frozen=True, omit_defaults=True, gc=False):
    """The chosen token at one position, and the likeliest tokens there, likeliest first."""

    top_logprobs: list[TopLogprob] = []


class ChoiceLogprobs(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """Log probabilities of a delta's tokens: one entry for each of its `token_ids`."""

    content: list[TokenLogprob] = []


class FunctionDelta(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """A part of a call: the function's name once, its arguments as pieces of a JSON text."""

    name: str | None = None
    arguments: str = ""


class ToolCallDelta(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """A part of a tool call, in the words of the OpenAI chat API.

    `index` counts the calls of a choice from 0. Parts of one index belong together: id, type and
    name come with the first, arguments are joined. Today's writers send each call whole.
    """

    index: int
    id: str | None = None
    type: str | None = None
    function: FunctionDelta | None = None


class ChoiceDelta(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """What one choice gained.

    `token_ids` has every decoded token (also the end-of-sequence token); `text` is what the
    detokenizer has released so far, so one may be empty while the other is not. Reasoning and
    tool calls are in `reasoning` and `tool_calls`, not in `text`.
    """

    index: int
    text: str = ""
    token_ids: list[int] = []
    logprobs: ChoiceLogprobs | None = None
    tool_calls: list[ToolCallDelta] | None = None
    reasoning: str | None = None
    finish_reason: str | None = None


class PromptTokensDetails(msgspec.Struct, frozen=True, gc=False):
    """How many of the prompt's tokens came from the prefix cache."""

    cached_tokens: int = 0


class Usage(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """Token counts of a job, over all its choices and attempts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None

    @classmethod
    def of(cls, prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0) -> Usage:
        """Build with the total added up; with details only if the prefix cache served any."""
        details = PromptTokensDetails(cached_tokens) if cached_tokens else None
        return cls(prompt_tokens, completion_tokens, prompt_tokens + completion_tokens, details)


class ErrorInfo(msgspec.Struct, frozen=True, gc=False):
    """Why a job did not finish: a stable code, a sentence, and whether to try again may help."""

    code: str
    message: str
    retryable: bool = False


class Event(msgspec.Struct, frozen=True, omit_defaults=True, gc=False, kw_only=True):
    """One event; which of the optional fields it has depends on `type`."""

    v: int = msgspec.field(default_factory=event_version)
    attempt: int
    tag: str = msgspec.field(default_factory=str)
    seq: int
    type: str
    choices: list[ChoiceDelta] = []
    usage: Usage | None = None
    # "attempt"
    start_seq: int | None = None
    worker: str | None = None
    model: str | None = None
    model_revision: str | None = None
    tokenizer_hash: str | None = None
    # "end"
    state: str | None = None
    error: ErrorInfo | None = None

    @property
    def cursor(self) -> str:
        """Where to go on after this event, at any reader; '' for a reset that a reader made."""
        return str(Cursor(self.seq, self.tag))

    @property
    def text(self) -> str:
        """Text that choice 0 gained by this event."""
        return "".join(choice.text for choice in self.choices if choice.index == 0)

    @property
    def has_tokens(self) -> bool:
        """Whether any choice gained a token."""
        return any(choice.token_ids for choice in self.choices)


class _Header(msgspec.Struct, frozen=True, gc=False):
    """The part of an event that every version shares."""

    v: int
    attempt: int
    seq: int
    type: str
    tag: str = ""


_OPENING: Final = EVENT_OPENING.encode()
_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Event)
_header_decoder = msgspec.json.Decoder(_Header)


def encode(event: Event) -> bytes:
    """Compact JSON of an event, absent fields omitted."""
    return _encoder.encode(event)


def opening(attempt: bytes, tag: bytes, seq: bytes) -> bytes:
    """How the JSON of every event begins, from its numbers as decimal text and its tag."""
    return _OPENING % (attempt, tag, seq)


def body(event: Event) -> bytes:
    """JSON of an event without its opening, which its row and its entry say by other means."""
    return encode(event)[len(EVENT_OPENING % (event.attempt, event.tag, event.seq)) :]


def decode(data: bytes) -> Event:
    """Parse an event; if its type is unknown, only the header has to be readable.

    Raises CorruptEvent if that is not so.
    """
    try:
        return _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return _decode_header(data, error)


def _decode_header(data: bytes, cause: Exception) -> Event:
    """Read only the header: a newer release may give its types' fields another form."""
    try:
        header = _header_decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptEvent(_reason(error)) from None
    if header.type in KNOWN_TYPES:
        raise CorruptEvent(_reason(cause)) from None
    return Event(
        v=header.v, attempt=header.attempt, tag=header.tag, seq=header.seq, type=header.type
    )


def _reason(error: Exception) -> str:
    # UnicodeDecodeError's own text holds the bytes, which may be a prompt's.
    if isinstance(error, UnicodeDecodeError):
        return "event is not UTF-8"
    return f"event can't be read: {error}"


def attempt_event(
    *,
    attempt: int,
    tag: str = "",
    seq: int,
    worker: str,
    model: str,
    model_revision: str,
    tokenizer_hash: str,
) -> Event:
    """Build the event that opens an attempt."""
    return Event(
        attempt=attempt,
        tag=tag,
        seq=seq,
        type=ATTEMPT,
        start_seq=seq,
        worker=worker,
        model=model,
        model_revision=model_revision,
        tokenizer_hash=tokenizer_hash,
    )


def tokens_event(*, attempt: int, tag: str = "", seq: int, choices: list[ChoiceDelta]) -> Event:
    """Build the event of newly decoded tokens."""
    return Event(attempt=attempt, tag=tag, seq=seq, type=TOKENS, choices=choices)


def reset_event(*, attempt: int = 0, tag: str = "", seq: int = 0) -> Event:
    """Build the event that takes back all tokens before it; without numbers, a reader's own."""
    return Event(attempt=attempt, tag=tag, seq=seq, type=RESET)


def end_event(
    *,
    attempt: int,
    tag: str = "",
    seq: int,
    state: str,
    usage: Usage | None = None,
    error: ErrorInfo | None = None,
) -> Event:
    """Build the terminal event."""
    return Event(attempt=attempt, tag=tag, seq=seq, type=END, state=state, usage=usage, error=error)
