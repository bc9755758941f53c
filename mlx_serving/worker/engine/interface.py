"""What goes into an engine and what comes out of it. Imports neither mlx nor redis."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from msgspec import Struct

from mlx_serving.common.queues import LANES, Lane

if TYPE_CHECKING:
    from mlx_serving.worker.engine.memory.kv_caches import KvMemory

FINISH_STOP: Final = "stop"
FINISH_LENGTH: Final = "length"
FINISH_ERROR: Final = "error"
FINISH_TOOL_CALLS: Final = "tool_calls"

_RANKS: Final = {lane: rank for rank, lane in enumerate(LANES)}


INVALID_TOKEN: Final = -1  # sampled from logits with NaN or +inf, or with nothing but -inf


class SamplingParams(Struct, frozen=True):
    """How one row's tokens are chosen; on the device, every field is an element of an array.

    `temperature` 0 is greedy (the other filters then change nothing). `top_p` in (0, 1], 1 is
    off. `top_k` 0 is off. `min_p` in [0, 1], 0 is off. `seed` in [0, 2**64).

    `repetition_penalty` > 0, 1 is off: the logits of tokens that occur in the prompt or in the
    completion are divided by it if positive, multiplied if negative (CTRL, Keskar et al. 2019).
    `presence_penalty` and `frequency_penalty` in [-2, 2], 0 is off: subtracted from the logit of
    a token that occurs in the completion, once and for each occurrence (OpenAI). `logit_bias`
    adds to the logits of these token ids. `logprobs` None: none are reported; k: those of the
    chosen token and of the k likeliest tokens, of the model's own distribution, before any of the
    above.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None

    @property
    def penalised(self) -> bool:
        """Whether earlier tokens of the row change its logits."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return penalties != (1.0, 0.0, 0.0)


class TokenMatcher(Protocol):
    """One row's position in its grammar."""

    def advance(self, token: int) -> None:
        """Take the token that was sampled for the row."""

    def replay(self, tokens: Iterable[int]) -> None:
        """Take the tokens that earlier attempts decoded."""

    @property
    def ended(self) -> bool:
        """Whether the grammar is satisfied and only the end can follow."""

    @property
    def failure(self) -> str | None:
        """Why the grammar can't be followed any further; None if it can."""


class Grammar(Protocol):
    """A compiled grammar, which a row's text has to follow."""

    def start(self) -> TokenMatcher:
        """Return a new row's position: the start."""


@dataclass(frozen=True, slots=True)
class ParsedToolCall:
    """A call that the model wrote; `arguments` is a JSON object as text, `index` counts from 0.

    A call that was just read has index 0, and id "" if the model gave none; the row's parser then
    numbers it and gives it an id, so that every call of an `Output` has both.
    """

    index: int
    id: str
    name: str
    arguments: str


@dataclass(slots=True)
class Parts:
    """A piece of a row's text, split into its parts, without the markers between them."""

    text: str = ""
    reasoning: str = ""
    tool_calls: list[ParsedToolCall] = field(default_factory=list)

    def __add__(self, other: "Parts") -> "Parts":
        return Parts(
            self.text + other.text,
            self.reasoning + other.reasoning,
            [*self.tool_calls, *other.tool_calls],
        )


class OutputParser(Protocol):
    """Splits one row's text into text, reasoning and tool calls, piece by piece."""

    @property
    def called(self) -> bool:
        """Whether a tool call was read."""

    def push(self, text: str) -> Parts:
        """Take the row's next text; an end that may still become a marker is kept back."""

    def finish(self, *, whole: bool) -> Parts:
        """Release what was kept back; `whole`: the model ended the text, not a limit."""


class OutputFormat(Protocol):
    """How one request's text is to be read."""

    def open(self, request_id: str, choice: int) -> OutputParser:
        """Return a parser for a new row; ids of calls are derived from both arguments."""


class RequestChoice(Struct, frozen=True):
    """One completion of a request: a row of the batch decodes it.

    `committed` are tokens that earlier attempts decoded (resume): they are prefilled after the
    prompt, are not emitted again, and count towards `max_tokens`.
    """

    index: int = 0
    committed: tuple[int, ...] = ()


