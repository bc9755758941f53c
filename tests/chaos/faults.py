"""Everything that happens to a run, each kind in a thread of its own until its quota is met."""

from __future__ import annotations

import hashlib
import random
import signal
import threading
import time
from collections import Counter
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Final

from mlx_serving.worker.delivery.sweeper import reap_interval_seconds
from tests.chaos.forgetting import ForgetfulRedis, Forgetting
from tests.chaos.hand import Hand
from tests.chaos.mutants import script_texts
from tests.chaos.trace import now
from tests.chaos.worker import FIRST_ROWS, HOLD_SECONDS, TRAPS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from mlx_serving.common.redis.local import LocalRedis
    from tests.chaos.fleet import Fleet, Slot
    from tests.chaos.plan import Plan
    from tests.support.lossy_proxy import LossyProxy

TRAP_SECONDS: Final = 4.0  # how long an armed worker may live on
STUCK_SECONDS: Final = 300.0
CLOCK_STEPS: Final = (2.0, 60.0, 3600.0, 400_000.0)  # seconds
WORKER_CALLS: Final = ("commit", "commit", "commit", "claim", "renew", "release")


class Tormentors:
    """Starts with the context; `over` says whether every quota is met."""

    def __init__(
        self, plan: Plan, fleet: Fleet, server: LocalRedis | ForgetfulRedis, folder: Path,
        *proxies: LossyProxy,
    ) -> None:  # fmt: skip
        """`proxies`: the workers', the producers', and any others that lead to the server.

        `folder` has the producers' clocks, `clock-*`.
        """
        self._plan, self._fleet, self._server, self._folder = plan, fleet, server, folder
        self._proxies = proxies
        self._workers_proxy, self._producers_proxy = proxies[:2]
        self._serving = threading.Lock()  # one at a time stops the server
        self.hand = Hand()
        self.forgettings: list[Forgetting] = []
        self._needles = needles(plan.mutant)
        self._stopping = threading.Event()
        self.counts: Counter[str] = Counter()
        self.outages: list[tuple[int, int]] = []  # ns: Redis killed, Redis answers again
        self.errors: list[BaseException] = []
        self.done = 0  # jobs that have ended; the run counts them
        kinds = {
            "kills": self._kill, "stops": self._stop, "lost_replies": self._lose_reply,
            "redis_kills": self._kill_redis, "machine_kills": self._kill_machine,
            "clock_steps": self._step_clock, "odd_keys": self._plant_key,
            "failovers": self._fail_over, "restores": self._restore,
        }  # fmt: skip
        self._threads = [
            threading.Thread(target=self._run, args=(kind, name), name=name)
            for name, kind in kinds.items()
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End all; nothing is stopped, armed or away afterwards."""
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    @property
    def over(self) -> bool:
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self, once: Callable[[random.Random], None], name: str) -> None:
        rng = random.Random(f"{self._plan.seed} {name}")
        try:
            while self.counts[name] < self._plan.faults[name] and not self._stopping.is_set():
                once(rng)
        except BaseException as error:
            self.errors.append(error)
            raise

    def _pace(self, name: str, rng: random.Random) -> None:
        """Spread a fault over the jobs of the run: a fleet that never works shows little."""
        self._stopping.wait(rng.uniform(0, 0.5))
        until = time.monotonic() + self._plan.patience
        due = self.counts[name] * self._plan.jobs / self._plan.faults[name]
        while self.done < due and time.monotonic() < until and not self._stopping.is_set():
            time.sleep(0.05)

    def _pick(self, rng: random.Random) -> Slot | None:
        slot = self._fleet.pick(rng)
        if slot is None:
            self._stopping.wait(0.1)
        return slot

    # Workers

    def _kill(self, rng: random.Random) -> None:
        self._pace("kills", rng)
        slot = self._pick(rng)
        if slot is None:
            return
        with_parent = rng.random() < 0.6
        try:
            where = rng.choice([*TRAPS, "any time", "any time"])
            if where != "any time" and self._spring(slot, where, with_parent=with_parent):
                self.counts[f"kill in {where}"] += 1
            else:
                self.counts["kill at any time"] += 1
                self._fleet.kill(slot.worker, "any time", parent=with_parent)
            self.counts["kills"] += 1
            self.counts["kills of both" if with_parent else "kills of the child alone"] += 1
        finally:
            slot.lock.release()

    def _spring(self, slot: Slot, trap: str, *, with_parent: bool) -> bool:
        """Let the child kill itself at this place; False where it never came there."""
        worker, child = slot.worker, slot.worker.child
        worker.traps.arm(trap, with_parent=with_parent)
        until = time.monotonic() + TRAP_SECONDS
        while time.monotonic() < until and not self._stopping.is_set():
            if not worker.traps.armed(trap):
                self._fleet.deaths[child] = (now(), trap)  # its trace knows better
                return True
            time.sleep(0.01)
        worker.traps.disarm()
        return False

    def _stop(self, rng: random.Random) -> None:
        """SIGSTOP past the lease: when it goes on, its jobs are another's."""
        self._pace("stops", rng)
        slot = self._pick(rng)
        if slot is None:
            return
        parent = rng.random() < 0.5
        try:
            slot.worker.signal(signal.SIGSTOP, parent=parent)
            reap = reap_interval_seconds(self._plan.lease)
            self._stopping.wait(self._plan.lease * rng.uniform(1.05, 1.8) + reap)
            slot.worker.signal(signal.SIGCONT)
            self.counts["stops"] += 1
        finally:
            slot.worker.signal(signal.SIGCONT)
            slot.lock.release()

    def _kill_machine(self, rng: random.Random) -> None:
        self._pace("machine_kills", rng)
        slots = self._fleet.machine(rng)
        with ExitStack() as stack:
            for slot in slots:
                stack.enter_context(slot.lock)
            if not all(slot.worker.serving for slot in slots):
                return
            self._fleet.kill_machine(slots)
            self.counts["machine_kills"] += 1

    def _step_clock(self, rng: random.Random) -> None:
        """Let the wall clock of a worker's machine, or of a producer's, be wrong from now on."""
        self._pace("clock_steps", rng)
        clocks = [slot.clock for slot in self._fleet.slots]
        clocks += sorted(self._folder.glob("clock-*"))
        error = rng.choice(CLOCK_STEPS) * rng.choice((-1, 1))
        rng.choice(clocks).write_text(str(error))
        self.counts["clock_steps"] += 1

    # Redis

    @contextmanager
    def _server_to_stop(self) -> Iterator[bool]:
        """Nobody else stops the server meanwhile; False if the run ends."""
        with self._serving:
            yield not self._stopping.is_set()

    def _plant_key(self, rng: random.Random) -> None:
        self._pace("odd_keys", rng)
        with self._server_to_stop() as go_on, self._server.client() as client:
            if go_on and self.hand.plant(client, rng):
                self.counts["odd_keys"] += 1

    def _fail_over(self, rng: random.Random) -> None:
        """Promote a replica that missed a while; every third time also the first rows of a worker.

        Its attempts are then some that the new primary knows nothing of, and may give again.
        """
        self._pace("failovers", rng)
        assert isinstance(self._server, ForgetfulRedis)
        with self._server_to_stop() as go_on:
            if not go_on:
                return
            self._server.follow()
            if self.counts["failovers"] % 3:
                self._server.cut_link()
                self._stopping.wait(rng.uniform(0.0, 1.5))
                self._forgot(self._server.promote(self._proxies))
            else:
                self._return_into_failover()
            self.counts["failovers"] += 1

    def _return_into_failover(self) -> None:
        """All machines die; of the first worker that is back, the first rows are late."""
        assert isinstance(self._server, ForgetfulRedis)
        slots = self._fleet.slots
        with ExitStack() as stack:
            for slot in slots:
                stack.enter_context(slot.lock)
            self._fleet.kill_machine(slots)
            self._server.cut_link()
            slots[0].tend()
            worker = slots[0].worker
            worker.traps.arm(FIRST_ROWS, with_parent=False)
            self._wait(lambda: worker.traps.holding or worker.stuck)
            self._forgot(self._server.promote(self._proxies))
            # They go on by themselves as soon as their worker has claimed one of their jobs again.
            self._wait(lambda: not worker.traps.holding, HOLD_SECONDS / 2)
            self.counts["jobs claimed again"] += not worker.traps.holding
            worker.traps.disarm()

    def _restore(self, rng: random.Random) -> None:
        self._pace("restores", rng)
        assert isinstance(self._server, ForgetfulRedis)
        copy = self._folder / "copy"
        with self._server_to_stop() as go_on:
            if not go_on:
                return
            self._server.copy(copy)
            self._stopping.wait(rng.uniform(0.0, 1.5))
            self._forgot(self._server.restore(copy, self._proxies))
            self.counts["restores"] += 1

    def _forgot(self, forgetting: Forgetting) -> None:
        self.forgettings.append(forgetting)
        self.outages.append((forgetting.closed, forgetting.opened))

    def _wait(self, for_what: Callable[[], bool], seconds: float = STUCK_SECONDS) -> None:
        until = time.monotonic() + seconds
        while not for_what() and time.monotonic() < until and not self._stopping.is_set():
            time.sleep(0.005)

    def _lose_reply(self, rng: random.Random) -> None:
        workers = rng.random() < 0.7
        proxy = self._workers_proxy if workers else self._producers_proxy
        call = rng.choice(WORKER_CALLS) if workers else rng.choice(("enqueue", "read"))
        lost = proxy.lost
        proxy.lose_reply_to(self._needles[call])
        self._stopping.wait(rng.uniform(0.1, 0.6))
        if proxy.lost > lost:
            self.counts[f"lost reply to {call}"] += proxy.lost - lost
            self.counts["lost_replies"] += proxy.lost - lost

    def _kill_redis(self, rng: random.Random) -> None:
        self._stopping.wait(rng.uniform(*self._plan.redis_pause))
        if self._stopping.is_set():
            return
        with self._server_to_stop():
            killed = now()
            self._server.kill()
            time.sleep(rng.choice([0.0, rng.uniform(0, 1.0)]))
            self._server.start()
            self.outages.append((killed, now()))
            self.counts["redis_kills"] += 1


def needles(mutant: str) -> dict[str, bytes]:
    """What marks each call on the wire: a script's hash, or the command of a stream's read."""
    texts = script_texts(mutant)
    shas = {name: hashlib.sha1(text.encode()).hexdigest() for name, text in texts.items()}  # noqa: S324 -- Redis's own name for a script
    return {name: sha.encode() for name, sha in shas.items()} | {"read": b"XRANGE"}
