"""The stream assembler: every event once, in order, whatever the network does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import pytest

from mlx_serving.common.errors import CorruptEvent, StreamGap
from mlx_serving.common.events import BEGINNING, Cursor
from mlx_serving.producer.assembler import StreamAssembler
from mlx_serving.producer.patience import LONGEST_SILENCE_S, POLL_S, SILENCE_S

if TYPE_CHECKING:
    from mlx_serving.common.events import Event


OLD, NEW = "01d01d01", "2e32e32e"  # tags of two attempts


def tokens(seq: int, *ids: int, tag: str = OLD) -> bytes:
    choice = {"index": 0, "text": f"t{seq}", "token_ids": list(ids or (seq,))}
    return msgspec.json.encode(
        {"v": 1, "attempt": 1, "tag": tag, "seq": seq, "type": "tokens", "choices": [choice]}
    )


def end(seq: int, state: str = "finished", tag: str = OLD) -> bytes:
    fields = {"v": 1, "attempt": 1, "tag": tag, "seq": seq, "type": "end", "state": state}
    return msgspec.json.encode(fields)


def opening(seq: int, tag: str = NEW) -> bytes:
    """An attempt event."""
    return msgspec.json.encode(
        {"v": 1, "attempt": 2, "tag": tag, "seq": seq, "type": "attempt", "start_seq": seq}
    )


def seqs(events: list[Event]) -> list[int]:
    return [event.seq for event in events]


def kinds(events: list[Event]) -> list[tuple[str, int]]:
    return [(event.type, event.seq) for event in events]


RESET = [("reset", 0)]


def live(after: int = 0, upto: int = 0, **options: int) -> StreamAssembler:
    """An assembler that has subscribed and replayed its cursor's event and those up to ``upto``."""
    assembler = StreamAssembler(Cursor(after, OLD) if after else BEGINNING, **options)
    assembler.subscribed()
    last = max(upto, after)
    known = [tokens(seq) for seq in range(assembler.replay_from + 1, last + 1)]
    assembler.replay(known, committed=last, over=False)
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
    def test_only_events_after_the_cursor_are_given_out(self) -> None:
        assembler = StreamAssembler(Cursor(5, OLD))
        assert assembler.replay_from == 4, "the cursor's own event is read again"
        ready = assembler.replay([tokens(5), tokens(6)], committed=6, over=False)
        assert seqs(ready) == [6]

    def test_a_cursor_of_an_earlier_attempt_is_good_while_its_event_stands(self) -> None:
        assembler = StreamAssembler(Cursor(5, OLD))
        page = [tokens(5), opening(6), tokens(7, tag=NEW)]
        assert seqs(assembler.replay(page, committed=7, over=False)) == [6, 7]

    def test_live_events_before_it_are_dropped(self) -> None:
        assembler = live(5)
        assert assembler.receive(tokens(4)) == []
        assert assembler.needs_replay, "they have no reason to come, so the stream is asked"
        assert assembler.replay([tokens(5)], committed=5, over=False) == []

    def test_resuming_after_the_end_event_ends_at_once(self) -> None:
        assembler = StreamAssembler(Cursor(5, OLD))
        assert assembler.replay([end(5)], committed=5, over=True) == []
        assert assembler.ended

    def test_a_cursor_whose_event_is_gone_is_an_error(self) -> None:
        with pytest.raises(StreamGap, match="events 5 to 5"):
            StreamAssembler(Cursor(5, OLD)).replay([], committed=5, over=True)
        with pytest.raises(StreamGap, match="events 5 to 5"):
            StreamAssembler(Cursor(5, OLD)).replay([tokens(6)], committed=6, over=False)

    @pytest.mark.parametrize("committed", [0, 3])
    def test_resuming_beyond_what_the_job_holds_is_a_reset(self, committed: int) -> None:
        assembler = StreamAssembler(Cursor(5, OLD))
        assert kinds(assembler.replay([], committed=committed, over=False)) == RESET
        assert (assembler.needs_replay, assembler.replay_from) == (True, 0)
        ready = assembler.replay([tokens(1), tokens(2)], committed=2, over=False)
        assert seqs(ready) == [1, 2]

    def test_another_attempt_at_the_cursor_is_a_reset(self) -> None:
        """It may have the same number, seq and tokens."""
        assembler = StreamAssembler(Cursor(5, OLD))
        ready = assembler.replay([tokens(5, tag=NEW), end(6, tag=NEW)], committed=6, over=True)
        assert kinds(ready) == RESET
        assert not assembler.ended
        anew = [tokens(seq, tag=NEW) for seq in range(1, 6)]
        ready = assembler.replay([*anew, end(6, tag=NEW)], committed=6, over=True)
        assert seqs(ready) == [1, 2, 3, 4, 5, 6]
        assert assembler.ended

    def test_a_job_that_ended_before_the_cursor_is_a_reset(self) -> None:
        assembler = StreamAssembler(Cursor(5, OLD))
        assert kinds(assembler.replay([], committed=4, over=True)) == RESET

    def test_one_event_short_waits_for_a_resend(self) -> None:
        """The reply to a flush was lost in the failover: its worker writes the same once more."""
        assembler = StreamAssembler(Cursor(5, OLD))
        assert assembler.replay([], committed=4, over=False) == []
        ready = assembler.replay([tokens(5), tokens(6)], committed=6, over=False)
        assert seqs(ready) == [6]


