"""Cancels the job of a command that ends before the job does: by a signal, or by an error."""

from __future__ import annotations

import math
import signal
import threading
import time
from queue import SimpleQueue
from typing import TYPE_CHECKING, Final, Self

from mlx_serving.cli.console import note
from mlx_serving.common.errors import JobNotFound, MlxServingError, QueueUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from mlx_serving.producer.client import Client

ENDING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
TRY_SECONDS: Final = 10.0  # that a cancel is tried after a signal; a second one makes it SHORT
SHORT_SECONDS: Final = 2.0
END_SECONDS: Final = 5.0  # from the cancel to the job's end; its worker may be dead
LATE_SECONDS: Final = 1.0  # that an enqueue with a lost reply may take to get to Redis
AGAIN_SECONDS: Final = 0.5  # between two tries; and kernel and shell both send SIGHUP at once
TICK_SECONDS: Final = 0.05


class Canceller:
    """Cancels a job unless its end was seen; a signal does it in another thread.

    The stream goes on meanwhile, so no reply is half read and what was decoded is printed. Once
    there is nothing more to wait for, `KeyboardInterrupt` is raised in the main thread: the time is
    up, a second signal came, or the job was not even submitted. `with` then waits, for a bounded
    time, until the cancel is done. A second signal other than Ctrl-C counts only if it comes later:
    a closed terminal sends two.

    Args:
        job_id: known before the job is submitted.
        connect: makes a client for the thread; the main thread's may be amid a call.

    """

    def __init__(self, job_id: str, connect: Callable[[], Client]) -> None:
        self.signal = 0  # the first one that came
        self._job_id, self._connect = job_id, connect
        self._submitted = self._over = self._exiting = self._hurried = False
        self._came_s = self._wanted_s = self._done_s = 0.0
        self._until_s = math.inf  # when to give up an unanswered cancel
        self._wanted: SimpleQueue[bool] = SimpleQueue()  # a handler may put at any moment
        self._done = threading.Event()

    def __enter__(self) -> Self:
        threading.Thread(target=self._run, name="cancel", daemon=True).start()
        ours = [each for each in ENDING if signal.getsignal(each) is not signal.SIG_IGN]  # nohup
        self._before = {each: signal.signal(each, self._on_signal) for each in ours}
        return self

    def __exit__(self, *_: object) -> None:
        self._exiting = True
        if not self._over:
            if not self.signal:
                self._want(SHORT_SECONDS)
            while not self._done.is_set() and time.monotonic() < self._until_s:
                self._done.wait(TICK_SECONDS)
        self._wanted.put(False)
        if signal.SIGALRM in self._before:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for each, before in self._before.items():
            signal.signal(each, before)

    def submitted(self) -> None:
        """Note that Redis has the job."""
        self._submitted = True

    def over(self) -> None:
        """Note that there is nothing to cancel: the job has ended, or was refused."""
        self._over = True

    def _want(self, seconds: float) -> None:
        self._wanted_s = time.monotonic()
        self._until_s = self._wanted_s + seconds
        self._wanted.put(True)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        now_s = time.monotonic()
        if self.signal:
            if number == signal.SIGINT or now_s >= self._came_s + AGAIN_SECONDS:
                self._hurried = True
                self._until_s = min(self._until_s, now_s + SHORT_SECONDS)
            return
        self.signal, self._came_s = number, now_s
        self._want(TRY_SECONDS)
        self._before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._on_tick)
        signal.setitimer(signal.ITIMER_REAL, TICK_SECONDS, TICK_SECONDS)

    def _on_tick(self, _number: int, _frame: FrameType | None) -> None:
        if self._over or self._exiting:
            return
        now_s = time.monotonic()
        if self._done.is_set():
            leave = self._hurried or now_s >= self._done_s + END_SECONDS
        else:
            leave = now_s >= self._until_s
        if leave or not self._submitted:
            signal.setitimer(signal.ITIMER_REAL, SHORT_SECONDS, SHORT_SECONDS)  # if it gets lost
            raise KeyboardInterrupt

    def _run(self) -> None:
        if not self._wanted.get():
            return
        if self.signal:
            note(f"\ncancelling {self._job_id} (Ctrl-C again leaves without waiting)")
        with self._connect() as client:
            while not self._cancelled(client):
                time.sleep(AGAIN_SECONDS)
        self._done_s = time.monotonic()
        self._done.set()

    def _cancelled(self, client: Client) -> bool:
        """Try to cancel; return whether there is nothing more to try."""
        late = self._submitted or time.monotonic() >= self._wanted_s + LATE_SECONDS
        try:
            client.cancel(self._job_id)
        except JobNotFound:  # gone; or its enqueue is still on its way
            return late
        except MlxServingError as error:
            waits = isinstance(error, QueueUnavailable)
            if self.signal:
                note(f"not cancelled{' yet' if waits else ''}: {error.code}: {error}")
            return not waits
        return True
