"""The workers of a run: always so many, whatever is done to them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tests.chaos.trace import now
from tests.chaos.worker import Traps
from tests.support.paths import ROOT

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

    from tests.chaos.plan import Plan

# A worker that doesn't serve is stuck once it idled for so long, or once it computed for so long.
# Neither depends on what else this machine does: a start that waits for a core is not stuck.
IDLE_SECONDS = 20.0
BUSY_SECONDS = 60.0
MACHINE_SLOTS = 2  # workers of a machine
DRAIN_SECONDS = 120.0  # `worker.drain_seconds` is 30; the rest is for a machine with other work
PREFIX_BYTES = 4 << 20  # less than all prompts and answers of a run: blocks are evicted too


class Incarnation:
    """One parent and the children that it starts."""

    def __init__(self, plan: Plan, url: str, folder: Path, clock: Path) -> None:
        folder.mkdir()
        self.folder, self.name = folder, folder.name
        self._effort = Effort()
        self.traps = Traps(folder / "trap")
        given = {
            "url": url, "name": self.name, "folder": str(folder), "engine": plan.engine,
            "clock": str(clock),
            "mutant": plan.mutant, "settings": settings_of(plan),
        }  # fmt: skip
        with (folder / "log").open("wb") as log:
            self.parent = subprocess.Popen(
                [sys.executable, "-m", "tests.chaos.worker", json.dumps(given)],
                cwd=ROOT, stdout=log, stderr=log, start_new_session=True,
                env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
            )  # fmt: skip

    @property
    def child(self) -> int:
        """The newest child's process id, 0 before there is one."""
        pids = sorted(self.folder.glob("pid.*"), key=lambda path: path.stat().st_mtime_ns)
        return int(pids[-1].suffix[1:]) if pids else 0

    @property
    def serving(self) -> bool:
        child = self.child
        return (self.folder / f"ready.{child}").exists() and lives(child) and self.runs

    @property
    def runs(self) -> bool:
        return self.parent.poll() is None

    @property
    def stuck(self) -> bool:
        """Whether it will not come to serve: it has done nothing for long, or far too much."""
        if self.serving:
            self._effort = Effort()
            return False
        return self._effort.is_spent(cpu_seconds(self.parent.pid) + cpu_seconds(self.child))

    def signal(self, number: int, *, parent: bool = True) -> None:
        pids = [self.parent.pid] if parent and self.runs else []
        child = self.child
        for pid in [*pids, *([child] if lives(child) else [])]:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")[-3000:]


class Effort:
    """What a worker has put into its start."""

    def __init__(self) -> None:
        self._known: float | None = None
        self._busy = 0.0
        self._moved_at = time.monotonic()

    def is_spent(self, cpu: float) -> bool:
        """`cpu`: seconds that its processes have computed; less than before for a new child."""
        moved = 0.0 if self._known is None else abs(cpu - self._known)
        if moved > 0.02 or self._known is None:  # /proc counts in hundredths
            self._known, self._moved_at = cpu, time.monotonic()
            self._busy += moved
        return self._busy > BUSY_SECONDS or time.monotonic() - self._moved_at > IDLE_SECONDS


def cpu_seconds(pid: int) -> float:
    """Seconds that this process has computed; 0 if it is gone. Without /proc: time since boot."""
    if not Path("/proc/self/stat").exists():
        return time.monotonic()
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def settings_of(plan: Plan) -> dict[str, Any]:
    return {
        "cache__kind": "paged" if plan.prefix_cache else "padded",
        "cache__prefix_bytes": PREFIX_BYTES if plan.prefix_cache else 0,
        "worker__lease_seconds": plan.lease,
        "worker__rq_results": True,  # the audit looks at RQ's view whole
        "batch__max_rows": plan.rows,
    }


def lives(pid: int) -> bool:
    """Whether this process runs; a killed one that nobody has waited for does not."""
    if not pid:
        return False
    try:
        os.kill(pid, 0)
        stat = Path(f"/proc/{pid}/stat")
        return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


