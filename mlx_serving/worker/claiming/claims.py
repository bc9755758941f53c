"""Takes jobs from the queues of the models that are in memory, the next while these are read.

Redis takes time for a claim, and may be busy with a commit; reading the jobs takes as long. So the
next claim is sent while the jobs of the last one are read, and its reply is read when it is wanted.
No thread waits for it: a thread would have to wait for the interpreter before it could send.
More jobs are likely only if a claim brought all that it asked for, so an idle worker never claims
ahead.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import structlog

from mlx_serving.common.attempts import LIFE, new_nonce
from mlx_serving.common.machine import machine_id
from mlx_serving.common.protocol import calls
from mlx_serving.common.queues import PROTOCOL, lane_of, model_of
from mlx_serving.worker.claiming.placement import ModelQueues

if TYPE_CHECKING:
    from collections.abc import Callable

    from mlx_serving.common.protocol.calls import Call, ClaimReply, HeldRows
    from mlx_serving.common.protocol.client import Protocol
    from mlx_serving.common.queues import Lane
    from mlx_serving.worker.claiming.lane_claims import LaneClaim, LaneNews
    from mlx_serving.worker.claiming.placement import Placement
    from mlx_serving.worker.claiming.shortage import Shortage

    _ClaimCall = Callable[..., Call[ClaimReply]]  # takes `most`


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
        """Lane that the last job came from, if the lanes before it are known to have no more."""
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
        """Wait for the claim under way; None if there is none.

        Raises:
            redis.RedisError: it failed, or is not back within `timeout` seconds.

        """
        if self._under_way is None:
            return None
        (receive, asked), self._under_way = self._under_way, None
        return Claimed(receive(timeout), asked)


log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ClaimTerms:
    """What every claim of a worker says of it."""

    worker: str
    rows: int
    lease_ms: int
    max_payload_bytes: int
    affinity_ms: int


class Claims:
    """One claim at a time, of one model's queues. For the thread that claims.

    A claim whose reply was lost may have taken jobs, and may yet reach Redis: it is sent again, to
    take no more than it did, before any other is made.

    Raises:
        redis.RedisError: from every method that asks Redis.

    """

    def __init__(
        self,
        terms: ClaimTerms,
        protocol: Protocol,
        placement: Placement,
        held_rows: Callable[[], HeldRows],
        news: LaneNews,
        shortage: Shortage,
    ) -> None:
        self._shortage = shortage
        self._terms, self._protocol, self._placement = terms, protocol, placement
        self._held_rows, self._news = held_rows, news
        self._ahead = ClaimAhead(protocol)
        self._unanswered: tuple[_ClaimCall, LaneClaim] | None = None  # sent, not answered yet
        self.suspended = False
        self._reserved = ""  # queue of a suspect that this worker makes room for

    def take(self, room: Callable[[], LaneClaim | None]) -> Claimed | None:
        """Return what the claim under way brings, else claim now; None if there is no room."""
        claimed = self._ahead.take() or self._recall()
        if claimed is not None:
            self._unanswered = None
            self._news.expect(claimed.reply.again_ms / 1000)
        else:
            claimed = self._claim(room())
        if claimed is not None:
            self.suspended, self._reserved = claimed.reply.suspended, claimed.reply.reserved
            if claimed.reply.dropped:
                log.info("claim_dropped", jobs=claimed.reply.dropped)
        return claimed

    def last(self, timeout: float) -> Claimed | None:
        """Return what a claim under way or unanswered brings in time, before the worker ends."""
        return self._ahead.take(timeout) or self._recall(timeout)

    @property
    def unanswered(self) -> bool:
        """Whether there may be jobs of ours that we do not know: then no model may leave."""
        return self._unanswered is not None

    def ahead(self, room: Callable[[], LaneClaim | None]) -> None:
        """Claim more while the jobs of the last claim are read, if there is one model to claim for.

        Nothing is done if such a claim is under way.
        """
        if self._ahead.under_way or self._placement.loaded_models.several or self._reserved:
            return
        asked = room()
        groups = self._open_groups(asked) if asked is not None else []
        if asked is not None and groups:
            (group,) = groups
            self._ask(asked)
            self._ahead.begin(self._new_claim(group, asked)(most=asked.most), asked)

    def _recall(self, timeout: float | None = None) -> Claimed | None:
        """Return the jobs of a claim whose reply was lost, if any; it takes no others then."""
        if self._unanswered is None:
            return None
        call, asked = self._unanswered
        recall: Call[ClaimReply] = call(most=0)
        run, send = self._protocol.run, self._protocol.send
        reply = run(recall) if timeout is None else send(recall)(timeout)
        self._unanswered = None
        log.info("claim_recalled", jobs=len(reply.jobs))
        return Claimed(reply, asked, others=True) if reply.jobs else None

    def _claim(self, room: LaneClaim | None) -> Claimed | None:
        if room is None:
            return None
        claimed = None
        groups = self._groups(room)
        self._ask(room)
        for left, group in enumerate(groups, 1 - len(groups)):
            reply = self._protocol.run(self._new_claim(group, room)(most=room.most))
            self._unanswered = None
            self._news.expect(reply.again_ms / 1000)
            claimed = Claimed(reply, room, others=left < 0, in_order=not self._reserved)
            if reply.suspended or reply.reserved:
                break
            self._placement.claimed(group, len(reply.jobs))
            if reply.jobs:
                break
        return claimed

    def _groups(self, room: LaneClaim) -> list[ModelQueues]:
        """What to look into: first the model whose suspect waits for us to have room."""
        groups, model = self._open_groups(room), model_of(self._reserved)
        if model not in self._placement.loaded_models.resident():
            return groups
        first = next((g for g in groups if g.model == model), ModelQueues(model, ()))
        return [first, *(g for g in groups if g is not first)]

    def _open_groups(self, room: LaneClaim) -> list[ModelQueues]:
        return self._shortage.open_part(self._placement.groups(room.lanes))

    def _ask(self, room: LaneClaim) -> None:
        """Note that these lanes are looked into; in closed ones there may be jobs as before."""
        self._news.ask(room)
        for queue in self._shortage.closed:
            self._news.note(queue)

    def _new_claim(self, group: ModelQueues, asked: LaneClaim) -> _ClaimCall:
        call = self._call(group)
        self._unanswered = call, asked
        return call

    def _call(self, group: ModelQueues) -> _ClaimCall:
        terms = self._terms
        loaded = self._placement.loaded_models.get(group.model)
        capacity = loaded.engine.kv_tokens_capacity if loaded else 0
        if loaded and self._shortage.passes(group.model):
            capacity -= loaded.engine.kv_tokens_used
        waits = [self._reserved] if model_of(self._reserved) == group.model else []
        queues = list(dict.fromkeys([*waits, *group.queues]))
        return partial(
            calls.claim, terms.worker, queues, nonce=new_nonce(machine_id(), LIFE),
            lease_ms=terms.lease_ms, protocol=PROTOCOL, capacity_tokens=capacity,
            max_payload_bytes=terms.max_payload_bytes,
            capacity_rows=terms.rows, held=self._held_rows(), affinity_ms=terms.affinity_ms,
            keeps_prefixes=loaded is not None and loaded.keeps_prefixes,
        )  # fmt: skip
