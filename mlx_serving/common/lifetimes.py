"""How long Redis keeps what it holds of a job, apart from the job's own `result_ttl`."""

from __future__ import annotations

from typing import NamedTuple


class Lifetimes(NamedTuple):
    """Times in seconds, written into a job's control hash at its enqueue.

    They stand here in the order in which `enqueue.lua` takes them.
    """

    queued: int = 7 * 24 * 3600
    """A job that no worker takes for so long ends as expired, code `unserved`."""

    events: int = 300
    """Events after the job's end; never longer than its result."""

    failed: int = 7 * 24 * 3600
    """All of a failed or dead job after its end, for a requeue; never shorter than its result."""


DEFAULT = Lifetimes()
