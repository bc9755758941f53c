"""The engine: admits requests, steps the batch, turns tokens into text, ends rows."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

from mlx_serving.worker.engine.batch_runner import (
    NOTHING,
    Attachments,
    BatchRunner,
    StepNotBuiltError,
)
from mlx_serving.worker.engine.failures import LaunchedWorkError, attempt, is_memory_short
from mlx_serving.worker.engine.interface import (
    FINISH_ERROR,
    FINISH_LENGTH,
    FINISH_STOP,
    LaneRows,
    ModelInfo,
    Output,
    Request,
    RequestRefusedError,
    RowError,
)
from mlx_serving.worker.engine.memory.guard import MemoryRoom
from mlx_serving.worker.engine.memory.kv_caches import KvMemory
from mlx_serving.worker.engine.memory.recovery import NO_MEMORY, OUT_OF_MEMORY, Recovery
from mlx_serving.worker.engine.prefilling import FailedRows, Prefilling
from mlx_serving.worker.engine.request_checks import check_request
from mlx_serving.worker.engine.row import Phase, Row, SampledToken
from mlx_serving.worker.engine.scheduling.chunk import ChunkStep, PrefillChunk
from mlx_serving.worker.engine.scheduling.parking import NO_PARKING, Parking
from mlx_serving.worker.engine.scheduling.scheduler import Scheduler
from mlx_serving.worker.engine.structured.parser import grammar_ended, parse_output, row_error
from mlx_serving.worker.engine.text.detokenizer import DetokenizerProtocol
from mlx_serving.worker.engine.text.marked_detokenizer import MarkedDetokenizer


class Engine:
    """One continuous batch on one device; implements `interface.InferenceEngine`.

    Only one thread may call it. A step computes at most one prefill chunk, launches one decode
    step, and reads the tokens of the decode step before it.
    """

    def __init__(
        self,
        runner: BatchRunner,
        scheduler: Scheduler,
        detokenizer: DetokenizerProtocol,
        model_info: ModelInfo,
        attachments: Attachments = NOTHING,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Put the parts together; `loader.load_engine` does it for a model on disk."""
        self._clock = clock  # in seconds; measures steps, for the size of prefill chunks
        self.model_info = model_info
        self.tokenizer = attachments.tokenizer
        self.acceleration = attachments.acceleration
        self.on_prefill: Callable[[Iterable[str]], None] = _ignore
        self.on_launch: Callable[[], None] = _ignore
        self._runner = runner
        runner.on_launch = self._tell_launch
        self._scheduler = scheduler
        self._detokenizer = detokenizer
        self._early: list[Output] = []  # made between steps; the next step returns them
        self.kv_memory = attachments.kv_memory
        room = self.kv_memory.room if self.kv_memory else MemoryRoom()
        self._recovery = Recovery(scheduler, room)
        self._prefilling = Prefilling(runner, scheduler, self._tell_prefill)
        self._failure: Exception | None = None  # of launched work; the next step raises it

    def fits(self, request: Request) -> bool:
        """Say whether the request fits this device's KV budget if nothing else is there."""
        return self._scheduler.fits(request)

    def can_add(self, request: Request) -> bool:
        """Say whether there is room for all choices now, or rows that may be parked take it."""
        return not (self._recovery or self._failure) and self._recovery.has_room(request)

    def add(self, request: Request) -> None:
        """Admit a request; see `InferenceEngine.add` for what it raises."""
        check_request(request, self.model_info.vocab_size)
        # Rows that leave change the prefix cache: more rows may have to be parked than at first.
        while (parking := self._scheduler.find_room(request)) != NO_PARKING:
            try:
                self._park(parking)
            except Exception as error:  # of the batch, not of this request
                self._failure = error
                raise RequestRefusedError("no_room", "a step that was under way failed") from error
        rows = self._scheduler.admit(request)
        try:
            for row in rows:
                row.slot = self._open(row.request)
        except ValueError as error:
            for row in rows:
                self._forget(row)
            raise RequestRefusedError("invalid_parameter", f"stop: {error}") from None
        for row in rows:
            self._begin(row)

    def _begin(self, row: Row) -> None:
        """Give the row the parser and the matcher that its request asks for; resume it."""
        request = row.request
        if request.format is not None:
            row.parser = request.format.open(request.id, row.choice.index)
        if request.grammar is not None:
            row.matcher = request.grammar.start()
        if row.choice.committed:
            self._replay(row)

    def _open(self, request: Request) -> int:
        detokenizer = self._detokenizer
        if request.format is not None and isinstance(detokenizer, MarkedDetokenizer):
            return detokenizer.open_marked(request.stop)
        return detokenizer.open(request.stop)

    def _replay(self, row: Row) -> None:
        """Bring a resumed row to the state that its last attempt committed, without output."""
        committed = row.choice.committed
        live = [token for token in committed if token not in self.model_info.eos_token_ids]
        text, stopped = self._detokenizer.replay(row.slot, live)
        row.decoded = len(committed)
        if row.parser is not None:
            row.parser.push(text)
        if row.matcher is not None:
            row.matcher.replay(committed)
        reason = self._finish_reason(row, committed[-1], stopped=stopped)
        if reason is not None:
            # This text goes out with the finish reason, which no earlier attempt has written.
            rest = self._detokenizer.finish(row.slot)
            output = self._output(row, reason, rest)
            itself = committed[-1] in self.model_info.eos_token_ids or grammar_ended(row)
            parse_output(row, output, ended_itself=itself)
            self._early.append(output)
            self._forget(row)

    def _park(self, parking: Parking) -> None:
        """Park rows; the next step returns what the device had decoded of them."""
        decoding = [row for row in parking.park if row.phase is Phase.DECODING]
        keep = {*decoding}.difference(parking.evict)
        if decoding:
            self._collect(self._runner.park(decoding, keep), self._early)
        for row in filter(self._scheduler.is_here, parking.park):  # the others have just ended
            self._drop_prefill(row)
            self._scheduler.park(row)
        self._evict(parking.evict)

    def _evict(self, rows: Iterable[Row]) -> None:
        """Drop the keys and values of parked rows."""
        leaving = list(filter(self._scheduler.is_here, rows))
        self._runner.remove(leaving)
        for row in leaving:
            self._scheduler.evict(row)

    def _drop_prefill(self, row: Row) -> None:
        """Forget the prefill under way if this row is the only one in it."""
        if row.phase is Phase.PREFILLING and self._scheduler.is_alone_in_prefill(row):
            self._runner.drop_prefill(row.request.lane)

    def _resume(self, outputs: list[Output]) -> None:
        """Let parked rows continue, as far as there is room."""
        while (resumption := self._scheduler.next_parked()) is not None:
            self._evict(resumption.evict)
            row = resumption.resume
            if self._scheduler.resume(row):
                error = attempt("join", partial(self._runner.resume, row))
                if error is not None:
                    row.failed = True
                    self._runner.remove([row])
                    self._fail([row], error, outputs)

    def abort(self, request_id: str) -> None:
        """Forget every choice of the request; no Output follows. Unknown ids are ignored."""
        self._early = [o for o in self._early if o.request_id != request_id]
        rows = self._scheduler.find(request_id)
        try:
            self._runner.remove(rows)
            for row in rows:
                self._drop_prefill(row)
        except LaunchedWorkError as error:
            self._failure = error
        for row in [*rows, *self._recovery.forget(request_id)]:
            self._forget(row)

    def step(self) -> list[Output]:
        """Do one prefill chunk and one decode step; return the rows that progressed."""
        began = self._clock()
        outputs, self._early = self._early, []
        with self._recovering(outputs):
            self._raise_failure()
            self._recovery.readmit()
            self._resume(outputs)
        chunk = self._scheduler.schedule_prefill()
        tokens = chunk.computed_tokens if chunk else 0
        waited = not (self._scheduler.running or (chunk and chunk.mixed))
        with self._recovering(outputs):
            self._collect(self._advance(chunk, outputs), outputs)
        if chunk is not None:
            self.on_prefill(())
        self._scheduler.chunk_size.note(ChunkStep(began, self._clock(), tokens, waited=waited))
        return outputs

    def _advance(self, chunk: PrefillChunk | None, outputs: list[Output]) -> list[SampledToken]:
        """Prefill, launch a decode step, and wait for the tokens of the one before it."""
        if chunk is not None:
            self._compute(self._prefilling.compute(chunk), outputs)
        return self._decode(chunk, outputs)

    @contextmanager
    def _recovering(self, outputs: list[Output]) -> Iterator[None]:
        """If memory is short, let all rows begin again; raise any other error of the batch."""
        try:
            yield
        except Exception as error:
            if not is_memory_short(error):
                raise
            self._recover(self._scheduler.rows, outputs)

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _decode(self, chunk: PrefillChunk | None, outputs: list[Output]) -> list[SampledToken]:
        """Launch a decode step; if it can't be built with its prompts, compute each by itself."""
        try:
            return self._runner.decode()
        except StepNotBuiltError:
            groups = self._prefilling.waiting_for_step(chunk)
            if not groups:
                raise
        rows = [row for group in groups for row in group]
        for row in rows:
            row.failed = True  # until its prompt is computed
        self._runner.remove(rows)
        self._collect(self._runner.decode(), outputs)  # also if the prompts fail
        self._compute(self._prefilling.compute_apart(groups), outputs)
        return []

    def _recover(self, rows: list[Row], outputs: list[Output]) -> None:
        """Let rows begin again that the device had no memory for; one that was alone may end."""
        self._end(self._recovery.take(rows), NO_MEMORY, outputs)
        if not self._scheduler.has_work:
            self._runner.reset()

    def _end(self, rows: Iterable[Row], error: RowError, outputs: list[Output]) -> None:
        for row in rows:
            outputs.append(self._output(row, FINISH_ERROR, error=error))
            self._forget(row)

    def _compute(self, failures: Iterable[FailedRows], outputs: list[Output]) -> None:
        """Compute prompts one after the other; end those that fail before the next one."""
        for rows, error in failures:
            self._fail(rows, error, outputs)

    def _fail(self, rows: Iterable[Row], error: RowError, outputs: list[Output]) -> None:
        """End failed rows; if there was no memory for them, they begin again."""
        if error.code == OUT_OF_MEMORY:
            self._recover(list(rows), outputs)
        else:
            self._end(rows, error, outputs)

    def _collect(self, sampled: list[SampledToken], outputs: list[Output]) -> None:
        """Turn one step's tokens into outputs; take rows that ended out of the batch."""
        eos = self.model_info.eos_token_ids
        checked = [(each, row_error(each.row, each.token)) for each in sampled]
        with_text = [
            (row, token) for (row, token, _), error in checked if error is None and token not in eos
        ]
        pieces = iter(
            self._detokenizer.push(
                [row.slot for row, _ in with_text], [token for _, token in with_text]
            )
        )
        ended = []
        for (row, token, logprobs), error in checked:
            if error is not None:
                row.failed = True
                output = self._output(row, FINISH_ERROR, error=error)
            else:
                row.append(token)
                text, stopped = ("", False) if token in eos else next(pieces)
                reason = self._finish_reason(row, token, stopped=stopped)
                output = self._output(row, reason, text, [token])
                if logprobs is not None:
                    output.logprobs.append(logprobs)
            if output.finish_reason is not None:
                output.text += self._detokenizer.finish(row.slot)
                ended.append(row)
            parse_output(row, output, ended_itself=token in eos or grammar_ended(row))
            outputs.append(output)
        if ended:
            try:
                self._runner.remove(ended)
            finally:  # an error concerns the other rows
                for row in ended:
                    self._forget(row)

    def _finish_reason(self, row: Row, token: int, *, stopped: bool) -> str | None:
        if stopped or token in self.model_info.eos_token_ids or grammar_ended(row):
            return FINISH_STOP
        return FINISH_LENGTH if row.decoded >= row.request.max_tokens else None

    def _output(
        self,
        row: Row,
        reason: str | None,
        text: str = "",
        token_ids: Iterable[int] = (),
        error: RowError | None = None,
    ) -> Output:
        request = row.request
        tokens = list(token_ids)
        counts = (len(request.prompt), row.cached_prompt_tokens)
        return Output(request.id, row.choice.index, tokens, text, reason, error, *counts)

    def _tell_prefill(self, request_ids: Iterable[str]) -> None:
        self.on_prefill(request_ids)

    def _tell_launch(self) -> None:
        self.on_launch()

    def _forget(self, row: Row) -> None:
        self._scheduler.remove(row)
        if row.slot >= 0:
            self._detokenizer.close(row.slot)

    @property
    def has_work(self) -> bool:
        """Whether `step` would do anything."""
        return self._scheduler.has_work or bool(self._early or self._recovery or self._failure)

    @property
    def mixes_prompts(self) -> bool:
        """Whether decode steps compute short prompts."""
        return self._scheduler.limits.mixed_reads > 0

    @property
    def running(self) -> int:
        """Rows in the decode batch."""
        return self._scheduler.running

    @property
    def waiting(self) -> int:
        """Admitted rows that are not in the decode batch yet."""
        return self._scheduler.waiting + len(self._recovery)

    @property
    def parked(self) -> int:
        """Rows that left the batch in favour of others and continue when there is room."""
        return self._scheduler.parked

    @property
    def request_ids(self) -> set[str]:
        """Ids of all requests that have a row, in any phase, or an Output not returned yet."""
        rows = [*self._scheduler.rows, *self._recovery.rows]
        return {row.request.id for row in rows} | {o.request_id for o in self._early}

    @property
    def lane_rows(self) -> LaneRows:
        """Rows in the batch, and parked ones, by lane."""
        return self._scheduler.lane_rows

    @property
    def kv_memories(self) -> tuple[KvMemory, ...]:
        """The memory guard's view of the KV caches; empty if there is none."""
        return () if self.kv_memory is None else (self.kv_memory,)

    @property
    def kv_tokens_used(self) -> int:
        """KV tokens reserved by admitted rows."""
        return self._scheduler.kv_tokens_used

    @property
    def kv_tokens_capacity(self) -> int:
        """KV tokens that all rows together may reserve."""
        return self._scheduler.limits.kv_capacity_tokens


def _ignore(*_news: object) -> None:
    """Do nothing."""