class Request(Struct, frozen=True):
    """A prompt and the choices to decode from it, all parameters resolved.

    `choices` are admitted together or not at all; they may be some of the job's. `max_tokens`
    bounds each of them. `grammar` None: any text. `format` None: all of the text is text. `salt`:
    the rows share cached prefixes only with requests of the same salt. `model`: the alias of the
    model that decodes the request, if an `EngineSet` has several.
    """

    id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    max_tokens: int
    stop: tuple[str, ...] = ()
    choices: tuple[RequestChoice, ...] = (RequestChoice(),)
    grammar: Grammar | None = None
    format: OutputFormat | None = None
    salt: str = ""
    lane: Lane = "default"
    model: str = ""

    @property
    def rank(self) -> int:
        """Place of its lane: 0 is the highest lane."""
        return _RANKS[self.lane]

    @property
    def kv_tokens(self) -> list[int]:
        """The most KV-cache tokens that the row of each choice can hold: prompt + max_tokens."""
        return [self.kv_tokens_of(choice) for choice in self.choices]

    def kv_tokens_of(self, choice: RequestChoice) -> int:
        """Return the most KV-cache tokens that the choice's row can hold."""
        return len(self.prompt) + max(self.max_tokens, len(choice.committed))

    @property
    def prefill_tokens(self) -> int:
        """Tokens of the longest context that a choice begins with: its prompt and `committed`."""
        return len(self.prompt) + max(len(choice.committed) for choice in self.choices)


@dataclass(frozen=True, slots=True)
class RowError:
    """Why one row failed; `code` is stable, `message` is for people."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural log probabilities at one position; `top` are (token id, logprob), likeliest first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Output(Struct):
    """One row's progress in one step; the last one of a row carries `finish_reason`.

    `token_ids` are all tokens decoded since the row's last Output, the end-of-sequence token
    included; `text` is what the detokenizer released and may lag behind them. `logprobs` has one
    entry for each token of `token_ids` if the request asked for them, else none. `cached_tokens`:
    how many tokens of the prompt were found in the prefix cache.
    """

    request_id: str
    choice: int
    token_ids: list[int] = []
    text: str = ""
    finish_reason: str | None = None
    error: RowError | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    logprobs: list[TokenLogprobs] = []
    reasoning: str = ""
    tool_calls: list[ParsedToolCall] = []


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The model an engine runs, as an attempt event names it.

    `context_length`: most tokens of prompt and answer together; None if the model does not say.
    """

    name: str
    revision: str
    tokenizer_hash: str
    vocab_size: int
    eos_token_ids: frozenset[int]
    context_length: int | None = None


class RequestRefusedError(ValueError):
    """The engine does not take this request; `code` says why."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class LaneRows(NamedTuple):
    """Rows by lane, in the order of `LANES`; `active` ones decode or wait for their prefill."""

    active: tuple[int, ...]
    parked: tuple[int, ...]


class InferenceEngine(Protocol):
    """One continuous batch. Only the engine thread calls it; any thread may read the counts.

    If there is no other room, a request of a higher lane parks rows of lower ones: they leave the
    batch and continue later with the same tokens.
    """

    on_prefill: Callable[[Iterable[str]], None]
    """Called with the ids of the requests whose prompts are computed from now on, and with none
    when the step is over: after a crash, the last call says whose prompts were being computed."""

    on_launch: Callable[[], None]
    """Called within a step, before it launches work: the launch takes most of the step's time and
    releases the interpreter to other threads."""

    def fits(self, request: Request) -> bool:
        """Say whether the request fits this device's KV budget if nothing else is there."""

    def can_add(self, request: Request) -> bool:
        """Say whether there is room for all choices now, or rows that may be parked take it."""

    def add(self, request: Request) -> None:
        """Admit all choices of a request, or none, and reserve their KV tokens.

        The prompt is computed once, and each choice continues from a copy of its cache. If any
        choice resumes (has `committed` tokens), each is computed by itself. The output is the same
        as if each choice were added alone.

        Raises:
            RequestRefusedError: with `code` "no_room" if `can_add` is false or parking freed less
                than expected (try again later), "too_large" if `fits` is false,
                "token_out_of_vocabulary", "duplicate_request" or "invalid_parameter". No choice
                is admitted then.
        """

    def abort(self, request_id: str) -> None:
        """Forget every choice of the request; no Output follows. Unknown ids are ignored."""

    def step(self) -> list[Output]:
        """Do one bounded piece of work and return the rows that progressed."""

    @property
    def has_work(self) -> bool:
        """Whether `step` would do anything."""

    @property
    def running(self) -> int:
        """Rows in the decode batch."""

    @property
    def waiting(self) -> int:
        """Admitted rows that are not in the decode batch yet (queued or prefilling)."""

    @property
    def parked(self) -> int:
        """Rows that left the batch in favour of others and continue when there is room."""

    @property
    def request_ids(self) -> set[str]:
        """Ids of all requests that have a row, in any phase, or an Output not returned yet."""

    @property
    def lane_rows(self) -> LaneRows:
        """Rows in the batch, and parked ones, by lane."""

    @property
    def kv_memories(self) -> "tuple[KvMemory, ...]":
        """The memory guard's view of the KV caches; empty if the engine has no model."""

    @property
    def kv_tokens_used(self) -> int:
        """KV tokens reserved by admitted rows."""

    @property
    def kv_tokens_capacity(self) -> int:
        """KV tokens that all rows together may reserve."""

    @property
    def model_info(self) -> ModelInfo:
        """The model this engine runs."""