class TestReconnect:
    def test_the_last_event_is_read_again_and_compared(self) -> None:
        assembler = live(upto=9)
        assembler.disconnected()
        assert assembler.needs_replay
        assert 7 <= assembler.replay_from <= 8
        again = [tokens(seq) for seq in range(assembler.replay_from + 1, 11)]
        assert seqs(assembler.replay(again, committed=10, over=False)) == [10]

    def test_a_second_confirmation_counts_as_a_reconnect(self) -> None:
        assembler = live(upto=9)
        assembler.subscribed()
        assert assembler.replay_from <= 8
        assert assembler.receive(tokens(10)) == []

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

    def test_another_attempt_s_event_on_replay_is_a_reset(self) -> None:
        assembler = live(upto=3)
        assembler.disconnected()
        page = [tokens(1), tokens(2), tokens(3, tag=NEW)]
        assert kinds(assembler.replay(page, committed=3, over=False)) == RESET
        ready = assembler.replay(page, committed=3, over=False)
        assert [(e.seq, e.tag) for e in ready] == [(1, OLD), (2, OLD), (3, NEW)]

    @pytest.mark.parametrize("other", [tokens(3, tag=NEW), end(3, tag=NEW), tokens(2, 8, tag=NEW)])
    def test_a_live_message_that_contradicts_decides_nothing(self, other: bytes) -> None:
        """It may come from a primary that was replaced; the stream says which one holds."""
        assembler = live(upto=3)
        assert assembler.receive(other) == []
        assert assembler.needs_replay
        page = [tokens(seq) for seq in range(assembler.replay_from + 1, 5)]
        assert seqs(assembler.replay(page, committed=4, over=False)) == [4]

    def test_a_live_message_that_contradicts_and_is_right_leads_to_a_reset(self) -> None:
        assembler = live(upto=3)
        assembler.receive(tokens(3, tag=NEW))
        page = [opening(2), tokens(3, tag=NEW)][assembler.replay_from - 1 :]
        assert kinds(assembler.replay(page, committed=3, over=False)) == RESET

    def test_a_live_message_of_the_old_attempt_after_a_reset_is_not_spliced(self) -> None:
        assembler = live(upto=3)
        assembler.replay([opening(2), tokens(3, tag=NEW)], committed=3, over=False)
        anew = [tokens(1), opening(2), tokens(3, tag=NEW)]
        assert seqs(assembler.replay(anew, committed=3, over=False)) == [1, 2, 3]
        assert assembler.receive(tokens(4)) == [], "the old primary goes on with the old attempt"
        assert assembler.needs_replay
        page = [*anew, tokens(4, tag=NEW)][assembler.replay_from :]
        assert [(e.seq, e.tag) for e in assembler.replay(page, committed=4, over=False)] == [
            (4, NEW)
        ]
        assert not assembler._held

    def test_held_messages_of_the_old_attempt_are_not_spliced(self) -> None:
        assembler = live(upto=1)
        for seq in (3, 4):
            assembler.receive(tokens(seq))
        ready = assembler.replay([tokens(1), opening(2)], committed=2, over=False)
        assert seqs(ready) == [2]
        assert seqs(assembler.receive(tokens(3, tag=NEW))) == [3]

    def test_a_new_attempt_that_opens_live_is_confirmed_by_the_stream(self) -> None:
        assembler = live(upto=2)
        assert assembler.receive(opening(3)) == []
        assert assembler.receive(tokens(4, tag=NEW)) == []
        assert assembler.needs_replay
        page = [tokens(1), tokens(2), opening(3)][assembler.replay_from :]
        assert seqs(assembler.replay(page, committed=3, over=False)) == [3, 4]

    def test_a_primary_that_holds_less_is_followed_until_it_has_caught_up(self) -> None:
        assembler = live(upto=6)
        assembler.disconnected()
        assembler.replay([tokens(seq) for seq in (1, 2, 3, 4)], committed=4, over=False)
        assert [seqs(assembler.receive(tokens(seq))) for seq in (5, 6, 7)] == [[], [], [7]]

    def test_a_primary_that_goes_on_differently_is_a_reset(self) -> None:
        assembler = live(upto=6)
        assembler.disconnected()
        assembler.replay([tokens(seq) for seq in (1, 2, 3, 4)], committed=4, over=False)
        assert assembler.receive(opening(5)) == []
        assert kinds(assembler.replay([opening(5)], committed=5, over=False)) == RESET

    def test_a_rollback_is_seen_without_a_disconnect(self) -> None:
        assembler = live(upto=6)
        assembler.silent()
        assembler.replay([], committed=4, over=False)
        assembler.receive(opening(5))
        assert kinds(assembler.replay([opening(5)], committed=5, over=False)) == RESET

    def test_a_rollback_made_up_for_is_seen_without_a_disconnect(self) -> None:
        assembler = live(upto=6)
        assembler.silent()
        assert assembler.replay_from == 5
        page = [tokens(6, tag=NEW), tokens(7, tag=NEW)]
        assert kinds(assembler.replay(page, committed=7, over=False)) == RESET

    def test_a_rollback_to_nothing_is_seen_however_long_the_answer(self) -> None:
        assembler = live(upto=900)
        assembler.silent()
        assert assembler.replay([], committed=0, over=False) == []
        assert kinds(assembler.replay([opening(1)], committed=1, over=False)) == RESET

    def test_a_job_that_ended_before_what_was_delivered_is_a_reset(self) -> None:
        assembler = live(upto=6)
        assembler.disconnected()
        kept = [tokens(seq) for seq in (1, 2, 3, 4)]
        assert kinds(assembler.replay(kept, committed=4, over=True)) == RESET
        assert seqs(assembler.replay(kept, committed=4, over=True)) == [1, 2, 3, 4]
        assert assembler.ended

    def test_a_reset_repeats_nothing_if_it_is_lost_again(self) -> None:
        assembler = live(upto=3)
        assembler.replay([tokens(3, tag=NEW)], committed=3, over=False)
        assembler.disconnected()
        assert assembler.replay([], committed=0, over=False) == []
        assert seqs(assembler.replay([tokens(1)], committed=1, over=False)) == [1]

    def test_entries_beyond_the_end_are_no_events_of_the_job(self) -> None:
        """Else a stream that is ahead of its control hash would be reset for ever."""
        assembler = StreamAssembler()
        page = [tokens(seq) for seq in (1, 2, 3)]
        assert seqs(assembler.replay(page, committed=2, over=True, more=True)) == [1, 2]
        assert assembler.replay(page[1:], committed=2, over=True) == []
        assert assembler.ended


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
        unknown = b'{"v":1,"attempt":1,"tag":"01d01d01","seq":1,"type":"weather","sky":"blue"}'
        assert assembler.receive(unknown) == []
        assert seqs(assembler.receive(tokens(2))) == [2]

    def test_unknown_fields_are_ignored(self) -> None:
        assembler = live()
        choice = b'{"index":0,"text":"a","token_ids":[1],"x":1}'
        odd = b'{"v":1,"attempt":1,"seq":1,"type":"tokens","choices":[' + choice + b'],"y":{}}'
        assert seqs(assembler.receive(odd)) == [1]

    def test_what_it_remembers_of_events_stays_bounded(self) -> None:
        assembler = live(upto=1000)
        assert len(assembler._writers) == 1
