"""How a worker names its claims, and the attempts at jobs that they begin."""

from __future__ import annotations

import os
from typing import NamedTuple


def new_nonce() -> str:
    """Name for a claim that nobody else gives: 64 bits of the system's own randomness."""
    return os.urandom(8).hex()


class Attempt(NamedTuple):
    """One claim of a job, as its worker speaks of it.

    `epoch` counts the job's claims as Redis remembers them. Redis may forget one (a failover, a
    power loss) and give the same number again, so it is the `nonce` that tells attempts apart: the
    worker made it for its claim, and never again.
    """

    job_id: str
    epoch: int
    nonce: str

    @property
    def name(self) -> str:
        """All of it in a word, which begins with the job's id."""
        return f"{self.job_id}:{self.epoch}:{self.nonce}"

    @classmethod
    def parse(cls, name: str) -> Attempt:
        """Read a name.

        Raises:
            ValueError: it is none.

        """
        job_id, epoch, nonce = name.rsplit(":", 2)
        if not job_id or not (epoch.isascii() and epoch.isdigit()):
            message = f"{name!r} names no attempt"
            raise ValueError(message)
        return cls(job_id, int(epoch), nonce)
