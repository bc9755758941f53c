"""What goes into an engine and what comes out of it. Imports neither mlx nor redis."""

from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from msgspec import Struct

from mlx_serving.common.queues import LANES, Lane
from mlx_serving.worker.engine.kv.prefix.index import PrefixKey

if TYPE_CHECKING:
    from mlx_serving.worker.engine.memory.kv_caches import KvMemory

FINISH_STOP: Final = "stop"
FINISH_LENGTH: Final = "length"
FINISH_ERROR: Final = "error"
FINISH_TOOL_CALLS: Final = "tool_calls"

_RANKS: Final = {lane: rank for rank, lane in enumerate(LANES)}

INVALID_TOKEN: Final = -1  # sampled from logits with NaN or +inf, or with nothing but -inf


class SamplingParams(Struct, frozen=True):
    """How one row's tokens are chosen; every field is data in an array on the device.

    `temperature` 0 is greedy (the other filters then change nothing). `top_p` in (0, 1], 1 is
    off. `top_k` 0 is off. `min_p` in [0, 1], 0 is off. `seed` in [0, 2**64).

    `repetition_penalty` > 0, 1 is off: logits of tokens that the prompt or the completion holds
    are divided by it where positive, multiplied where negative (CTRL, Keskar et al. 2019).
    `presence_penalty` and `frequency_penalty` in [-2, 2], 0 is off: taken off the logit of a
    token that the completion holds, once and for each time (OpenAI). `logit_bias` adds to the
    logits of these token ids. `logprobs` None: none are reported; k: the chosen token's and
    those of the k likeliest, of the model's own distribution, before all of the above.
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
        """Whether what the row already holds changes its logits."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return penalties != (1.0, 0.0, 0.0)


class TokenMatcher(Protocol):
    """One row's place in its grammar."""

    def advance(self, token: int) -> None:
        """Take the token that the row got."""

    def replay(self, tokens: Iterable[int]) -> None:
        """Take what earlier attempts decoded."""

    @property
    def ended(self) -> bool:
        """Whether the grammar is satisfied and nothing but the end can follow."""

    @property
    def failure(self) -> str | None:
        """Why the grammar can't be followed any further; None where it can."""


class Grammar(Protocol):
    """What a row's text has to follow, compiled."""

    def start(self) -> TokenMatcher:
        """Return a new row's place: the start."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model wrote; `arguments` is a JSON object as text, `index` counts from 0."""

    index: int
    id: str
    name: str
    arguments: str


@dataclass(slots=True)
class Parts:
    """What a piece of a row's text turned out to be; markers are in none of them."""

    text: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)

    def __add__(self, other: "Parts") -> "Parts":
        return Parts(
            self.text + other.text,
            self.reasoning + other.reasoning,
            [*self.tool_calls, *other.tool_calls],
        )


class OutputParser(Protocol):
    """Tells one row's text from its reasoning and its tool calls, piece by piece."""

    @property
    def called(self) -> bool:
        """Whether a tool call was read."""

    def push(self, text: str) -> Parts:
        """Take the row's next text; what may still become a marker waits."""

    def finish(self, *, whole: bool) -> Parts:
        """Release what waits; `whole` says that the model ended the text, not a limit."""


class OutputFormat(Protocol):
    """How one request's text is to be read."""

    def open(self, request_id: str, choice: int) -> OutputParser:
        """Return a parser for a new row; calls get ids from the job's id and the choice."""


