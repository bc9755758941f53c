"""Waits for a job's end: what `result` needs, without the job's events. No I/O, no clock."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlx_serving.common.errors import CorruptEvent
from mlx_serving.common.events import END, decode
from mlx_serving.producer.patience import Patience

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mlx_serving.common.events import Event


class EndWatch:
    """Asks for the job's state when its end was published, and now and then in silence.

    The clients drive it as they do a `StreamAssembler`. The end of every job is published, so while
    it is subscribed, it may be patient.
    """

    replay_from = None  # reads no events

    def __init__(self) -> None:
        self.ended = False
        self.needs_replay = True
        self._live = False
        self._patience = Patience()

    @property
    def patience_s(self) -> float:
        """Seconds to wait for a live message before calling :meth:`silent`."""
        return self._patience.growing_s(live=self._live)

    @property
    def wants_live(self) -> bool:
        """Whether a subscription can bring anything."""
        return not self.ended

    def subscribed(self) -> None:
        """Note a confirmed subscription: the end may have been published before it."""
        self._live = True
        self.distrust()

    def disconnected(self) -> None:
        """Note that the subscription is lost: no message comes until another is confirmed."""
        self._live = False
        self.distrust()

    def distrust(self) -> None:
        """Note that another primary may answer from now on."""
        self._patience.heard()
        self.needs_replay = True

    def silent(self) -> None:
        """Note that nothing came, or that messages were dropped."""
        self._patience.silent()
        self.needs_replay = True

    def receive(self, payload: bytes) -> list[Event]:
        """Take one live message; the job's state says whether it really has ended."""
        try:
            ends = decode(payload).type == END
        except CorruptEvent:
            ends = True
        self.needs_replay = self.needs_replay or ends
        return []

    def replay(
        self,
        payloads: Sequence[bytes],
        *,
        committed: int,
        over: bool,
        waiting: bool = False,
        publishes: bool = True,
        more: bool = False,
    ) -> list[Event]:
        """Take what the control hash says; see `StreamAssembler.replay`."""
        del payloads, committed, waiting, publishes, more
        self.needs_replay = False
        self.ended = over
        return []
