"""A failover that loses acknowledged events: an error or the new sequence, never a splice."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_serving.common.errors import StreamConflict
from mlx_serving.common.events import decode
from mlx_serving.producer.assembler import StreamAssembler

if TYPE_CHECKING:
    from mlx_serving.common.events import Event


def event(seq: int, attempt: int, kind: str = "tokens") -> bytes:
    """The same tokens whatever the attempt, as counter-based sampling decodes them again."""
    choices = [{"index": 0, "text": "7 ", "token_ids": [7]}] if kind == "tokens" else []
    fields = {"v": 1, "attempt": attempt, "seq": seq, "type": kind, "choices": choices}
    return msgspec.json.encode(fields)


def timelines(before: int, kept: int, after: int) -> tuple[list[bytes], list[bytes]]:
    """What the old primary held, and what the new one holds once a worker took over."""
    old = [event(1, 1, "attempt"), *(event(seq, 1) for seq in range(2, before + 1))]
    kept = min(kept, before)
    takeover = [event(kept + 1, 2, "attempt")]
    new = [*takeover, *(event(seq, 2) for seq in range(kept + 2, kept + 2 + after))]
    end = event(kept + 2 + after, 2, "end")
    return old, [*old[:kept], *new, end]


def replay(assembler: StreamAssembler, stream: list[bytes], *, over: bool) -> list[Event]:
    page = stream[assembler.replay_from :]
    return assembler.replay(page, committed=len(stream), over=over)


@settings(max_examples=400, deadline=None)
@given(
    before=st.integers(1, 12),
    kept=st.integers(0, 12),
    after=st.integers(0, 12),
    compared=st.integers(1, 16),
    subscribed_before=st.booleans(),
    notice=st.sampled_from(["disconnected", "subscribed", "distrust", "silent"]),
    lives=st.lists(st.integers(0, 30), max_size=4),
)
def test_what_is_delivered_is_one_primary_s_sequence(
    before: int,
    kept: int,
    after: int,
    compared: int,
    subscribed_before: bool,  # noqa: FBT001 -- hypothesis names its arguments
    notice: str,
    lives: list[int],
) -> None:
    old, new = timelines(before, kept, after)
    assembler = StreamAssembler(compared=compared)
    if subscribed_before:
        assembler.subscribed()
    got = replay(assembler, old, over=False)
    getattr(assembler, notice)()
    try:
        # Live messages come from the new primary only after a new subscription.
        if notice == "subscribed":
            for index in lives:
                got += assembler.receive(new[index % len(new)])
        got += replay(assembler, new, over=True)
    except StreamConflict:
        assert kept < before
        return
    assert got == [decode(payload) for payload in new]
    assert assembler.ended


def test_a_consumer_that_saw_only_what_was_kept_notices_nothing() -> None:
    old, new = timelines(before=5, kept=5, after=3)
    assembler = StreamAssembler()
    got = replay(assembler, old, over=False)
    assembler.disconnected()
    got += replay(assembler, new, over=True)
    assert [each.seq for each in got] == list(range(1, len(new) + 1))
