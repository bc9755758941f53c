"""Why Redis refused a job of a tenant, as scripts reply and as people are told."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Refusal(NamedTuple):
    """Why a job was not enqueued.

    `queued`: its tenant has `found` jobs waiting and may have `limit`. `running`: it has `found`
    rows, and its tenant may run `limit`. `digest`: there is a job of this id with another payload.
    """

    reason: Literal["queued", "running", "digest"]
    limit: int = 0
    found: int = 0

    def of_tenant(self, tenant: str) -> str:
        """Tell people which of a tenant's limits the job met, with both numbers."""
        if self.reason == "running":
            return f"the job has {self.found} rows, and tenant {tenant!r} may run {self.limit}"
        return f"tenant {tenant!r} has {self.found} jobs queued and may have {self.limit}"