class Request(Struct, frozen=True):
    """One row to decode: `choice` of a job, prompt and sampling already resolved.

    `committed` are tokens that earlier attempts decoded (resume): they are prefilled after the
    prompt, are not emitted again, and count towards `max_tokens`. `grammar` None: any text.
    `format` None: all of it is text. `salt` names whose prefixes this row may share: those of
    requests with the same salt, and no others. `lane` says before whom it goes. `model` is the
    alias of the model that is to decode it, where an `EngineSet` has several.
    """

    id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    max_tokens: int
    stop: tuple[str, ...] = ()
    committed: tuple[int, ...] = ()
    choice: int = 0
    grammar: Grammar | None = None
    format: OutputFormat | None = None
    salt: str = ""
    lane: Lane = "default"
    model: str = ""

    @property
    def rank(self) -> int:
        """Place of its lane: 0 goes before all others."""
        return _RANKS[self.lane]

    @property
    def kv_tokens(self) -> int:
        """The most KV-cache tokens this row can ever hold: prompt + max_tokens."""
        return len(self.prompt) + max(self.max_tokens, len(self.committed))


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

    `token_ids` name every token decoded since the row's last Output, the end-of-sequence token
    included; `text` is what the detokenizer released and may lag behind them. `logprobs` has an
    entry a token of `token_ids` where the request asked for them, else none. `cached_tokens` of
    the prompt were found in the prefix cache.
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
    tool_calls: list[ToolCall] = []


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The model an engine runs, as an attempt event names it."""

    name: str
    revision: str
    tokenizer_hash: str
    vocab_size: int
    eos_token_ids: frozenset[int]


class Phase(Enum):
    """Where an admitted row stands; it moves down this list, or from any place to PARKED.

    A parked row goes on as DECODING where its keys and values were kept, else as WAITING.
    """

    WAITING = "waiting"  # admitted, no prompt token computed
    PREFILLING = "prefilling"
    DECODING = "decoding"
    PARKED = "parked"  # out of the batch, in favour of a row of a higher lane


class Row(Struct, eq=False):
    """One admitted row inside an engine: what the scheduler and the decode batch keep of it.

    `context` is what is prefilled: prompt + committed, and what a parked row had decoded, without
    the last token. That one token (`last_token`) enters the decode batch, where its logits give
    the row's next token.
    """

    request: Request
    slot: int = -1  # of the detokenizer
    phase: Phase = Phase.WAITING
    prefilled: int = 0  # tokens of `context` in the KV cache
    decoded: int = 0  # tokens of the completion known to the host, committed ones included
    matcher: TokenMatcher | None = None
    parser: OutputParser | None = None
    history: "array[int] | None" = None  # of rows with penalties: prompt, then known completion
    tokens: list[int] = []  # decoded by this attempt, known to the host
    failed: bool = False  # what it left in the KV cache is not to be used again
    prefix: list[int] = []  # pinned blocks, until its own are complete
    found: int = 0  # tokens of `context` that were in the prefix cache when prefill began
    shared: int = 0  # KV tokens of the row that the prefix cache counts
    order: int = 0  # of admission
    cached: int | None = None  # what was found at first, once the row has a token

    def __post_init__(self) -> None:
        """Start the history where the sampler needs one."""
        if self.request.sampling.penalised:
            self.history = array("i", self.request.prompt + self.request.committed)

    @property
    def context_length(self) -> int:
        """Tokens to prefill."""
        return len(self.request.prompt) + len(self.request.committed) + len(self.tokens) - 1

    @property
    def last_token(self) -> int:
        """The token that the row brings into the decode batch."""
        return (self.tokens or self.request.committed or self.request.prompt)[-1]

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that were not computed."""
        found = self.found if self.cached is None else self.cached
        return min(found, len(self.request.prompt))

    @property
    def context_key(self) -> PrefixKey:
        """What `context` is found by in the prefix cache."""
        tokens = array("i", self._known[:-1]).tobytes()
        return PrefixKey(self.request.salt.encode(), tokens)

    def context(self, start: int, stop: int) -> list[int]:
        """Return the tokens to prefill at [start, stop), never beyond `context_length`."""
        return list(self._known[start : min(stop, self.context_length)])

    @property
    def _known(self) -> tuple[int, ...]:
        """Prompt and completion; the last one's keys and values may not be computed yet."""
        return (*self.request.prompt, *self.request.committed, *self.tokens)


class SampledToken(NamedTuple):
    """One row's next token; `INVALID_TOKEN` says that the row's logits were not usable."""

    row: Row
    token: int
    logprobs: TokenLogprobs | None = None  # where the row asked for them


class RequestRefusedError(ValueError):
    """The engine does not take this request; `code` says why."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class LaneRows(NamedTuple):
    """Rows by lane, in the order of `LANES`; `active` ones decode, or wait for their prefill."""

    active: tuple[int, ...]
    parked: tuple[int, ...]


class InferenceEngine(Protocol):
    """One continuous batch. Only the engine thread calls it; the counts, any thread may read.

    A request of a higher lane parks rows of lower ones where there is no other room: they leave
    the batch and go on later, as if nothing had happened.
    """

    on_prefill: Callable[[Iterable[str]], None]
    """Told the ids of the requests whose prompts are computed from now on, then, when the step is
    over, none: what it was told last is what a crash interrupted."""

    on_launch: Callable[[], None]
    """Called within a step, before it launches work: the launch takes most of the step's time and
    leaves the interpreter to other threads."""

    def fits(self, *choices: Request) -> bool:
        """Say whether this device's KV budget could ever hold these choices of one request."""

    def can_add(self, *choices: Request) -> bool:
        """Say whether there is room for these choices of one request now, or can be made."""

    def add(self, *choices: Request) -> None:
        """Admit the choices of one request, all or none, and reserve their KV tokens.

        Choices given in one call have the same `id` and `prompt`. The prompt is then computed
        once, and each choice goes on from a copy of its cache. Choices that resume (any of them
        has `committed` tokens) are computed each for itself. What comes out is the same as
        where each choice is added alone.

        Raises:
            RequestRefusedError: with `code` "no_room" where `can_add` is false or rows that gave
                way left less than was expected of them (try again later), "too_large" where
                `fits` is false, "token_out_of_vocabulary", "duplicate_request" or
                "invalid_parameter". No choice is admitted then.
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
        """Rows that left the batch in favour of others and go on when there is room."""

    @property
    def request_ids(self) -> set[str]:
        """Requests that it has, in whatever phase."""

    @property
    def lane_rows(self) -> LaneRows:
        """Rows in the batch, and parked ones, by lane."""

    @property
    def kv_memories(self) -> "tuple[KvMemory, ...]":
        """What the memory guard sees of the KV caches; none where nothing is computed."""

    @property
    def kv_tokens_used(self) -> int:
        """KV tokens reserved by admitted rows."""

    @property
    def kv_tokens_capacity(self) -> int:
        """KV tokens that all rows together may reserve."""

    @property
    def model_info(self) -> ModelInfo:
        """The model this engine runs."""
