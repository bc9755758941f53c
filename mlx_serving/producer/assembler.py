"""The sans-I/O core of a job's event stream; both clients drive it.

Redis carries every event twice: pub/sub is fast and loses messages, the job's
stream is slower and is the truth. The assembler is fed both, in any order, and
gives out each event once, in order of ``seq``, without a gap. It opens no
connection and reads no clock: a client asks it when to read the stream
(``needs_replay``), from where (``replay_from``) and how long to wait in silence
before reading it anyway (``patience_s``).

After a failover the primary may hold less than a consumer has seen, and a worker
may then write other events under the same numbers. So the assembler remembers a
digest of the last events it gave out, and checks what it is told again against
them: two different events under one ``seq`` raise :class:`StreamConflict`.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

from mlx_serving.common.errors import CorruptEvent, StreamConflict, StreamGap
from mlx_serving.common.events import END, KNOWN_TYPES, decode
from mlx_serving.producer.patience import POLL_S, SILENCE_S, Patience

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mlx_serving.common.events import Event

COMPARED_EVENTS: Final = 256  # delivered events that a replay is compared with
HELD_EVENTS: Final = 256  # live events held while a gap before them is filled


class StreamAssembler:
    """Turns live messages and replays of one job into its one event sequence.

    Three positions, all of them a ``seq``: ``delivered`` to the consumer; confirmed,
    that is seen without a gap on this connection (it falls behind after a reconnect,
    until a replay has confirmed what was delivered); and the oldest event that can
    still be compared.

    Args:
        after_seq: the last event the consumer already has; 0 for none.
        compared: how many delivered events to keep a digest of.
        held: how many live events to hold while a gap is being filled.

    """

    def __init__(
        self, after_seq: int = 0, *, compared: int = COMPARED_EVENTS, held: int = HELD_EVENTS
    ) -> None:
        if after_seq < 0:
            raise ValueError(f"after_seq: must be 0 or more, got {after_seq}")
        self.delivered = after_seq
        self.ended = False
        self.needs_replay = True
        self._confirmed = after_seq
        self._digests: deque[int] = deque(maxlen=compared)
        self._held: dict[int, Event] = {}
        self._held_limit = held
        self._live = False
        self._publishes = True
        self._waiting = False
        self._patience = Patience()

    @property
    def replay_from(self) -> int:
        """Read the job's stream after this ``seq``, two entries or more at a time.

        It includes the last event delivered, to be compared: a reconnect to another
        primary is not always noticed.
        """
        return max(self._confirmed - 1, self._comparable_after)

    @property
    def patience_s(self) -> float:
        """Seconds to wait for a live message before calling :meth:`silent`.

        They grow while the job waits in the queue: the event that begins it is published.
        """
        if self._waiting:
            return self._patience.growing_s(live=self._live)
        return SILENCE_S if self._live and self._publishes else POLL_S

    @property
    def wants_live(self) -> bool:
        """Whether a subscription can bring anything: begin and end of every job are published."""
        return not self.ended

    def subscribed(self) -> None:
        """Note a confirmed subscription: what was published before it is missing.

        It may be to another primary than the one that was read so far.
        """
        self._live = True
        self.distrust()

    def disconnected(self) -> None:
        """Note that the subscription is lost: no message comes until another is confirmed."""
        self._live = False
        self.distrust()

    def distrust(self) -> None:
        """Note that another primary may answer from now on.

        Hold nothing that the old one said, and confirm the last events anew.
        """
        self._held.clear()
        self._confirmed = min(self._confirmed, self._comparable_after)
        self._patience.heard()
        self.needs_replay = True

    def silent(self) -> None:
        """Note that nothing came, or that messages were dropped: read the stream."""
        self._patience.silent()
        self.needs_replay = True

    def receive(self, payload: bytes) -> list[Event]:
        """Take one live message; return the events it makes ready, in order.

        Raises:
            StreamConflict: another event was delivered under this ``seq``.

        """
        if self.ended:
            return []
        self._waiting = False
        self._patience.heard()
        try:
            event = decode(payload)
        except CorruptEvent:  # the stream says whether the event itself is bad
            self.needs_replay = True
            return []
        self._compare(event)
        if event.seq == self._confirmed + 1:
            return [*self._accept(event), *self._drain()]
        if event.seq > self._confirmed:
            self._hold(event)
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
        """Take what the job's stream holds after :attr:`replay_from`.

        Args:
            payloads: the stream's entries in order.
            committed: the control hash's last ``seq``, read before the entries.
            over: whether the control hash, read before the entries, was terminal.
            waiting: whether it was queued.
            publishes: whether its tokens are also published.
            more: whether the read stopped at a limit, so that entries are left.

        Raises:
            StreamConflict: the stream holds another event under a delivered ``seq``,
                or less than the consumer has and no way to compare it.
            StreamGap: the stream lacks an event it must hold.
            CorruptEvent: an entry is no event.

        """
        self._publishes, self._waiting = publishes, waiting
        self._roll_back(committed)
        ready: list[Event] = []
        for payload in payloads:
            ready += self._replayed(decode(payload))
        ready += self._drain()
        self.needs_replay = more
        if not more and not self.ended:
            self._check_complete(committed, over=over)
        return ready

    @property
    def _comparable_after(self) -> int:
        return self.delivered - len(self._digests)

    def _replayed(self, event: Event) -> list[Event]:
        if self.ended:
            return []
        self._compare(event)
        if event.seq <= self._confirmed:
            return []
        if event.seq > self._confirmed + 1:
            raise StreamGap(_span(self._confirmed + 1, event.seq - 1))
        return self._accept(event)

    def _accept(self, event: Event) -> list[Event]:
        """Move past the event that comes next; return it unless delivered before."""
        self._confirmed = event.seq
        if event.seq <= self.delivered:
            return []
        self.delivered = event.seq
        self._digests.append(_digest(event))
        self.ended = event.type == END
        return [event] if event.type in KNOWN_TYPES else []

    def _hold(self, event: Event) -> None:
        self.needs_replay = True
        if len(self._held) < self._held_limit:  # beyond it the replay brings them
            self._held.setdefault(event.seq, event)

    def _drain(self) -> list[Event]:
        """Accept the held events that now follow; forget those passed by a replay."""
        ready: list[Event] = []
        for seq in sorted(self._held):
            if seq > self._confirmed + 1:
                break
            event = self._held.pop(seq)
            self._compare(event)
            if seq == self._confirmed + 1 and not self.ended:
                ready += self._accept(event)
        return ready

    def _compare(self, event: Event) -> None:
        """Raise if another event was delivered, or is held, under this ``seq``."""
        oldest = self._comparable_after + 1
        if oldest <= event.seq <= self.delivered:
            known = self._digests[event.seq - oldest]
        elif event.seq in self._held:
            known = _digest(self._held[event.seq])
        else:
            return
        if known != _digest(event):
            raise StreamConflict(f"event {event.seq} is not the one delivered under that seq")

    def _roll_back(self, committed: int) -> None:
        """Meet a primary that holds less than was delivered: compare from there on."""
        if committed < self._comparable_after:
            raise StreamConflict(
                f"delivered up to seq {self.delivered}, but the job now holds {committed}"
            )
        self._confirmed = min(self._confirmed, committed)

    def _check_complete(self, committed: int, *, over: bool) -> None:
        if self._confirmed < committed:
            raise StreamGap(_span(self._confirmed + 1, committed))
        if over and self.delivered > committed:
            raise StreamConflict(
                f"delivered up to seq {self.delivered}, but the job ended at {committed}"
            )
        self.ended = over


def _digest(event: Event) -> int:
    """Hash what may not differ: attempt, type and every choice's token ids (64 bits)."""
    tokens = ((choice.index, *choice.token_ids) for choice in event.choices)
    return hash((event.attempt, event.type, *tokens))


def _span(first: int, last: int) -> str:
    return f"the job's stream lacks events {first} to {last}"
