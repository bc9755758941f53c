"""The sans-I/O core of a job's event stream; both clients drive it.

Redis carries every event twice: pub/sub is fast and loses messages, the job's
stream is slower and is the truth. The assembler is fed both, in any order, and
gives out each event once, in order of ``seq``, without a gap. It opens no
connection and reads no clock: a client asks it when to read the stream
(``needs_replay``), from where (``replay_from``) and how long to wait in silence
before reading it anyway (``patience_s``).

Redis may forget (a failover to a replica behind, a restored snapshot), and an
attempt may then write other events under the same numbers. An attempt writes one
event under a ``seq``, so seq and tag name an event and all before it. The
assembler remembers whose events it gave out. If the stream holds another's under
one of these numbers, or will never hold so many, it gives out a ``reset`` of its
own and then the stream from its beginning. Only the stream decides that: a live
message may come from a primary that was replaced.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from mlx_serving.common.errors import CorruptEvent, StreamGap
from mlx_serving.common.events import BEGINNING, END, KNOWN_TYPES, Cursor, decode, reset_event
from mlx_serving.producer.patience import POLL_S, SILENCE_S, Patience

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mlx_serving.common.events import Event

HELD_EVENTS: Final = 256  # live events held while a gap before them is filled


class StreamAssembler:
    """Turns live messages and replays of one job into its one event sequence.

    Two positions, both of them a ``seq``: ``delivered`` to the consumer; and confirmed,
    that is seen without a gap on this connection (it falls behind after a reconnect,
    until a replay has confirmed what was delivered).

    Args:
        after: the last event that the consumer has.
        held: how many live events to hold while a gap is being filled.

    """

    def __init__(self, after: Cursor = BEGINNING, *, held: int = HELD_EVENTS) -> None:
        self.ended = False
        self._held: dict[int, Event] = {}
        self._held_limit = held
        self._live = False
        self._publishes = True
        self._waiting = False
        self._patience = Patience()
        self._start(after)

    def _start(self, after: Cursor) -> None:
        self.delivered = after.seq
        # Who wrote what was delivered: (first seq, tag) of each run of events with one tag.
        self._writers = [after] if after.seq else []
        self._confirmed = self._known_after
        self.needs_replay = True

    @property
    def replay_from(self) -> int:
        """Read the job's stream after this ``seq``, two entries or more at a time.

        It includes the last event delivered, to be compared: a reconnect to another
        primary is not always noticed.
        """
        return max(self._confirmed - 1, self._known_after)

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

        Hold nothing that the old one said, and confirm the last event anew: who wrote it
        says whose all the others are.
        """
        self._held.clear()
        self._confirmed = min(self._confirmed, max(self.delivered - 1, self._known_after))
        self._patience.heard()
        self.needs_replay = True

    def silent(self) -> None:
        """Note that nothing came, or that messages were dropped: read the stream."""
        self._patience.silent()
        self.needs_replay = True

    def receive(self, payload: bytes) -> list[Event]:
        """Take one live message; return the events it makes ready, in order.

        One that does not go on from what was delivered waits until the stream was read: if
        another attempt begins, the stream says whether it is the job's.
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
        if not self._agrees(event):
            self.distrust()
        elif event.seq == self._confirmed + 1 and self._continues(event):
            return [*self._accept(event), *self._drain()]
        elif event.seq > self._confirmed:
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

        Returns:
            The events that are ready; a reset alone if the stream is not the one that
            was delivered: it is then to be read again, from the beginning.

        Raises:
            StreamGap: the stream lacks an event it must hold.
            CorruptEvent: an entry is no event.

        """
        self._publishes, self._waiting = publishes, waiting
        if committed < self._known_after or (over and self.delivered > committed):
            return self._reset()
        # Short of what was delivered: a resend may yet bring the same events again.
        self._confirmed = min(self._confirmed, committed)
        ready: list[Event] = []
        for payload in payloads:
            event = decode(payload)
            if over and event.seq > committed:  # no event of a job that ended before it
                break
            if not self._agrees(event):
                return self._reset()
            ready += self._replayed(event)
        ready += self._drain()
        self.needs_replay = more
        if not more and not self.ended:
            if self._confirmed < committed:
                raise StreamGap(_span(self._confirmed + 1, committed))
            self.ended = over
        return ready

    def is_at(self, end: Cursor) -> bool:
        """Note that the job ended with this event; say whether it is the last one delivered.

        For a job whose events are no longer kept, so that none can be compared. Its worker
        wrote this one: events that are a job's only output are kept as long as the job.
        """
        self.ended = bool(self._writers) and (self.delivered, self._writers[-1].tag) == end
        return self.ended

    @property
    def _known_after(self) -> int:
        """It is known who wrote the events after this seq, up to `delivered`."""
        return self._writers[0].seq - 1 if self._writers else self.delivered

    def _replayed(self, event: Event) -> list[Event]:
        if self.ended or event.seq <= self._confirmed:
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
        if not self._writers or self._writers[-1].tag != event.tag:
            self._writers.append(Cursor(event.seq, event.tag))
        self.ended = event.type == END
        return [event] if event.type in KNOWN_TYPES else []

    def _hold(self, event: Event) -> None:
        self.needs_replay = True
        if len(self._held) < self._held_limit:  # beyond it the replay brings them
            self._held[event.seq] = event

    def _drain(self) -> list[Event]:
        """Accept held events that now follow; forget those that the stream passed or refuted."""
        ready: list[Event] = []
        for seq in sorted(self._held):
            if seq > self._confirmed + 1:
                break
            event = self._held.pop(seq)
            if seq == self._confirmed + 1 and self._continues(event) and not self.ended:
                ready += self._accept(event)
        return ready

    def _agrees(self, event: Event) -> bool:
        """Whether an event is the one delivered under its seq, if one was.

        One from before a cursor is not known, and has no reason to come, unless the job
        was set back.
        """
        if event.seq > self.delivered:
            return True
        tags = (tag for seq, tag in reversed(self._writers) if seq <= event.seq)
        return next(tags, None) == event.tag

    def _continues(self, event: Event) -> bool:
        """Whether what was delivered, and one agrees with it, goes on with this event."""
        if event.seq <= self.delivered or not self._writers:
            return self._agrees(event)
        return event.tag == self._writers[-1].tag

    def _reset(self) -> list[Event]:
        """Begin anew, with an event that says so."""
        self._held.clear()
        self._start(BEGINNING)
        return [reset_event()]


def _span(first: int, last: int) -> str:
    return f"the job's stream lacks events {first} to {last}"
