"""An engine without a model: tokens at a set rate, text that counts up. Needs no mlx.

It is the real engine (admission, prefill chunks, stop strings, resume, abort) over a runner that
sleeps instead of computing. The text of token n of a completion is " n", so any output can be
checked: ``1 2 3 4``.
"""

import time
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from typing import Final

from mlx_serving.common import defaults
from mlx_serving.common.errors import InvalidJob
from mlx_serving.common.job.output_format import enforces_tools
from mlx_serving.common.job.schema import GenerationJob
from mlx_serving.common.queues import Lane
from mlx_serving.worker.engine.engine import Engine
from mlx_serving.worker.engine.interface import ModelInfo, Request, TokenLogprobs
from mlx_serving.worker.engine.row import Row, SampledToken
from mlx_serving.worker.engine.scheduling.chunk import FIRST_TOKENS, STEP_SECONDS, PrefillChunk
from mlx_serving.worker.engine.scheduling.limits import BatchSize, SchedulerLimits
from mlx_serving.worker.engine.scheduling.scheduler import Scheduler
from mlx_serving.worker.engine.text.detokenizer import Detokenizer
from mlx_serving.worker.engine.text.vocabulary import WORD_BOUNDARY, Vocabulary

VOCAB_SIZE: Final = 10_000
EOS_TOKEN: Final = 0
_UNBOUNDED: Final = 1 << 40
_PROMPT: Final = tuple(range(1, VOCAB_SIZE))
_BATCH: Final = BatchSize(64)
_LARGE_BATCH: Final = BatchSize(1024)


@dataclass(frozen=True, slots=True)
class SimulatedOptions:
    """How fast and how large the simulated device is.

    `tokens_per_second` is one row's decode rate in a batch of any size;
    `prefill_tokens_per_second` the whole device's; 0: takes no time. `answer_tokens`: a row ends by
    itself after so many tokens; None: at max_tokens. A prompt's token after `double_depth_tokens`
    others costs twice as much as its first one; 0: all cost the same.
    """

    tokens_per_second: float = 100.0
    prefill_tokens_per_second: float = 10_000.0
    answer_tokens: int | None = None
    batch: BatchSize = _BATCH
    kv_capacity_tokens: int = 1_000_000
    prefill_chunk_tokens: int = defaults.PREFILL_CHUNK_TOKENS
    first_chunk_tokens: int = FIRST_TOKENS
    step_seconds: float = STEP_SECONDS
    double_depth_tokens: int = 0
    name: str = "simulated"

    @classmethod
    def zero_cost(cls, batch: BatchSize = _LARGE_BATCH) -> "SimulatedOptions":
        """For benchmarks of dispatch: any number of jobs ends in the first step after they came."""
        return cls(
            tokens_per_second=0.0,
            prefill_tokens_per_second=0.0,
            answer_tokens=0,
            batch=batch,
            kv_capacity_tokens=_UNBOUNDED,
            prefill_chunk_tokens=_UNBOUNDED,
            first_chunk_tokens=_UNBOUNDED,
        )


class SimulatedRunner:
    """Counts up, one number a token."""

    def __init__(
        self, options: SimulatedOptions, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        """Take the rates, and a `sleep` in seconds that tests replace."""
        self._options = options
        self._sleep = sleep
        self._rows: dict[Row, None] = {}
        self.on_launch: Callable[[], None] = lambda: None

    def prefill(self, chunk: PrefillChunk) -> None:
        """Sleep as long as the chunk's tokens take, padding included."""
        options = self._options
        if options.prefill_tokens_per_second:
            seconds = chunk.computed_tokens / options.prefill_tokens_per_second
            depth = chunk.leaders[0].prefill.cached_tokens + chunk.start
            if options.double_depth_tokens:
                seconds *= 1 + depth / options.double_depth_tokens
            self._sleep(seconds)

    def drop_prefill(self, lane: Lane) -> None:
        """Do nothing: no prompt is kept."""

    def join(self, chunk: PrefillChunk) -> None:
        """Start to decode these rows."""
        self._rows |= dict.fromkeys(chunk.rows)

    def remove(self, rows: Iterable[Row]) -> None:
        """Stop decoding these rows."""
        for row in rows:
            self._rows.pop(row, None)

    def park(self, rows: Iterable[Row], keep: Container[Row]) -> list[SampledToken]:
        """Stop decoding these rows; a row later counts on from its last number, kept or not."""
        del keep
        self.remove(rows)
        return []

    def resume(self, row: Row) -> None:
        """Decode the row again."""
        self._rows[row] = None

    def reset(self) -> None:
        """Forget all rows."""
        self._rows = {}

    def decode(self) -> list[SampledToken]:
        """Sleep for one token's time and return every row's next one."""
        self.on_launch()
        if self._rows and self._options.tokens_per_second:
            self._sleep(1.0 / self._options.tokens_per_second)
        return [self._next(row) for row in self._rows]

    def _next(self, row: Row) -> SampledToken:
        token = self._next_token(row)
        asked = row.request.sampling.logprobs
        if asked is None:
            return SampledToken(row, token)
        return SampledToken(row, token, TokenLogprobs(token, 0.0, ((token, 0.0),)[:asked]))

    def _next_token(self, row: Row) -> int:
        end = self._options.answer_tokens
        if end is not None and row.decoded >= end:
            return EOS_TOKEN
        return row.decoded % (VOCAB_SIZE - 1) + 1


def spell(token_id: int) -> bytes:
    """Return the text of a token as bytes: " 7" for 7."""
    return b"<end>" if token_id == EOS_TOKEN else b" %d" % token_id


class SimulatedPromptEncoder:
    """Stands in for `prompts.PromptEncoder`: one token a word."""

    def encode(self, job: GenerationJob) -> tuple[int, ...]:
        """Return as many tokens as the job's prompt or messages have words, at least one."""
        texts = [message.text for message in job.messages or ()]
        words = max(1, sum(len(text.split()) for text in [job.prompt or "", *texts]))
        if words < VOCAB_SIZE:
            return _PROMPT[:words]
        return tuple(index % VOCAB_SIZE for index in range(1, words + 1))


def plan(job: GenerationJob, request: Request) -> Request:
    """Stand in for `structured.plan.OutputPlanner`: the simulated output follows no grammar.

    Raises:
        InvalidJob: the job asks for one.
    """
    if job.response_format is not None or enforces_tools(job.tools, job.tool_choice):
        field = "tools" if job.response_format is None else "response_format"
        raise InvalidJob([(field, "the simulated engine can't be held to a form")])
    return request


class SimulatedEngine(Engine):
    """`Engine` with a `SimulatedRunner`."""

    def __init__(
        self,
        options: SimulatedOptions = SimulatedOptions(),
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
        runner: SimulatedRunner | None = None,
    ) -> None:
        """Build the engine; `sleep` and `clock`, in seconds, and another `runner` are for tests."""
        limits = SchedulerLimits(
            options.batch, options.kv_capacity_tokens, options.prefill_chunk_tokens,
            first_chunk_tokens=options.first_chunk_tokens, step_seconds=options.step_seconds,
        )  # fmt: skip
        info = ModelInfo(options.name, "simulated", "simulated", VOCAB_SIZE, frozenset({EOS_TOKEN}))
        spelled = [f"{WORD_BOUNDARY}{number}".encode() for number in range(VOCAB_SIZE)]
        vocabulary = Vocabulary(spelled, "byte_fallback", {EOS_TOKEN}, strip_leading_space=True)
        runner = runner or SimulatedRunner(options, sleep)
        super().__init__(runner, Scheduler(limits), Detokenizer(vocabulary), info, clock=clock)
