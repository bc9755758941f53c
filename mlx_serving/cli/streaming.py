"""Follows one job to its end; a signal that ends the command cancels it."""

from __future__ import annotations

import signal
import sys
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Self

from mlx_serving.cli.console import SIGNALLED, fail_at_output, harmless, note
from mlx_serving.common.errors import MlxServingError, QueueUnavailable
from mlx_serving.common.events import RESET, encode
from mlx_serving.common.queues import queue_name
from mlx_serving.common.states import JobState
from mlx_serving.producer.client import Client

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from mlx_serving.common.events import Event, TokenLogprob
    from mlx_serving.common.job.schema import GenerationJob
    from mlx_serving.common.protocol.client import JobRecord
    from mlx_serving.common.results import GenerationResult
    from mlx_serving.common.settings import Settings

WAIT_SECONDS: Final = 3.0
SENT_SECONDS: Final = 1.0  # that a second Ctrl-C leaves the cancelling
AGAIN_SECONDS: Final = 1.0  # between two tries to cancel while Redis is away
ENDING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Canceller:
    """Makes a signal cancel the job in another thread; the stream goes on to its end.

    So no reply is half read and no text is printed twice. A second Ctrl-C leaves at once and does
    not wait for the job's end. Other signals may come twice: both kernel and shell send SIGHUP when
    a terminal is closed.
    """

    def __init__(self, cancel: Callable[[str], object]) -> None:
        self.signal = 0  # the first one that came
        self._cancel = cancel
        self._job_id: str | None = None
        self._cancelling: threading.Thread | None = None

    def __enter__(self) -> Self:
        ours = [each for each in ENDING if signal.getsignal(each) is not signal.SIG_IGN]  # nohup
        self._before = {each: signal.signal(each, self._on_signal) for each in ours}
        return self

    def __exit__(self, *_: object) -> None:
        for each, before in self._before.items():
            signal.signal(each, before)

    def watch(self, job_id: str) -> None:
        """Take the id of the enqueued job; if a signal came before, cancel it now."""
        self._job_id = job_id
        if self.signal:
            self._start()

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if not self.signal:
            self.signal = number
            if self._job_id is not None:
                self._start()
        elif number == signal.SIGINT:
            if self._cancelling is not None:
                self._cancelling.join(SENT_SECONDS)
            raise KeyboardInterrupt

    def _start(self) -> None:
        self._cancelling = threading.Thread(target=self._run, name="cancel", daemon=True)
        self._cancelling.start()

    def _run(self) -> None:
        note(f"\ncancelling {self._job_id} (Ctrl-C again leaves without waiting)")
        while True:
            try:
                self._cancel(str(self._job_id))
            except QueueUnavailable as error:  # the stream waits for Redis, too
                note(f"not cancelled yet: {error.code}: {error}")
                time.sleep(AGAIN_SECONDS)
            except MlxServingError as error:
                note(f"not cancelled: {error.code}: {error}")
                return
            else:
                return


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
    printer = Printer(as_json=as_json, choices=job.n)
    with Client(settings=settings, model=job.model) as client, Canceller(client.cancel) as ctrl_c:
        began_s = time.perf_counter()
        handle = client.submit(job)
        ctrl_c.watch(handle.id)
        try:
            with WaitingNote(job, handle.status) as waiting:
                for event in handle.stream():
                    waiting.over()
                    printer.show(event)
            result = handle.result()
            printer.end(result)
        except (OSError, MlxServingError) as error:  # OSError: nobody reads what we print
            with suppress(MlxServingError):
                handle.cancel()
            if not (ctrl_c.signal and isinstance(error, OSError)):
                raise
            fail_at_output(error)
            return SIGNALLED + ctrl_c.signal
    if verbose:
        note(_summary(result, printer, began_s))
    if ctrl_c.signal:
        note(f"job {handle.id} is {result.state.value}")
        return SIGNALLED + ctrl_c.signal
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
