"""Follows one job to its end; Ctrl-C cancels it."""

from __future__ import annotations

import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Final, Self

from mlx_serving.cli.console import EXIT_INTERRUPTED, harmless, note
from mlx_serving.common.errors import MlxServingError
from mlx_serving.common.events import RESET, encode
from mlx_serving.common.queues import queue_name
from mlx_serving.producer.client import Client

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from mlx_serving.common.events import Event, TokenLogprob
    from mlx_serving.common.job.schema import GenerationJob
    from mlx_serving.common.results import GenerationResult
    from mlx_serving.common.settings import Settings

WAIT_SECONDS: Final = 3.0


class Canceller:
    """Makes the first Ctrl-C cancel the job in another thread; the stream goes on to its end.

    So no reply is half read and no text is printed twice. A second Ctrl-C leaves at once and does
    not wait for the job.
    """

    def __init__(self, cancel: Callable[[str], object]) -> None:
        self.interrupted = False
        self._cancel = cancel
        self._job_id: str | None = None

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGINT, self._on_interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def watch(self, job_id: str) -> None:
        """Take the id of the enqueued job; if Ctrl-C came before, cancel it now."""
        self._job_id = job_id
        if self.interrupted:
            self._start()

    def _on_interrupt(self, _number: int, _frame: FrameType | None) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        if self._job_id is not None:
            self._start()

    def _start(self) -> None:
        threading.Thread(target=self._run, name="cancel", daemon=True).start()

    def _run(self) -> None:
        note(f"\ncancelling {self._job_id} (Ctrl-C again leaves without waiting)")
        try:
            self._cancel(str(self._job_id))
        except MlxServingError as error:
            note(f"not cancelled: {error.code}: {error}")


class WaitingNote:
    """Prints a note if no event of a job has come for some seconds."""

    def __init__(self, job: GenerationJob) -> None:
        queue = queue_name(job.model, job.lane)
        text = f"waits in {queue}: mlx-serving status shows who serves what; Ctrl-C cancels"
        self._timer = threading.Timer(WAIT_SECONDS, note, [text])
        self._timer.daemon = True

    def __enter__(self) -> Self:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over()

    def over(self) -> None:
        """Print no note from now on."""
        self._timer.cancel()


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
    printer = Printer(as_json=as_json, choices=job.n)
    with Client(settings=settings, model=job.model) as client, Canceller(client.cancel) as ctrl_c:
        began_s = time.perf_counter()
        handle = client.submit(job)
        ctrl_c.watch(handle.id)
        try:
            with WaitingNote(job) as waiting:
                for event in handle.stream():
                    waiting.over()
                    printer.show(event)
            result = handle.result()
            printer.end(result)
        except BrokenPipeError:  # nobody reads what we print
            handle.cancel()
            raise
    if verbose:
        note(_summary(result, printer, began_s))
    if ctrl_c.interrupted:
        note(f"job {handle.id} is {result.state.value}")
        return EXIT_INTERRUPTED
    result.raise_for_state()
    return 0


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
