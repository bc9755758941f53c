"""Redis forgets: a reader has the events of one history, or was told to begin anew.

A history is what some primary held at some time. Forgetting cuts the job's stream back to any
length; attempts then go on from there, while the old primary and the attempts on it may still
speak. The reader may come back at any moment with nothing but its last event's cursor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mlx_serving.common.events import RESET, Cursor, decode
from mlx_serving.producer.assembler import StreamAssembler

if TYPE_CHECKING:
    from mlx_serving.common.events import Event


def event(seq: int, tag: str, kind: str = "tokens") -> bytes:
    """The same number and the same tokens whatever the attempt, as sampling finds them again."""
    choices = [{"index": i, "text": "7 ", "token_ids": [7]} for i in range(2)]
    fields = {"v": 1, "attempt": 1, "tag": tag, "seq": seq, "type": kind}
    return msgspec.json.encode(fields | ({"choices": choices} if kind == "tokens" else {}))


class ForgetfulRedis(RuleBasedStateMachine):
    """One job on a primary that forgets, and one consumer of it."""

    @initialize(held=st.integers(1, 8))
    def begin(self, held: int) -> None:
        self.held = held
        self.attempts = 0
        self.stream: list[bytes] = []
        self.histories: list[list[bytes]] = [self.stream]
        self.messages: list[bytes] = []  # published, on their way or lost
        self.got: list[Event] = []  # since the last reset
        self.resets = 0
        self.assembler = StreamAssembler(held=held)
        self.take_over()

    @property
    def over(self) -> bool:
        return bool(self.stream) and decode(self.stream[-1]).type == "end"

    def write(self, kind: str) -> None:
        payload = event(len(self.stream) + 1, self.tag, kind)
        self.stream.append(payload)
        self.messages.append(payload)

    @precondition(lambda self: not self.over)
    @rule()
    def take_over(self) -> None:
        self.attempts += 1
        self.tag = f"{self.attempts:08x}"
        self.write("attempt")

    @precondition(lambda self: not self.over)
    @rule(count=st.integers(1, 5))
    def commit(self, count: int) -> None:
        for _ in range(count):
            self.write("tokens")

    @precondition(lambda self: not self.over)
    @rule()
    def finish(self) -> None:
        self.write("end")

    @rule(data=st.data(), stale=st.integers(0, 3), resent=st.integers(0, 3))
    def forget(self, data: st.DataObject, stale: int, resent: int) -> None:
        """Cut the stream back.

        `stale`: so many events the old primary still takes. `resent`: so many of those that were
        cut off are written again, for a worker had no reply to them.
        """
        kept = data.draw(st.integers(0, len(self.stream)))
        if not self.over:
            self.commit(stale)
        cut = self.stream[kept:]
        self.stream = self.stream[:kept]
        self.histories.append(self.stream)
        again = [each for each in cut[:resent] if decode(each).tag == decode(cut[0]).tag]
        self.stream += again
        self.messages += again
        if not self.over:
            self.take_over()

    @precondition(lambda self: self.messages)
    @rule(data=st.data(), keep=st.booleans())
    def deliver(self, data: st.DataObject, *, keep: bool) -> None:
        """Any message arrives, of whichever primary; it may arrive again later."""
        index = data.draw(st.integers(0, len(self.messages) - 1))
        self.take(self.assembler.receive(self.messages[index]))
        if not keep:
            self.messages.pop(index)

    @rule(notice=st.sampled_from(["disconnected", "subscribed", "distrust", "silent"]))
    def happen(self, notice: str) -> None:
        getattr(self.assembler, notice)()

    @rule()
    def come_back(self) -> None:
        """Another reader goes on, at another gateway."""
        cursor = self.got[-1].cursor if self.got else ""
        self.assembler = StreamAssembler(Cursor.parse(cursor, "after"), held=self.held)

    @precondition(lambda self: self.assembler.needs_replay)
    @rule(limit=st.integers(2, 6))
    def replay(self, limit: int) -> None:
        start = self.assembler.replay_from
        page = self.stream[start : start + limit]
        more = len(page) == limit
        given = self.assembler.replay(page, committed=len(self.stream), over=self.over, more=more)
        self.take(given)

    def take(self, events: list[Event]) -> None:
        for each in events:
            if each.type == RESET:
                self.resets += 1
                self.got = []
            else:
                self.got.append(each)

    @invariant()
    def what_it_has_is_of_one_history(self) -> None:
        if hasattr(self, "got"):
            got = [(each.seq, each.tag, each.type) for each in self.got]
            assert any(got == named(history)[: len(got)] for history in self.histories)

    @invariant()
    def a_job_that_never_forgot_resets_nobody(self) -> None:
        if hasattr(self, "got"):
            assert len(self.histories) > 1 or not self.resets

    def teardown(self) -> None:
        """However it went, who comes back at the end has the events of the last history."""
        if not hasattr(self, "got"):
            return
        if not self.over:
            self.finish()
        self.come_back()
        for _ in range(500):
            if self.assembler.ended:
                break
            self.assembler.silent()
            self.replay(limit=5)
        assert self.assembler.ended
        assert [(each.seq, each.tag, each.type) for each in self.got] == named(self.stream)


def named(history: list[bytes]) -> list[tuple[int, str, str]]:
    """What names each event of a history."""
    events = map(decode, history)
    return [(each.seq, each.tag, each.type) for each in events]


TestForgetfulRedis = ForgetfulRedis.TestCase
TestForgetfulRedis.settings = settings(max_examples=300, stateful_step_count=30, deadline=None)


def test_a_consumer_that_saw_only_what_was_kept_notices_nothing() -> None:
    first, second = "0000000a", "0000000b"
    kept = [event(1, first, "attempt"), *(event(seq, first) for seq in range(2, 6))]
    new = [*kept, event(6, second, "attempt"), event(7, second), event(8, second, "end")]
    assembler = StreamAssembler()
    got = assembler.replay(kept, committed=5, over=False)
    assembler.disconnected()
    got += assembler.replay(new[assembler.replay_from :], committed=8, over=True)
    assert [each.seq for each in got] == list(range(1, len(new) + 1))
    assert assembler.ended
