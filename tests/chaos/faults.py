"""Everything that happens to a run, each kind in a thread of its own until its quota is met."""

from __future__ import annotations

import hashlib
import random
import signal
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Final

from mlx_serving.worker.delivery.sweeper import reap_interval_seconds
from tests.chaos.mutants import script_texts
from tests.chaos.trace import now
from tests.chaos.worker import TRAPS

if TYPE_CHECKING:
    from collections.abc import Callable

    from mlx_serving.common.redis.local import LocalRedis
    from tests.chaos.fleet import Fleet, Slot
    from tests.chaos.plan import Plan
    from tests.support.lossy_proxy import LossyProxy

TRAP_SECONDS: Final = 4.0  # how long an armed worker may live on
WORKER_CALLS: Final = ("commit", "commit", "commit", "claim", "renew", "release")


class Tormentors:
    """Starts with the context; `over` says whether every quota is met."""

    def __init__(
        self, plan: Plan, fleet: Fleet, server: LocalRedis,
        workers_proxy: LossyProxy, producers_proxy: LossyProxy,
    ) -> None:  # fmt: skip
        self._plan, self._fleet, self._server = plan, fleet, server
        self._workers_proxy, self._producers_proxy = workers_proxy, producers_proxy
        self._needles = needles(plan.mutant)
        self._stopping = threading.Event()
        self.counts: Counter[str] = Counter()
        self.outages: list[tuple[int, int]] = []  # ns: Redis killed, Redis answers again
        self.errors: list[BaseException] = []
        self.done = 0  # jobs that have ended; the run counts them
        kinds = (self._kill, self._stop, self._lose_reply, self._kill_redis)
        names = ("kills", "stops", "lost_replies", "redis_kills")
        self._threads = [
            threading.Thread(target=self._run, args=(kind, name), name=name)
            for kind, name in zip(kinds, names, strict=True)
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

    # Redis

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