class Slot:
    """One place of the fleet; `lock` keeps two tormentors off the same worker."""

    def __init__(self, fleet: Fleet, index: int) -> None:
        self.fleet, self.index = fleet, index
        self.lock = threading.Lock()
        self.generation = 0
        self.clock = fleet.folder / f"clock-{index}"  # seconds that its machine's clock is wrong by
        self.clock.write_text("0")
        self.worker = self._start()

    def _start(self) -> Incarnation:
        self.generation += 1
        folder = self.fleet.folder / f"w{self.index}-{self.generation}"
        return Incarnation(self.fleet.plan, self.fleet.url, folder, self.clock)

    def tend(self) -> None:
        """Replace a parent that ended, or whose child does not come back."""
        worker = self.worker
        if not worker.runs:
            self.worker = self._start()
        elif worker.stuck:
            worker.signal(signal.SIGCONT)
            self.fleet.kill(worker, "stuck")


class Fleet:
    """Use as a context: at its end every process that it started is gone."""

    def __init__(self, plan: Plan, url: str, folder: Path) -> None:
        self.plan, self.url, self.folder = plan, url, folder
        self.deaths: dict[int, tuple[int, str]] = {}  # child's pid → ns of its end, why
        self.slots = [Slot(self, index) for index in range(plan.workers)]
        self._closing = threading.Event()
        self._tender = threading.Thread(target=self._tend, name="fleet")

    def __enter__(self) -> Self:
        try:
            for slot in self.slots:
                self._wait_for(slot)
        except BaseException:
            self._end()
            raise
        self._tender.start()
        return self

    def _wait_for(self, slot: Slot) -> None:
        while not slot.worker.serving:
            assert slot.worker.runs, slot.worker.log()
            assert not slot.worker.stuck, f"{slot.worker.name} is stuck: {slot.worker.log()}"
            time.sleep(0.05)

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._tender.join()
        self._end()

    def kill(self, worker: Incarnation, why: str, *, parent: bool = True) -> None:
        """SIGKILL; the parent first, so that it does not start another child."""
        self.deaths[worker.child] = (now(), why)
        worker.signal(signal.SIGKILL, parent=parent)
        if parent:
            worker.parent.wait()

    def kill_machine(self, slots: Sequence[Slot]) -> None:
        """SIGKILL parents and children of several workers, as a panic or a power cut does."""
        for slot in slots:
            self.deaths[slot.worker.child] = (now(), "its machine")
        for slot in slots:  # all parents first: nobody is left to tell of a child's death
            if slot.worker.runs:
                slot.worker.parent.kill()
        for slot in slots:
            slot.worker.signal(signal.SIGKILL)
            slot.worker.parent.wait()

    def machine(self, rng: random.Random) -> list[Slot]:
        """Return the slots of a machine that runs several workers."""
        starts = range(0, len(self.slots) - 1, MACHINE_SLOTS)
        start = rng.choice(starts)
        return self.slots[start : start + MACHINE_SLOTS]

    def drain(self) -> list[str]:
        """SIGTERM all once they serve; returns what was wrong with the way that they ended.

        Before that a worker may end of the signal itself: its handler may not stand yet.
        """
        until = time.monotonic() + DRAIN_SECONDS
        while not all(slot.worker.serving for slot in self.slots):
            if time.monotonic() > until:
                return [f"{slot.worker.name} does not serve" for slot in self.slots]
            time.sleep(0.05)  # the tender replaces what is stuck
        self._closing.set()
        self._tender.join()
        wrong = []
        for slot in self.slots:
            slot.worker.parent.terminate()
        for slot in self.slots:
            try:
                status = slot.worker.parent.wait(DRAIN_SECONDS)
            except subprocess.TimeoutExpired:
                status = -1
            if status:
                wrong.append(f"{slot.worker.name} ended with {status}: {slot.worker.log()}")
        return wrong

    def pick(self, rng: random.Random) -> Slot | None:
        """A slot whose worker serves and that nobody else torments; its lock is held."""
        for slot in rng.sample(self.slots, len(self.slots)):
            if slot.lock.acquire(blocking=False):
                if slot.worker.serving:
                    return slot
                slot.lock.release()
        return None

    def _tend(self) -> None:
        while not self._closing.wait(0.05):
            for slot in self.slots:
                if slot.lock.acquire(blocking=False):
                    with suppress(OSError):
                        slot.tend()
                    slot.lock.release()

    def _end(self) -> None:
        for slot in self.slots:
            slot.worker.signal(signal.SIGKILL)
            slot.worker.parent.wait()
            slot.worker.signal(signal.SIGKILL, parent=False)
