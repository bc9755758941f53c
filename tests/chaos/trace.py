"""What a worker's processes do, written down by themselves: kept over SIGKILL, read after the run.

One line a fact, appended by one system call. Times are ns of the host's monotonic clock.

    C sent t job epoch nonce           a claim's reply named it
    P t job epoch                      the engine took it
    T t job epoch tokens               decoded, and in the publisher's hands
    K sent t job epoch seq kind status nonce crc
                                       a row of a commit, and what Redis said to it
    R t job epoch status               a row of a release
    Q t job outcome                    a sweep, or the parent after a death, put it back
    X t where                          the child kills itself now
    H t where                          one of its threads stands still here
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pathlib import Path

Attempt = tuple[str, int]


class Claim(NamedTuple):
    """A job that a claim's reply gave to a worker."""

    sent: int
    replied: int
    job_id: str
    epoch: int
    nonce: str


class Commit(NamedTuple):
    """A row of a commit: `kind` is attempt, tokens or end; `crc` of the event that it writes."""

    sent: int
    replied: int
    job_id: str
    epoch: int
    seq: int
    kind: str
    status: str
    nonce: str
    crc: int


class TraceWriter:
    """The child's side."""

    def __init__(self, folder: Path) -> None:
        path = folder / f"trace.{os.getpid()}"
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def write(self, *lines: tuple[object, ...]) -> None:
        text = "".join(" ".join(map(str, line)) + "\n" for line in lines)
        os.write(self._file, text.encode())


@dataclass
class Trace:
    """One child's life."""

    worker: str
    pid: int
    claims: dict[Attempt, int] = field(default_factory=dict)
    claimed: list[Claim] = field(default_factory=list)
    prefills: dict[Attempt, int] = field(default_factory=dict)
    decoded: defaultdict[Attempt, int] = field(default_factory=lambda: defaultdict(int))
    commits: list[Commit] = field(default_factory=list)
    given_back: set[Attempt] = field(default_factory=set)
    requeues: list[tuple[int, str]] = field(default_factory=list)  # ns, job id
    suicide: tuple[int, str] | None = None

    def held_at_death(self) -> set[Attempt]:
        """Attempts that it had neither ended, nor lost, nor given back, as far as it knew."""
        over = {
            (c.job_id, c.epoch)
            for c in self.commits
            if c.status in {"FENCED", "GAP", "ERROR"} or c.kind == "end"
        }
        return set(self.claims) - over - self.given_back

    def last_success(self) -> int:
        """When Redis answered it the last time."""
        return max([c.replied for c in self.commits] + list(self.claims.values()), default=0)


def read(path: Path) -> Trace:
    trace = Trace(path.parent.name, int(path.suffix[1:]))
    whole, _, _ = path.read_text().rpartition("\n")  # SIGKILL may tear the last line
    for line in whole.splitlines():
        what, *words = line.split(" ")
        _take(trace, what, words)
    return trace


def _take(trace: Trace, what: str, words: list[str]) -> None:
    if what == "C":
        sent, replied, job_id, epoch, nonce = words
        trace.claims[job_id, int(epoch)] = int(replied)
        trace.claimed.append(Claim(int(sent), int(replied), job_id, int(epoch), nonce))
    elif what == "P" and len(words) == 3:  # not the warm-up's
        trace.prefills[words[1], int(words[2])] = int(words[0])
    elif what == "T" and len(words) == 4:
        trace.decoded[words[1], int(words[2])] += int(words[3])
    elif what == "K":
        sent, replied, job_id, epoch, seq, kind, status, nonce, crc = words
        times_and_name = (int(sent), int(replied), job_id)
        trace.commits.append(
            Commit(*times_and_name, int(epoch), int(seq), kind, status, nonce, int(crc))
        )
    elif what == "R" and words[3] == "OK":
        trace.given_back.add((words[1], int(words[2])))
    elif what == "Q" and words[2] in {"requeued", "charged"}:
        trace.requeues.append((int(words[0]), words[1]))
    elif what == "X":
        trace.suicide = (int(words[0]), words[1])


def read_all(folder: Path) -> list[Trace]:
    return [read(path) for path in sorted(folder.glob("*/trace.*"))]


def now() -> int:
    return time.monotonic_ns()
