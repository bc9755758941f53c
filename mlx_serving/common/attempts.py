"""How a worker names its claims, and the attempts at jobs that they begin."""

from __future__ import annotations

import os
from typing import Final, NamedTuple

TAG_CHARS: Final = 8
"""How much of an attempt's nonce its events carry."""


LIFE: Final = os.urandom(4).hex()
"""Of this process: a worker that is started again under its name has another one."""


def new_nonce(machine: str = "", life: str = "") -> str:
    """Return a name for a claim: 64 random bits as 16 hex digits, "-<life>" and "-<machine>".

    `machine` (hex digits) tells which machine was lost, if the worker is; `life` (`LIFE`) whether
    the worker that comes back is the one that was lost. Either may be left out.
    """
    return "-".join(filter(None, (os.urandom(8).hex(), life, machine)))


class Attempt(NamedTuple):
    """One claim of a job, as its worker speaks of it.

    `epoch` counts the job's claims as Redis remembers them. Redis may forget one (a failover, a
    power loss) and give the same number again. The `nonce` tells attempts apart: a worker makes a
    new one for each claim.
    """

    job_id: str
    epoch: int
    nonce: str

    @property
    def name(self) -> str:
        """The attempt as one string: ``<job id>:<epoch>:<nonce>``."""
        return f"{self.job_id}:{self.epoch}:{self.nonce}"

    @property
    def tag(self) -> str:
        """What its events carry, so that a reader tells it from an attempt of the same epoch."""
        return self.nonce[:TAG_CHARS]

    @classmethod
    def parse(cls, name: str) -> Attempt:
        """Read a name.

        Raises:
            ValueError: the string is not an attempt's name.

        """
        job_id, epoch, nonce = name.rsplit(":", 2)
        if not job_id or not (epoch.isascii() and epoch.isdigit()):
            message = f"{name!r} names no attempt"
            raise ValueError(message)
        return cls(job_id, int(epoch), nonce)
