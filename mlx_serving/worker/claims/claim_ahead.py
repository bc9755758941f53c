"""A claim that runs while the jobs of the one before it are read.

Redis takes its time for a claim, and may be busy with a commit; reading what it gave takes as long.
The claim is sent, and its reply is read when it is wanted: no thread waits for it, which would have
to wait for the interpreter, too, before it could send anything.
Only where a claim took all that it asked for is there likely to be more, so an idle worker never
claims ahead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlx_serving.common.job.schema import lane_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from mlx_serving.common.job.schema import Lane
    from mlx_serving.common.protocol.calls import Call, ClaimReply
    from mlx_serving.common.protocol.client import Protocol
    from mlx_serving.worker.claims.lane_claims import LaneClaim


@dataclass(frozen=True, slots=True)
class Claimed:
    """What a claim brought; `others`: other models have jobs waiting too."""

    reply: ClaimReply
    asked: LaneClaim
    others: bool = False
    in_order: bool = True  # lanes were looked into as they were asked for

    @property
    def full(self) -> bool:
        """Whether it took all that it asked for."""
        return len(self.reply.jobs) == self.asked.most

    @property
    def last_lane(self) -> Lane | None:
        """Lane that the last job came from, where those before it have no more."""
        known = self.in_order and not self.others and self.reply.jobs
        return lane_of(self.reply.jobs[-1].queue) if known else None


class ClaimAhead:
    """At most one claim under way, on a connection of its own. For the thread that claims."""

    def __init__(self, protocol: Protocol) -> None:
        self._protocol = protocol
        self._under_way: tuple[Callable[[float | None], ClaimReply], LaneClaim] | None = None

    @property
    def under_way(self) -> bool:
        """Whether a claim was sent whose reply nobody has taken."""
        return self._under_way is not None

    def begin(self, call: Call[ClaimReply], asked: LaneClaim) -> None:
        """Send a claim; `take` has its reply. No other may be under way."""
        self._under_way = self._protocol.send(call), asked

    def take(self, timeout: float | None = None) -> Claimed | None:
        """Wait for the claim under way; None where there is none.

        Raises:
            redis.RedisError: it failed, or is not back within `timeout` seconds.

        """
        if self._under_way is None:
            return None
        (receive, asked), self._under_way = self._under_way, None
        return Claimed(receive(timeout), asked)
