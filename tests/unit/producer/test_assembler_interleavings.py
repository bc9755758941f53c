"""Any interleaving of live messages, losses, reconnects and replays gives the sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mlx_serving.common.events import BEGINNING, Cursor
from mlx_serving.producer.assembler import StreamAssembler

if TYPE_CHECKING:
    from mlx_serving.common.events import Event


TAG = "01d01d01"


def event(seq: int, last: int) -> bytes:
    if seq == last:
        return msgspec.json.encode(
            {"v": 1, "attempt": 1, "tag": TAG, "seq": seq, "type": "end", "state": "finished"}
        )
    choices = [{"index": 0, "text": str(seq), "token_ids": [seq * 7]}]
    return msgspec.json.encode(
        {"v": 1, "attempt": 1, "tag": TAG, "seq": seq, "type": "tokens", "choices": choices}
    )


class Reader(RuleBasedStateMachine):
    """A job's stream as the truth, a network of messages on their way, one consumer."""

    @initialize(
        last=st.integers(1, 40),
        after=st.integers(0, 40),
        held=st.integers(1, 8),
    )
    def begin(self, last: int, after: int, held: int) -> None:
        self.truth = [event(seq, last) for seq in range(1, last + 1)]
        self.after = min(after, last)
        self.committed = self.after  # a consumer resumes only after what was committed
        self.in_flight: list[bytes] = []
        self.got: list[Event] = []
        self.assembler = StreamAssembler(
            Cursor(self.after, TAG) if self.after else BEGINNING, held=held
        )

    @rule(lost=st.booleans(), count=st.integers(1, 5))
    def commit(self, *, lost: bool, count: int) -> None:
        new = self.truth[self.committed : self.committed + count]
        self.committed += len(new)
        if not lost:
            self.in_flight += new

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data(), keep=st.booleans())
    def deliver(self, data: st.DataObject, *, keep: bool) -> None:
        """Any message on its way arrives; it may arrive again later."""
        index = data.draw(st.integers(0, len(self.in_flight) - 1))
        payload = self.in_flight[index] if keep else self.in_flight.pop(index)
        self.got += self.assembler.receive(payload)

    @precondition(lambda self: self.in_flight)
    @rule()
    def lose(self) -> None:
        self.in_flight.clear()

    @rule()
    def disconnect(self) -> None:
        self.in_flight.clear()
        self.assembler.disconnected()

    @rule()
    def subscribe(self) -> None:
        self.assembler.subscribed()

    @rule()
    def silence(self) -> None:
        self.assembler.silent()

    @precondition(lambda self: self.assembler.needs_replay)
    @rule(limit=st.integers(2, 6), late=st.integers(0, 3))
    def replay(self, limit: int, late: int) -> None:
        """Read the stream; ``late`` events are committed between the hash and the stream."""
        committed, over = self.committed, self.committed == len(self.truth)
        self.commit(lost=False, count=late)
        start = self.assembler.replay_from
        page = self.truth[start : self.committed][:limit]
        self.got += self.assembler.replay(
            page, committed=committed, over=over, more=len(page) == limit
        )

    @invariant()
    def nothing_is_missing_repeated_or_out_of_order(self) -> None:
        if hasattr(self, "got"):
            expected = range(self.after + 1, self.after + 1 + len(self.got))
            assert [e.seq for e in self.got] == list(expected)

    @invariant()
    def what_it_holds_is_bounded(self) -> None:
        if hasattr(self, "got"):
            assert len(self.assembler._held) <= self.assembler._held_limit

    def teardown(self) -> None:
        """However it went, commits and silence bring the rest."""
        if not hasattr(self, "got"):
            return
        for _ in range(100):
            if self.assembler.ended:
                break
            self.commit(lost=True, count=7)
            self.assembler.silent()
            self.replay(limit=5, late=0)
        assert self.assembler.ended
        assert [e.seq for e in self.got] == list(range(self.after + 1, len(self.truth) + 1))


TestReader = Reader.TestCase
TestReader.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
