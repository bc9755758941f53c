"""One contract, two implementations: the Python twin, then the same tests over the C++ module."""

import random
import threading
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_serving.worker.engine.native import load_native
from mlx_serving.worker.engine.text import detokenizer as twin
from mlx_serving.worker.engine.text.vocabulary import Vocabulary, VocabularyTable, read_vocabulary
from tests.support.tokenizers_for_tests import (
    BYTE_FALLBACK,
    BYTE_LEVEL,
    BYTE_LEVEL_IDS,
    GEMMA,
    Reference,
)

_EXAMPLES = settings(
    max_examples=300,
    deadline=None,  # the two cores of a CI machine stall now and then
    # TestNative reruns TestTwin's tests; with no database neither replays the other's failures.
    suppress_health_check=[HealthCheck.differing_executors],
    database=None,
)
TABLES = {id(ref): read_vocabulary(ref.tokenizer) for ref in (BYTE_LEVEL, BYTE_FALLBACK, GEMMA)}


class TestTwin:
    """The contract; subclasses change the implementation only."""

    vocabulary_class: Any = Vocabulary
    detokenizer_class: Any = twin.Detokenizer

    def make(self, table: VocabularyTable) -> Any:
        vocabulary = self.vocabulary_class(
            table.tokens, table.kind, table.special_ids, table.strip_leading_space
        )
        return self.detokenizer_class(vocabulary)

    def of(self, reference: Reference) -> Any:
        return self.make(TABLES[id(reference)])

    def plain(self) -> Any:
        """Ids 0-255 are the bytes 0-255 in GPT-2's spelling."""
        return self.of(BYTE_LEVEL)

    def stream(
        self, reference: Reference, tokens: Sequence[int], stops: Sequence[str] = ()
    ) -> list[str]:
        detokenizer = self.of(reference)
        slot = detokenizer.open(stops)
        pieces = [detokenizer.push([slot], [token])[0][0] for token in tokens]
        return [*pieces, detokenizer.finish(slot)]

    def text(self, reference: Reference, tokens: Sequence[int], stops: Sequence[str] = ()) -> str:
        return "".join(self.stream(reference, tokens, stops))

    # -- the text equals the reference's ------------------------------------------------

    @_EXAMPLES
    @given(tokens=st.lists(st.integers(0, BYTE_LEVEL.size + 2), max_size=40))
    def test_byte_level_text_is_what_decode_gives(self, tokens: list[int]) -> None:
        assert self.text(BYTE_LEVEL, tokens) == BYTE_LEVEL.decode(tokens)

    @_EXAMPLES
    @given(tokens=st.lists(st.integers(0, BYTE_FALLBACK.size + 2), max_size=40))
    def test_byte_fallback_text_is_what_decode_gives(self, tokens: list[int]) -> None:
        assert self.text(BYTE_FALLBACK, tokens) == BYTE_FALLBACK.decode(tokens)

    @_EXAMPLES
    @given(tokens=st.lists(st.integers(0, GEMMA.size + 2), max_size=40))
    def test_byte_fallback_without_strip_keeps_the_leading_space(self, tokens: list[int]) -> None:
        assert self.text(GEMMA, tokens) == GEMMA.decode(tokens)

    @_EXAMPLES
    @given(text=st.text(max_size=30))
    def test_real_text_survives_the_round_trip(self, text: str) -> None:
        for reference in (BYTE_LEVEL, BYTE_FALLBACK, GEMMA):
            tokens = reference.encode(text)
            assert self.text(reference, tokens) == reference.decode(tokens)

    @_EXAMPLES
    @given(text=st.text(alphabet="aé你🙂\ufffd", max_size=20), cut=st.integers(0, 60))
    def test_no_broken_character_is_ever_released(self, text: str, cut: int) -> None:
        tokens = list(text.encode())[:cut]
        pieces = self.stream(BYTE_LEVEL, [BYTE_LEVEL_IDS[byte] for byte in tokens])
        for count in range(len(pieces) - 1):
            assert text.startswith("".join(pieces[: count + 1]))

    def test_a_character_is_released_with_its_last_byte(self) -> None:
        pieces = self.stream(BYTE_LEVEL, [BYTE_LEVEL_IDS[byte] for byte in "🙂".encode()])
        assert pieces == ["", "", "", "🙂", ""]

    def test_an_unfinished_character_is_one_replacement(self) -> None:
        tokens = [BYTE_LEVEL_IDS[byte] for byte in "🙂".encode()[:3]]
        assert self.stream(BYTE_LEVEL, tokens) == ["", "", "", "\ufffd"]

    def test_one_bad_byte_spoils_its_whole_run(self) -> None:
        run = BYTE_FALLBACK.ids("<0x41>", "<0xE4>")
        assert self.text(BYTE_FALLBACK, [*run, *BYTE_FALLBACK.ids("a")]) == "\ufffd\ufffda"

    def test_a_special_token_does_not_end_a_run(self) -> None:
        tokens = BYTE_FALLBACK.ids("<0xE4>", "<s>", "<0xBD>", "<0xA0>", "a")
        assert self.text(BYTE_FALLBACK, tokens) == "你a"

    def test_only_the_first_leading_space_is_stripped(self) -> None:
        tokens = BYTE_FALLBACK.ids("▁", "▁", "a", "▁", "a")
        assert self.text(BYTE_FALLBACK, tokens) == " a a"

    def test_an_added_token_that_is_not_special_is_literal_text(self) -> None:
        tokens = BYTE_LEVEL.ids("<tool call>", "<|im_end|>", "<tool call>")
        assert self.text(BYTE_LEVEL, tokens) == "<tool call><tool call>"

    # -- stop strings -------------------------------------------------------------------

    @_EXAMPLES
    @given(
        text=st.text(alphabet="abé🙂", max_size=24),
        stops=st.lists(st.text(alphabet="abé🙂", min_size=1, max_size=5), min_size=1, max_size=4),
    )
    def test_text_ends_before_the_stop_that_is_complete_first(
        self, text: str, stops: list[str]
    ) -> None:
        ends = [(at + len(stop), at) for stop in stops for at in [text.find(stop)] if at >= 0]
        expected = text[: min(ends)[1]] if ends else text
        tokens = [BYTE_LEVEL_IDS[byte] for byte in text.encode()]
        assert self.text(BYTE_LEVEL, tokens, stops) == expected

    @_EXAMPLES
    @given(
        text=st.text(alphabet="ab", max_size=24),
        stops=st.lists(st.text(alphabet="ab", min_size=2, max_size=6), min_size=1, max_size=4),
    )
    def test_hold_back_is_the_longest_possible_stop_and_no_more(
        self, text: str, stops: list[str]
    ) -> None:
        detokenizer = self.plain()
        slot = detokenizer.open(stops)
        seen, released = "", ""
        for character in text:
            piece, stopped = detokenizer.push([slot], [BYTE_LEVEL_IDS[ord(character)]])[0]
            seen, released = seen + character, released + piece
            if stopped:
                return
            starts = [stop[:n] for stop in stops for n in range(len(stop))]
            held = max(len(start) for start in starts if seen.endswith(start))
            assert released == seen[: len(seen) - held]

    def test_where_two_stops_end_together_the_longer_wins(self) -> None:
        tokens = BYTE_LEVEL.encode("xabc")
        assert self.text(BYTE_LEVEL, tokens, ["bc", "abc"]) == "x"

    def test_a_stop_across_three_tokens_leaks_no_part(self) -> None:
        detokenizer = self.of(BYTE_FALLBACK)
        slot = detokenizer.open(["a a"])
        pushed = [detokenizer.push([slot], ids)[0] for ids in map(BYTE_FALLBACK.ids, "ba▁ab")]
        assert pushed == [("b", False), ("", False), ("", False), ("", True), ("", True)]
        assert detokenizer.finish(slot) == ""

    def test_a_stop_inside_one_token_ends_the_text_there(self) -> None:
        detokenizer = self.plain()
        slot = detokenizer.open([" "])
        assert detokenizer.push([slot], BYTE_LEVEL.ids("<tool call>")) == [("<tool", True)]

    def test_finish_releases_a_stop_that_never_came(self) -> None:
        assert self.stream(BYTE_LEVEL, BYTE_LEVEL.ids("a", "b"), ["abc"]) == ["", "", "ab"]

    # -- slots --------------------------------------------------------------------------

    def test_a_batch_keeps_its_slots_apart(self) -> None:
        chance = random.Random(5)
        detokenizer = self.plain()
        streams = [[chance.randrange(BYTE_LEVEL.size) for _ in range(50)] for _ in range(16)]
        slots = [detokenizer.open() for _ in streams]
        texts = dict.fromkeys(slots, "")
        for step in zip(*streams, strict=True):
            order = chance.sample(range(16), 16)
            pieces = detokenizer.push([slots[n] for n in order], [step[n] for n in order])
            for n, (piece, _) in zip(order, pieces, strict=True):
                texts[slots[n]] += piece
        for slot, tokens in zip(slots, streams, strict=True):
            assert texts[slot] + detokenizer.finish(slot) == BYTE_LEVEL.decode(tokens)

    @_EXAMPLES
    @given(
        tokens=st.lists(st.integers(0, BYTE_FALLBACK.size - 1), max_size=30),
        cut=st.integers(0, 30),
    )
    def test_replay_rebuilds_the_state_that_pushes_made(self, tokens: list[int], cut: int) -> None:
        stops = ["aa", "ab "]
        detokenizer = self.of(BYTE_FALLBACK)
        slot = detokenizer.open(stops)
        text, _ = detokenizer.replay(slot, tokens[:cut])
        for token in tokens[cut:]:
            text += detokenizer.push([slot], [token])[0][0]
        assert text + detokenizer.finish(slot) == self.text(BYTE_FALLBACK, tokens, stops)

    def test_replay_says_that_a_stop_was_met(self) -> None:
        detokenizer = self.plain()
        slot = detokenizer.open(["b"])
        assert detokenizer.replay(slot, BYTE_LEVEL.ids("a", "b", "a")) == ("a", True)

    def test_a_closed_slot_is_given_out_again_clean(self) -> None:
        detokenizer = self.plain()
        first, second = detokenizer.open(["ab"]), detokenizer.open()
        detokenizer.push([first, second], BYTE_LEVEL.ids("a", "a"))
        detokenizer.close(first)
        assert (first, second, detokenizer.open()) == (0, 1, 0)
        assert detokenizer.push([0], BYTE_LEVEL.ids("b")) == [("b", False)]

    # -- bad input ----------------------------------------------------------------------

    @pytest.mark.parametrize(
        ("slots", "tokens", "message"),
        [
            ([0, 7], [1, 1], "slot 7 is not open"),
            ([0, -1], [1, 1], "slot -1 is not open"),
            ([0, 0], [1, 1], "slots: a slot occurs twice"),
            ([0, 1], [1], "tokens: 1 for 2 slots"),
            ([0, 1], [1, -4], r"tokens\[1\]: -4 is negative"),
        ],
    )
    def test_a_bad_push_names_the_argument_and_feeds_nothing(
        self, slots: list[int], tokens: list[int], message: str
    ) -> None:
        detokenizer = self.plain()
        assert (detokenizer.open(), detokenizer.open()) == (0, 1)
        with pytest.raises(ValueError, match=message):
            detokenizer.push(slots, tokens)
        assert detokenizer.push([0], BYTE_LEVEL.ids("a")) == [("a", False)]

    def test_a_finished_slot_takes_nothing_more(self) -> None:
        detokenizer = self.plain()
        slot = detokenizer.open()
        detokenizer.finish(slot)
        with pytest.raises(ValueError, match="slot 0 is finished"):
            detokenizer.push([slot], [1])
        detokenizer.close(slot)
        with pytest.raises(ValueError, match="slot 0 is not open"):
            detokenizer.close(slot)

    @pytest.mark.parametrize(
        ("stops", "message"),
        [(["a", ""], r"stops\[1\]: must not be empty"), (["\ud800"], r"stops\[0\]: .*surrogate")],
    )
    def test_a_bad_stop_string_is_refused(self, stops: list[str], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            self.plain().open(stops)

    @pytest.mark.parametrize(
        ("tokens", "kind", "special", "message"),
        [
            ([b"a"], "wordpiece", set(), "kind: must be byte_level or byte_fallback"),
            ([b"a"], "byte_level", {1}, "special_ids: 1 is not an id of a vocabulary of 1"),
            ([b"a", b"\xff"], "byte_fallback", set(), r"tokens\[1\]: the spelling is not UTF-8"),
        ],
    )
    def test_a_bad_vocabulary_is_refused(
        self, tokens: list[bytes], kind: str, special: set[int], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            self.vocabulary_class(tokens, kind, special)

    def test_huge_and_unknown_ids_release_nothing(self) -> None:
        assert self.text(BYTE_LEVEL, [BYTE_LEVEL.size + 9, 2**40, *BYTE_LEVEL.ids("a")]) == "a"


_native, _why_not = load_native()


@pytest.mark.skipif(_native is None, reason=f"mlx_serving._native: {_why_not}")
class TestNative(TestTwin):
    """The same contract over the C++ module."""

    vocabulary_class = _native and _native.Vocabulary
    detokenizer_class = _native and _native.Detokenizer

    def test_the_gil_is_released_while_it_works(self) -> None:
        table = VocabularyTable([b"a" * 10_000], "byte_level", set(), strip_leading_space=False)
        detokenizer = self.make(table)
        slot = detokenizer.open([f"b{n}" for n in range(64)])
        work = threading.Thread(target=detokenizer.replay, args=(slot, [0] * 300))
        ticks = [time.perf_counter()]
        work.start()
        while work.is_alive():
            ticks.append(time.perf_counter())
        ticks.append(time.perf_counter())
        longest = max(after - before for before, after in pairwise(ticks))
        # With the GIL held, this thread would stand still for all of the other's work.
        assert longest < (ticks[-1] - ticks[0]) / 2
