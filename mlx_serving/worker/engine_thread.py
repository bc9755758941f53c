"""The engine thread: the only one that touches the engine and MLX."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import structlog

from mlx_serving.worker.claiming.shortage import Shortage
from mlx_serving.worker.engine.row import RequestRefusedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from mlx_serving.worker.engine.engine_set import EngineSet
    from mlx_serving.worker.engine.row import Output, Request

    Choices = Sequence[Request]  # of one job: admitted together, or not at all

log = structlog.get_logger(__name__)

IDLE_SECONDS = 0.5
LOOK_SECONDS: Final = 0.25  # how often it looks which requests are still here, and for room
FIRST_STEP_SECONDS: Final = 60.0  # what a model's first step may take, on any device


@dataclass(frozen=True, slots=True)
class RunnerTimes:
    """How long the loop may take to come round.

    `stall_seconds`: with a step, once one of its model was timed. `slice_seconds`: how much longer
    with a slice of `interleave`.
    """

    stall_seconds: float = 10.0
    slice_seconds: float = 0.0


class Runner(threading.Thread):
    """Loads the first models, then steps their engines while there is work.

    `on_outputs` gets each step's outputs when the next one is launched, or when none is: whoever
    works on them then has the interpreter, which a launch leaves free for most of a step's time.
    `on_refused(request_id, code, message)` gets a request that the engine would not take; `on_room`
    is called when rows left the batch or requests entered it.
    `paused` is asked before each step: a deliberate pause is progress, a step that does not come
    back is not (`stalled_for`). `tend` is called between steps, twice a second at least, with the
    number of steps so far.
    """

    def __init__(
        self,
        load: Callable[[], EngineSet],
        *,
        on_outputs: Callable[[Sequence[Output]], None],
        on_refused: Callable[[str, str, str], None],
        on_room: Callable[[], None],
        paused: Callable[[], bool],
        times: RunnerTimes = RunnerTimes(),
        tend: Callable[[int], None] = lambda _: None,
    ) -> None:
        super().__init__(name="engine", daemon=True)
        self._load, self._on_outputs, self._on_refused = load, on_outputs, on_refused
        self._paused, self._on_room, self._tend = paused, on_room, tend
        self._slices: deque[Iterator[None]] = deque()
        self._times, self._in_slice = times, False
        self._changed = threading.Condition()
        self._requests: deque[Choices] = deque()
        self.shortage = Shortage()  # what was handed back for lack of room
        self._aborts: deque[str] = deque()
        self._halting = False
        self._turns = self._submitted_at_turn = 0
        self._at_launch_error: Exception | None = None
        self._outputs: list[Output] = []  # of the last step, until the next one's launch
        self._here: set[str] = set()  # ids of requests that were submitted and are not over
        self._looked_at = self._sought_at = 0.0
        self._left = False  # whether rows left since room was sought
        self.steps = 0  # of the engine
        self._progress_at = time.monotonic()
        self.engine: EngineSet | None = None
        self.ready = threading.Event()
        self.halted = threading.Event()
        self.failure: BaseException | None = None

    def submit(self, requests: Sequence[Choices]) -> None:
        """Queue jobs' choices; the engine admits them as it has room, the highest lane first."""
        with self._changed:
            self._here |= {choices[0].id for choices in requests}
            self._requests.extend(requests)
            self._requests = deque(sorted(self._requests, key=lambda choices: choices[0].rank))
            self._submitted_at_turn = self._turns
            self._changed.notify()

    def unadmitted(self) -> list[Choices] | None:
        """Jobs' choices that the engine has no room for; None while it has not looked yet."""
        with self._changed:
            if self._requests and self._turns < self._submitted_at_turn + 2:
                return None
            return list(self._requests)

    def in_line(self) -> list[Choices]:
        """Jobs' choices that were submitted and not admitted, whether or not it has looked."""
        with self._changed:
            return list(self._requests)

    def withdraw(self, request_ids: set[str]) -> set[str]:
        """Take requests back that were not admitted; returns those that it caught in time."""
        with self._changed:
            caught = {choices[0].id for choices in self._requests} & request_ids
            self._requests = deque(c for c in self._requests if c[0].id not in caught)
            return caught

    def has(self, request_id: str) -> bool:
        """Say whether a request that was submitted was here when last looked, in line or admitted.

        Whoever keeps a job's lease asks this, so that a job that nothing computes is not kept.
        """
        with self._changed:
            return request_id in self._here

    def _look(self, engine: EngineSet) -> None:
        now = time.monotonic()
        if now - self._looked_at < LOOK_SECONDS:
            return
        self._looked_at = now
        here = engine.request_ids | {output.request_id for output in self._outputs}
        with self._changed:
            self._here &= here | {choices[0].id for choices in self._requests}

    def abort(self, request_id: str) -> None:
        """Queue an abort; unknown ids are ignored."""
        with self._changed:
            self._aborts.append(request_id)
            self._changed.notify()

    def interleave(self, slices: Iterator[None]) -> None:
        """Have work done in the engine thread, a slice after each step; it must not raise."""
        with self._changed:
            self._slices.append(slices)
            self._changed.notify()

    def halt(self) -> None:
        """Stop stepping for good; `halted` is set once the last outputs were handed over."""
        with self._changed:
            self._halting = True
            self._changed.notify()

    @property
    def stalled_for(self) -> float:
        """Seconds since the loop should have come round; 0 before the first models are loaded."""
        if not self.ready.is_set() or self.halted.is_set():
            return 0.0
        allowed = self._times.slice_seconds if self._in_slice else 0.0
        return max(0.0, time.monotonic() - self._progress_at - allowed)

    @property
    def stall_seconds(self) -> float:
        """The most that `stalled_for` may be now: longer before a model's first step is timed."""
        first = self.engine is not None and self.engine.first_use
        usual = self._times.stall_seconds
        return max(FIRST_STEP_SECONDS, usual) if first else usual

    @property
    def time_left(self) -> float:
        """Seconds for which it may still make no progress.

        Read in this order: a first step that ends is progress before it is timed.
        """
        allowed = self.stall_seconds
        return allowed - self.stalled_for

    def run(self) -> None:
        """Load, then loop; a failure of the engine itself is kept and ends the thread."""
        try:
            self.engine = self._load()
        except BaseException as error:  # noqa: BLE001 -- the main thread says it
            self.failure = error
            self.halted.set()
            self.ready.set()
            return
        self._serve(self.engine)

    def _serve(self, engine: EngineSet) -> None:
        try:
            self._note_progress()
            engine.on_launch = self._at_launch
            engine.on_stepped = self._note_progress
            self.ready.set()
            while self._turn(engine):
                self._note_progress()
        except BaseException as error:  # whatever it is, the process must end
            self.failure = error
            log.exception("engine_failed")
        finally:
            try:
                self._hand_over()
            finally:
                self.halted.set()
                self.ready.set()

    def _note_progress(self) -> None:
        self._progress_at = time.monotonic()

    def _turn(self, engine: EngineSet) -> bool:
        paused = self._paused()
        if paused or not engine.has_work:
            self._hand_over()
        with self._changed:
            self._turns += 1
            busy = self._aborts or self._admissible(engine) or (engine.has_work and not paused)
            if not (busy or self._slices or self._halting):
                self._changed.wait(0.01 if paused else IDLE_SECONDS)
            aborts, self._aborts = self._aborts, deque()
            if self._halting:
                return False
        self._tend(self.steps)
        self._look(engine)
        for request_id in aborts:
            engine.abort(request_id)
        self.withdraw(set(aborts))
        admitted = self._admit(engine)
        if engine.has_work and not paused:
            self._step(engine)
        self._left |= bool(aborts)
        if aborts or admitted or self._ends_shortage(engine):
            self._on_room()
        if self._slices:
            self._hand_over()
            self._do_slice(self._slices[0])
        return True

    def _step(self, engine: EngineSet) -> None:
        """Do a step; what it brings goes at the next one's launch, or now where none follows."""
        outputs = engine.step()
        self.steps += 1
        if self._at_launch_error is not None:
            raise self._at_launch_error
        self._hand_over()  # what was there before, where nothing was launched
        self._outputs = outputs
        if not engine.has_work:
            self._hand_over()

    def _at_launch(self) -> None:
        """Hand over; what fails is no failure of the engine's step, and raised after it.

        A step that comes to another launch goes on.
        """
        self._note_progress()
        try:
            self._hand_over()
        except Exception as error:  # noqa: BLE001 -- see above
            self._at_launch_error = error

    def _hand_over(self) -> None:
        """Pass on what the last step brought."""
        outputs, self._outputs = self._outputs, []
        if outputs:
            self._on_outputs(outputs)
            if any(output.finish_reason for output in outputs):
                self._left = True
                self._on_room()

    def _do_slice(self, slices: Iterator[None]) -> None:
        self._note_progress()  # the step before it was in time
        self._in_slice = True
        try:
            next(slices)
        except StopIteration:
            self._slices.popleft()
        finally:
            self._progress_at, self._in_slice = time.monotonic(), False

    def _ends_shortage(self, engine: EngineSet) -> bool:
        """Say whether there is room now for a job that there was none for.

        To seek room may take as long as a step: it is done now and then, where rows have left.
        """
        now = time.monotonic()
        if not self.shortage or now - self._sought_at < LOOK_SECONDS:
            return False
        if engine.has_work and not self._left:
            return False
        self._sought_at, self._left = now, False
        return self.shortage.settle(engine.can_add)

    def _admissible(self, engine: EngineSet) -> bool:
        return bool(self._requests) and engine.can_add(*self._requests[0])

    def _admit(self, engine: EngineSet) -> int:
        """Hand requests over in order, as far as there is room; returns how many."""
        admitted = 0
        while True:
            with self._changed:
                if not self._admissible(engine):
                    return admitted
                choices = self._requests.popleft()
            admitted += 1
            try:
                engine.add(*choices)
            except RequestRefusedError as error:
                if error.code == "no_room":  # less room could be made than there seemed to be
                    with self._changed:
                        self._requests.appendleft(choices)
                    return admitted - 1
                self._on_refused(choices[0].id, error.code, str(error))
            except Exception as error:  # noqa: BLE001 -- a failing job fails alone
                self._on_refused(choices[0].id, "engine_error", type(error).__name__)
