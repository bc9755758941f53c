"""The stream assembler: every event once, in order, whatever the network does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import pytest

from mlx_serving.common.errors import CorruptEvent, StreamConflict, StreamGap
from mlx_serving.producer.assembler import StreamAssembler
from mlx_serving.producer.patience import LONGEST_SILENCE_S, POLL_S, SILENCE_S

if TYPE_CHECKING:
    from mlx_serving.common.events import Event


def tokens(seq: int, *ids: int) -> bytes:
    choice = {"index": 0, "text": f"t{seq}", "token_ids": list(ids or (seq,))}
    return msgspec.json.encode(
        {"v": 1, "attempt": 1, "seq": seq, "type": "tokens", "choices": [choice]}
    )


def end(seq: int, state: str = "finished") -> bytes:
    return msgspec.json.encode({"v": 1, "attempt": 1, "seq": seq, "type": "end", "state": state})


def seqs(events: list[Event]) -> list[int]:
    return [event.seq for event in events]


def live(after_seq: int = 0, upto: int = 0, **options: int) -> StreamAssembler:
    """An assembler that has subscribed and replayed events 1 to ``upto``."""
    assembler = StreamAssembler(after_seq, **options)
    assembler.subscribed()
    assembler.replay(
        [tokens(seq) for seq in range(after_seq + 1, upto + 1)],
        committed=max(upto, after_seq),
        over=False,
    )
    return assembler


class TestReading:
    def test_a_new_stream_wants_a_replay_from_the_start(self) -> None:
        assembler = StreamAssembler()
        assert (assembler.needs_replay, assembler.replay_from, assembler.ended) == (True, 0, False)

    def test_live_events_in_order_are_given_out_at_once(self) -> None:
        assembler = live()
        assert [seqs(assembler.receive(tokens(seq))) for seq in (1, 2, 3)] == [[1], [2], [3]]
        assert not assembler.needs_replay

    def test_a_gap_is_held_back_until_the_replay_fills_it(self) -> None:
        assembler = live(upto=2)
        assert assembler.receive(tokens(5)) == []
        assert (assembler.needs_replay, assembler.replay_from) == (True, 1)
        ready = assembler.replay([tokens(2), tokens(3), tokens(4)], committed=4, over=False)
        assert seqs(ready) == [3, 4, 5]
        assert not assembler.needs_replay

    def test_a_late_live_message_fills_the_gap_too(self) -> None:
        assembler = live(upto=2)
        assembler.receive(tokens(4))
        assert seqs(assembler.receive(tokens(3))) == [3, 4]

    def test_events_beyond_a_second_gap_stay_held(self) -> None:
        assembler = live(upto=2)
        for seq in (4, 6):
            assembler.receive(tokens(seq))
        assert [seqs(assembler.receive(tokens(seq))) for seq in (3, 5)] == [[3, 4], [5, 6]]

    def test_duplicates_are_dropped(self) -> None:
        assembler = live(upto=3)
        assert assembler.receive(tokens(2)) == []
        assert assembler.replay([tokens(2), tokens(3)], committed=3, over=False) == []

    def test_the_end_event_ends_it_and_later_ones_are_dropped(self) -> None:
        assembler = live(upto=1)
        assert [e.type for e in assembler.receive(end(2))] == ["end"]
        assert assembler.ended
        assert assembler.receive(tokens(3)) == []

    def test_a_subscription_confirmed_asks_for_what_was_published_before_it(self) -> None:
        assembler = StreamAssembler()
        assembler.replay([tokens(1)], committed=1, over=False)
        assert not assembler.needs_replay
        assembler.subscribed()
        assert assembler.needs_replay

    def test_silence_asks_for_a_replay(self) -> None:
        assembler = live(upto=1)
        assembler.silent()
        assert assembler.needs_replay

    def test_a_read_that_stopped_at_a_limit_is_continued(self) -> None:
        assembler = StreamAssembler()
        assembler.replay([tokens(1), tokens(2)], committed=4, over=True, more=True)
        assert (assembler.needs_replay, assembler.replay_from, assembler.ended) == (True, 1, False)
        assembler.replay([tokens(2), tokens(3), end(4)], committed=4, over=True)
        assert assembler.ended

    def test_more_live_events_than_can_be_held_come_by_replay(self) -> None:
        assembler = live(held=2)
        for seq in range(2, 12):
            assembler.receive(tokens(seq))
        assert len(assembler._held) == 2
        ready = assembler.replay([tokens(seq) for seq in range(1, 12)], committed=11, over=False)
        assert seqs(ready) == list(range(1, 12))
        assert not assembler._held

    def test_while_its_job_waits_in_the_queue_it_reads_ever_less_often(self) -> None:
        assembler = live()
        waits = []
        for _ in range(6):
            assembler.replay([], committed=0, over=False, waiting=True)
            waits.append(assembler.patience_s)
            assembler.silent()
        assert waits == [1, 2, 4, 8, LONGEST_SILENCE_S, LONGEST_SILENCE_S]
        assembler.receive(tokens(1))
        assert assembler.patience_s == SILENCE_S

    def test_a_lost_subscription_makes_it_read_often_again(self) -> None:
        assembler = live()
        for _ in range(6):
            assembler.replay([], committed=0, over=False, waiting=True)
            assembler.silent()
        assembler.disconnected()
        assert (assembler.needs_replay, assembler.patience_s) == (True, POLL_S)
        for _ in range(6):
            assembler.replay([], committed=0, over=False, waiting=True)
            assembler.silent()
        assert assembler.patience_s == SILENCE_S

    def test_it_is_patient_only_while_events_are_published_to_it(self) -> None:
        assembler = live()
        assert assembler.patience_s == SILENCE_S
        assembler.replay([], committed=0, over=False, publishes=False)
        assert assembler.patience_s == POLL_S
        assembler = live()
        assembler.disconnected()
        assert assembler.patience_s == POLL_S


class TestResume:
    def test_only_events_after_the_given_seq_are_given_out(self) -> None:
        assembler = StreamAssembler(5)
        assert assembler.replay_from == 5
        assert seqs(assembler.replay([tokens(6)], committed=6, over=False)) == [6]

    def test_live_events_before_it_are_dropped(self) -> None:
        assert live(5).receive(tokens(4)) == []

    def test_resuming_after_the_end_event_ends_at_once(self) -> None:
        assembler = StreamAssembler(5)
        assert assembler.replay([], committed=5, over=True) == []
        assert assembler.ended

    def test_resuming_beyond_what_the_job_holds_is_a_conflict(self) -> None:
        with pytest.raises(StreamConflict, match="seq 5, but the job now holds 3"):
            StreamAssembler(5).replay([], committed=3, over=False)

    def test_a_negative_seq_is_refused(self) -> None:
        with pytest.raises(ValueError, match="after_seq"):
            StreamAssembler(-1)


class TestReconnect:
    def test_the_last_events_are_read_again_and_compared(self) -> None:
        assembler = live(upto=9, compared=4)
        assembler.disconnected()
        assert (assembler.needs_replay, assembler.replay_from) == (True, 5)
        again = [tokens(seq) for seq in range(6, 11)]
        assert seqs(assembler.replay(again, committed=10, over=False)) == [10]

    def test_a_second_confirmation_counts_as_a_reconnect(self) -> None:
        assembler = live(upto=9, compared=4)
        assembler.subscribed()
        assert assembler.replay_from == 5

    def test_live_events_wait_until_a_new_subscription_is_compared(self) -> None:
        assembler = StreamAssembler()
        assembler.replay([tokens(1), tokens(2)], committed=2, over=False)
        assembler.subscribed()
        assert assembler.receive(tokens(3)) == []
        ready = assembler.replay([tokens(1), tokens(2)], committed=2, over=False)
        assert seqs(ready) == [3]

    def test_what_was_held_from_the_old_connection_is_forgotten(self) -> None:
        assembler = live(upto=1)
        assembler.receive(tokens(3, 333))
        assembler.disconnected()
        ready = assembler.replay([tokens(1), tokens(2), tokens(3)], committed=3, over=False)
        assert [e.choices[0].token_ids for e in ready if e.choices] == [[2], [3]]

    def test_other_tokens_on_replay_are_a_conflict(self) -> None:
        assembler = live(upto=3)
        assembler.disconnected()
        with pytest.raises(StreamConflict, match="event 3 is not the one"):
            assembler.replay([tokens(1), tokens(2), tokens(3, 9)], committed=3, over=False)

    def test_another_type_under_a_seq_is_a_conflict(self) -> None:
        assembler = live(upto=3)
        with pytest.raises(StreamConflict, match="event 3 is not the one"):
            assembler.receive(end(3))

    def test_a_live_duplicate_with_other_tokens_is_a_conflict(self) -> None:
        assembler = live(upto=3)
        with pytest.raises(StreamConflict, match="event 2 is not the one"):
            assembler.receive(tokens(2, 8))

    def test_a_primary_that_holds_less_is_followed_until_it_has_caught_up(self) -> None:
        assembler = live(upto=6)
        assembler.disconnected()
        assembler.replay([tokens(seq) for seq in (1, 2, 3, 4)], committed=4, over=False)
        assert [seqs(assembler.receive(tokens(seq))) for seq in (5, 6, 7)] == [[], [], [7]]

    def test_a_primary_that_goes_on_differently_is_a_conflict(self) -> None:
        assembler = live(upto=6)
        assembler.disconnected()
        assembler.replay([tokens(seq) for seq in (1, 2, 3, 4)], committed=4, over=False)
        with pytest.raises(StreamConflict):
            assembler.receive(tokens(5, 99))

    def test_a_rollback_is_seen_without_a_disconnect(self) -> None:
        assembler = live(upto=6)
        assembler.silent()
        assembler.replay([], committed=4, over=False)
        with pytest.raises(StreamConflict, match="event 5 is not the one"):
            assembler.receive(tokens(5, 99))

    def test_a_rollback_made_up_for_is_seen_without_a_disconnect(self) -> None:
        assembler = live(upto=6)
        assembler.silent()
        assert assembler.replay_from == 5
        with pytest.raises(StreamConflict, match="event 6 is not the one"):
            assembler.replay([tokens(6, 99), tokens(7)], committed=7, over=False)

    def test_the_same_tokens_by_another_attempt_are_a_conflict(self) -> None:
        assembler = live(upto=6)
        with pytest.raises(StreamConflict):
            assembler.receive(tokens(6).replace(b'"attempt":1', b'"attempt":2'))

    def test_a_rollback_beyond_memory_is_a_conflict(self) -> None:
        assembler = live(upto=9, compared=3)
        with pytest.raises(StreamConflict):
            assembler.replay([], committed=5, over=False)

    def test_a_job_that_ended_before_what_was_delivered_is_a_conflict(self) -> None:
        assembler = live(upto=6)
        assembler.disconnected()
        with pytest.raises(StreamConflict):
            assembler.replay([tokens(seq) for seq in (1, 2, 3, 4)], committed=4, over=True)


class TestTruth:
    def test_a_hole_in_the_stream_is_an_error(self) -> None:
        with pytest.raises(StreamGap, match="events 1 to 2"):
            StreamAssembler().replay([tokens(3)], committed=3, over=False)

    def test_a_stream_that_is_gone_is_an_error(self) -> None:
        with pytest.raises(StreamGap, match="events 1 to 3"):
            StreamAssembler().replay([], committed=3, over=True)

    def test_a_malformed_live_message_is_looked_up_in_the_stream(self) -> None:
        assembler = live()
        assert assembler.receive(b"{") == []
        assert assembler.needs_replay

    def test_a_malformed_entry_is_an_error(self) -> None:
        with pytest.raises(CorruptEvent):
            StreamAssembler().replay([b"{"], committed=1, over=False)

    def test_unknown_types_advance_the_seq_unseen(self) -> None:
        assembler = live()
        unknown = b'{"v":1,"attempt":1,"seq":1,"type":"weather","sky":"blue"}'
        assert assembler.receive(unknown) == []
        assert seqs(assembler.receive(tokens(2))) == [2]

    def test_unknown_fields_are_ignored(self) -> None:
        assembler = live()
        choice = b'{"index":0,"text":"a","token_ids":[1],"x":1}'
        odd = b'{"v":1,"attempt":1,"seq":1,"type":"tokens","choices":[' + choice + b'],"y":{}}'
        assert seqs(assembler.receive(odd)) == [1]

    def test_the_digests_stay_bounded(self) -> None:
        assembler = live(upto=100, compared=8)
        assert len(assembler._digests) == 8
