"""The engine thread: the only one that uses the engines and MLX."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import structlog

from mlx_serving.worker.claiming.shortage import Shortage
from mlx_serving.worker.engine.interface import RequestRefusedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from mlx_serving.worker.engine.engine_set import EngineSet
    from mlx_serving.worker.engine.interface import Output, Request

log = structlog.get_logger(__name__)

IDLE_SECONDS = 0.5
LOOK_SECONDS: Final = 0.25  # between two looks for requests that are gone, and for room
FIRST_STEP_SECONDS: Final = 60.0  # the longest first step of a model, on any device


@dataclass(frozen=True, slots=True)
class LoopTimes:
    """How long one turn of the loop may take.

    `stall_seconds`: a turn with a step, after the first timed step of its model. `slice_seconds`:
    how much longer a turn with a slice of `interleave` may take.
    """

    stall_seconds: float = 10.0
    slice_seconds: float = 0.0


class EngineThread(threading.Thread):
    """Loads the first models, then steps their engines while there is work.

    `on_outputs` is called with each step's outputs when the next step is launched, or when there is
    no next step: a launch takes most of a step's time and releases the interpreter, so other
    threads can work on the outputs then. `on_refused(request_id, code, message)` is called for a
    request that the engine refused; `on_room` when rows left the batch or requests entered it.
    `paused` is called before each step: a deliberate pause counts as progress, a step that does
    not return does not (`stalled_for`). `tend` is called between steps, at least twice a second,
    with the number of steps so far.
    """

    def __init__(
        self,
        load: Callable[[], EngineSet],
        *,
        on_outputs: Callable[[Sequence[Output]], None],
        on_refused: Callable[[str, str, str], None],
        on_room: Callable[[], None],
        paused: Callable[[], bool],
        times: LoopTimes = LoopTimes(),
        tend: Callable[[int], None] = lambda _: None,
    ) -> None:
        super().__init__(name="engine", daemon=True)
        self._load, self._on_outputs, self._on_refused = load, on_outputs, on_refused
        self._paused, self._on_room, self._tend = paused, on_room, tend
        self._slices: deque[Iterator[None]] = deque()
        self._times, self._in_slice = times, False
        self._changed = threading.Condition()
        self._requests: deque[Request] = deque()
        self.shortage = Shortage()  # requests that were handed back for lack of room
        self._aborts: deque[str] = deque()
        self._halting = False
        self._turns = self._submitted_at_turn = 0
        self._at_launch_error: Exception | None = None
        self._outputs: list[Output] = []  # of the last step, until the next launch
        self._here: set[str] = set()  # ids of requests that were submitted and have not ended
        self._looked_at = self._room_sought_at = 0.0
        self._rows_left = False  # whether rows left since room was sought
        self.steps = 0  # of the engine
        self._progress_at = time.monotonic()
        self.engine: EngineSet | None = None
        self.ready = threading.Event()
        self.halted = threading.Event()
        self.failure: BaseException | None = None

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests; the engine admits them when it has room, the highest lane first."""
        with self._changed:
            self._here |= {request.id for request in requests}
            self._requests.extend(requests)
            self._requests = deque(sorted(self._requests, key=lambda request: request.rank))
            self._submitted_at_turn = self._turns
            self._changed.notify()

    def unadmitted(self) -> list[Request] | None:
        """Requests that the engine has no room for; None while it has not looked yet."""
        with self._changed:
            if self._requests and self._turns < self._submitted_at_turn + 2:
                return None
            return list(self._requests)

    def in_line(self) -> list[Request]:
        """Requests that were submitted and not admitted, whether or not the engine has looked."""
        with self._changed:
            return list(self._requests)

    def withdraw(self, request_ids: set[str]) -> set[str]:
        """Take back requests that are not admitted yet; returns the ids of those taken back."""
        with self._changed:
            caught = {request.id for request in self._requests} & request_ids
            self._requests = deque(r for r in self._requests if r.id not in caught)
            return caught

    def has(self, request_id: str) -> bool:
        """Say whether a submitted request was here at the last look, in line or admitted.

        A job's lease is renewed only if this is true, so that no job is kept that is not computed.
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
            self._here &= here | {request.id for request in self._requests}

    def abort(self, request_id: str) -> None:
        """Queue an abort; unknown ids are ignored."""
        with self._changed:
            self._aborts.append(request_id)
            self._changed.notify()

    def interleave(self, slices: Iterator[None]) -> None:
        """Do work in the engine thread, one slice after each step; it must not raise."""
        with self._changed:
            self._slices.append(slices)
            self._changed.notify()

    def halt(self) -> None:
        """Stop stepping for good; `halted` is set when the last outputs are handed over."""
        with self._changed:
            self._halting = True
            self._changed.notify()

    @property
    def stalled_for(self) -> float:
        """Seconds since the last progress, beyond a slice; 0 before the first models are loaded."""
        if not self.ready.is_set() or self.halted.is_set():
            return 0.0
        allowed = self._times.slice_seconds if self._in_slice else 0.0
        return max(0.0, time.monotonic() - self._progress_at - allowed)

    @property
    def stall_seconds(self) -> float:
        """The most that `stalled_for` may be now: more until a model's first step is timed."""
        first = self.engine is not None and self.engine.first_use
        usual = self._times.stall_seconds
        return max(FIRST_STEP_SECONDS, usual) if first else usual

    @property
    def time_left(self) -> float:
        """Seconds that the loop may still be without progress."""
        # Read in this order: the end of a first step is noted as progress before it is timed.
        allowed = self.stall_seconds
        return allowed - self.stalled_for

    def run(self) -> None:
        """Load, then loop; an error of the engine is kept as `failure` and ends the thread."""
        try:
            self.engine = self._load()
        except BaseException as error:  # noqa: BLE001 -- the main thread reports it
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
        except BaseException as error:  # after any error the process must end
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
        self._rows_left |= bool(aborts)
        if aborts or admitted or self._ends_shortage(engine):
            self._on_room()
        if self._slices:
            self._hand_over()
            self._do_slice(self._slices[0])
        return True

    def _step(self, engine: EngineSet) -> None:
        """Do a step; its outputs are handed over at the next launch, or now if no step follows."""
        outputs = engine.step()
        self.steps += 1
        if self._at_launch_error is not None:
            raise self._at_launch_error
        self._hand_over()  # outputs of the step before, if nothing was launched
        self._outputs = outputs
        if not engine.has_work:
            self._hand_over()

    def _at_launch(self) -> None:
        """Hand over within a step; an error is raised after the step, since it is not the step's.

        Each launch is progress.
        """
        self._note_progress()
        try:
            self._hand_over()
        except Exception as error:  # noqa: BLE001 -- see above
            self._at_launch_error = error

    def _hand_over(self) -> None:
        """Pass on the outputs of the last step."""
        outputs, self._outputs = self._outputs, []
        if outputs:
            self._on_outputs(outputs)
            if any(output.finish_reason for output in outputs):
                self._rows_left = True
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
        """Say whether there is room now for a request that was handed back for lack of it.

        The search may take as long as a step: it is done now and then, after rows have left.
        """
        now = time.monotonic()
        if not self.shortage or now - self._room_sought_at < LOOK_SECONDS:
            return False
        if engine.has_work and not self._rows_left:
            return False
        self._room_sought_at, self._rows_left = now, False
        return self.shortage.settle(engine.can_add)

    def _admissible(self, engine: EngineSet) -> bool:
        return bool(self._requests) and engine.can_add(self._requests[0])

    def _admit(self, engine: EngineSet) -> int:
        """Give the engine requests in order, as far as there is room; returns how many."""
        admitted = 0
        while True:
            with self._changed:
                if not self._admissible(engine):
                    return admitted
                request = self._requests.popleft()
            admitted += 1
            try:
                engine.add(request)
            except RequestRefusedError as error:
                if error.code == "no_room":  # parking freed less than expected
                    with self._changed:
                        self._requests.appendleft(request)
                    return admitted - 1
                self._on_refused(request.id, error.code, str(error))
            except Exception as error:  # noqa: BLE001 -- a failing job fails alone
                self._on_refused(request.id, "engine_error", type(error).__name__)
