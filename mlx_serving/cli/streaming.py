"""Follows one job to its end and prints it."""

from __future__ import annotations

import secrets
import sys
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Final, Self

from mlx_serving.cli.canceller import Canceller
from mlx_serving.cli.console import SIGNALLED, fail, fail_at_output, harmless, note
from mlx_serving.common.errors import InvalidJob, MlxServingError, TenantLimited
from mlx_serving.common.events import RESET, encode
from mlx_serving.common.queues import queue_name
from mlx_serving.common.states import JobState
from mlx_serving.producer.client import Client

if TYPE_CHECKING:
    from collections.abc import Callable

    from mlx_serving.common.events import Event, TokenLogprob
    from mlx_serving.common.job.schema import GenerationJob
    from mlx_serving.common.protocol.client import JobRecord
    from mlx_serving.common.results import GenerationResult
    from mlx_serving.common.settings import Settings

WAIT_SECONDS: Final = 3.0


class WaitingNote:
    """Prints a note if no event of a job has come for some seconds: what it waits for."""

    def __init__(self, job: GenerationJob, status: Callable[[], JobRecord]) -> None:
        self._queue, self._status = queue_name(job.model, job.lane), status
        self._timer = threading.Timer(WAIT_SECONDS, self._tell)
        self._timer.daemon = True

    def __enter__(self) -> Self:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over()

    def over(self) -> None:
        """Print no note from now on."""
        self._timer.cancel()

    def _tell(self) -> None:
        try:
            record = self._status()
        except MlxServingError as error:
            note(f"no answer yet: {error.code}: {error}")
            return
        if record.state is JobState.RUNNING:
            note(f"{record.owner} has it and reads the prompt; Ctrl-C cancels")
        elif record.state is JobState.QUEUED:
            note(
                f"waits in {self._queue}: mlx-serving status shows who serves what; Ctrl-C cancels"
            )


class Printer:
    """Writes events to stdout as they come, and remembers when they came.

    The texts of several choices would mix on a terminal, so `end` prints them one by one.
    """

    def __init__(self, *, as_json: bool, choices: int = 1) -> None:
        self._as_json, self._live = as_json, choices == 1
        self._harmless = sys.stdout.isatty()
        self.first_token_s: float | None = None  # perf_counter
        self.last_token_s: float | None = None

    def show(self, event: Event) -> None:
        """Print one event."""
        if any(choice.token_ids for choice in event.choices):
            self.last_token_s = time.perf_counter()
            self.first_token_s = self.first_token_s or self.last_token_s
        if self._as_json:
            sys.stdout.write(encode(event).decode() + "\n")
        elif event.type == RESET:
            if self._live and self.first_token_s is not None:
                sys.stdout.flush()
                note("\nthe text so far is void: the job begins anew")
        elif self._live:
            self._write(event.text)
        sys.stdout.flush()

    def end(self, result: GenerationResult) -> None:
        """End the last line; print what was not printed live."""
        if self._as_json:
            return
        if self._live:
            self._write("\n")
        for choice in result.choices:
            if not self._live:
                ended = choice.finish_reason or "cut short"
                self._write(f"[{choice.index}: {ended}]\n{choice.text}\n")
            for entry in choice.logprobs.content if choice.logprobs else ():
                self._write(f"{_line(entry)}\n")
        sys.stdout.flush()

    def _write(self, text: str) -> None:
        sys.stdout.write(harmless(text) if self._harmless else text)


def stream_job(job: GenerationJob, settings: Settings, *, as_json: bool, verbose: bool) -> int:
    """Submit a job and print its events until its end; return the exit status.

    Raises:
        MlxServingError: it could not be submitted or followed, or did not finish.

    """
    # So its id is known before the submit, which a signal or a lost reply may leave in doubt.
    job = job.model_copy(update={"idempotency_key": secrets.token_hex(16)})
    printer = Printer(as_json=as_json, choices=job.n)
    began_s = time.perf_counter()
    canceller = Canceller(job.job_id(), partial(Client, settings=settings, model=job.model))
    try:
        with Client(settings=settings, model=job.model) as client, canceller:
            result = _followed(job, client, printer, canceller)
        printer.end(result)
    except KeyboardInterrupt:
        if not canceller.signal:
            raise
        note(f"job {job.job_id()}: left before its end")
    except (OSError, MlxServingError) as error:  # OSError: nobody reads what we print
        if not canceller.signal:
            raise
        fail_at_output(error) if isinstance(error, OSError) else fail(error)
    else:
        if verbose:
            note(_summary(result, printer, began_s))
        if not canceller.signal:
            result.raise_for_state()
            return 0
        note(f"job {result.id} is {result.state.value}")
    return SIGNALLED + canceller.signal


def _followed(
    job: GenerationJob, client: Client, printer: Printer, canceller: Canceller
) -> GenerationResult:
    """Submit the job and print its events; tell the canceller how far it is."""
    try:
        handle = client.submit(job)
    except (InvalidJob, TenantLimited):  # Redis has not got it
        canceller.over()
        raise
    canceller.submitted()
    with WaitingNote(job, handle.status) as waiting:
        for event in handle.stream():
            waiting.over()
            printer.show(event)
    result = handle.result()
    canceller.over()
    return result


def _line(entry: TokenLogprob) -> str:
    """Log probabilities of a token and of the likeliest tokens at its position."""
    shown = [f"{each.logprob:9.4f} {each.token!r}" for each in (entry, *entry.top_logprobs)]
    return "  |".join(shown)


def _summary(result: GenerationResult, printer: Printer, began_s: float) -> str:
    parts = [f"job {result.id}", f"{result.state.value} ({result.finish_reason or 'cut short'})"]
    if result.usage:
        parts.append(f"{result.usage.prompt_tokens} + {result.usage.completion_tokens} tokens")
    if printer.first_token_s and printer.last_token_s and result.usage:
        parts.append(f"TTFT {(printer.first_token_s - began_s) * 1000:.0f} ms")
        parts.append(
            f"{result.usage.completion_tokens / (printer.last_token_s - began_s):.0f} tok/s"
        )
    if result.worker:
        parts.append(f"worker {result.worker}")
    return " · ".join(parts)
