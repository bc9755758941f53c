"""CPU time of groups of processes, from /proc: Linux only."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

TICKS: Final = os.sysconf("SC_CLK_TCK")
BUSY: Final = 0.7  # P8 counts only while no process group uses more of its cores


def cpu_seconds(pid: int) -> float:
    """User and system time of all threads of a process since it began."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def children(pid: int) -> list[int]:
    """Process ids of a process's children; none where /proc does not say."""
    listed = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in listed.read_text().split()] if listed.exists() else []


@dataclass(frozen=True)
class GroupLoad:
    """Share of its cores that a group used over a window.

    A process of ours holds one core at a time (the interpreter's lock; Redis's one thread), so a
    group has as many cores as processes, or as the machine, whichever is less.
    """

    cores: int
    share: float  # of all the group's cores
    busiest: float  # of one core, by its busiest process

    @property
    def busy(self) -> bool:
        """Whether the group, or one process of it, had too little left to prove anything."""
        return max(self.share, self.busiest) > BUSY


def loads(
    before: Mapping[int, float],
    after: Mapping[int, float],
    groups: Mapping[str, Sequence[int]],
    seconds: float,
    machine_cores: int,
) -> dict[str, GroupLoad]:
    """Each group's load between two readings of `cpu_seconds` by process id."""
    result = {}
    for name, pids in groups.items():
        used = [(after[pid] - before[pid]) / seconds for pid in pids]
        cores = min(len(pids), machine_cores)
        result[name] = GroupLoad(cores, sum(used) / cores, max(used))
    return result


def read_all(groups: Mapping[str, Sequence[int]]) -> dict[int, float]:
    """`cpu_seconds` of every process."""
    return {pid: cpu_seconds(pid) for pids in groups.values() for pid in pids}
